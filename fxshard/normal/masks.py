"""masks: attention whose mask is known says so, and reads keys that several query heads share as they are.

In: a normalized graph.   Out: an equal one.

    %mask = le(arange(64), unsqueeze(arange(64), 1))
    %k    = reshape(expand(unsqueeze(%keys, 2), [2, 4, 2, 64, 16]), [2, 8, 64, 16])     %v likewise
    %y    = attention(%q, %k, %v, %mask)
                                              ->  %y = attention(%q, %keys, %values, is_causal=True, enable_gqa=True)

While it is traced, a model cannot ask whether its mask hides anything, so it makes one in full. The mask of a long
sequence takes much memory, kernels without one are faster, and a ring does not attend to what the future hides.

What a large mask allows is found without making it. Of positions that do not fall from left to right a comparison
allows each query one run of keys, an ``Interval``, and so do two such masks together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxshard.normal.functionalize import same_shape
from fxshard.rules.effects import is_pure
from fxshard.rules.recipe import bind

aten = torch.ops.aten

SMALL, LARGE = 2**14, 2**20
"""Up to so many elements a value is computed as it is; up to so many, if nothing else tells what it allows."""

HEADS = 1


@dataclass(frozen=True)
class Interval:
    """A boolean ``[..., queries, keys]``, each row of which is true from ``start`` on and before ``stop``.

    Attributes:
        start: i64[..., queries], which may have to be broadcast.
        stop: likewise; not below ``start``.
        keys: how many there are.
    """

    start: torch.Tensor
    stop: torch.Tensor
    keys: int

    def __and__(self, other: Interval) -> Interval:
        start = torch.maximum(self.start, other.start)
        return Interval(start, torch.maximum(start, torch.minimum(self.stop, other.stop)), self.keys)

    @property
    def is_all(self) -> bool:
        """Whether every query may attend to every key."""
        return bool((self.start == 0).all() and (self.stop == self.keys).all())

    def is_causal(self, queries: int) -> bool:
        """Whether each query may attend to what is not behind it, of as many queries as keys."""
        if queries != self.keys or bool((self.start != 0).any()):
            return False
        return bool((self.stop == torch.arange(1, self.keys + 1)).all())


Known = torch.Tensor | Interval | None
Rule = Callable[[int, list[Any]], Interval | None]
"""Of the number of keys and the arguments of a call, what its result allows."""


def read_masks(graph: fx.Graph) -> None:
    """Applies the rewrite of the module's text in place; what is read no more stays."""
    calls = graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    with torch.no_grad(), torch.device("cpu"):
        _read_masks(calls)


def _read_masks(calls: Iterable[fx.Node]) -> None:
    found: dict[fx.Node, Known] = {}
    for node in calls:
        arguments = bind(node)
        mask = arguments["attn_mask"]
        if isinstance(mask, fx.Node):
            queries, keys = (arguments[name].meta["val"].shape[-2] for name in ("query", "key"))
            allowed = as_interval(_known(mask, found), keys) if isinstance(keys, int) else None
            if allowed is None or not (allowed.is_all or allowed.is_causal(queries)):
                continue
            arguments |= {"attn_mask": None, "is_causal": not allowed.is_all}
        key, value = (_shared(arguments[name]) for name in ("key", "value"))
        if key is not None and value is not None and not arguments["dropout_p"]:
            arguments |= {"key": key, "value": value, "enable_gqa": True}
        node.args = tuple(arguments[name] for name in ("query", "key", "value"))
        node.kwargs = {name: arguments[name] for name, usual in USUAL.items() if arguments[name] != usual}


USUAL = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}


def _shared(node: fx.Node) -> fx.Node | None:
    """``[batch, heads, length, features]`` of which ``node`` has each head several times, one after the other."""
    if node.target is not aten.reshape.default:
        return None
    expanded: Any = node.args[0]
    unsqueezed: Any = expanded.args[0] if expanded.target is aten.expand.default else None
    if unsqueezed is None or unsqueezed.target is not aten.unsqueeze.default:
        return None
    source, dim = unsqueezed.args
    before, between, after = (each.meta["val"].shape for each in (source, expanded, node))
    if len(before) != 4 or dim % 5 != HEADS + 1:
        return None
    batch, heads, *rest = before
    copies = between[HEADS + 1]
    is_joined = same_shape(after, (batch, heads * copies, *rest))
    return source if is_joined and same_shape(between, (batch, heads, copies, *rest)) else None


# --- what is known of a value --------------------------------------------------------------------------------------


def _known(mask: fx.Node, found: dict[fx.Node, Known]) -> Known:
    """A value that depends on no input and no weight: itself, or where it is large, what it allows; or None.

    Args:
        mask: the value.
        found: what is known already; added to.
    """
    behind, latest = {mask}, [mask]
    while latest:
        node = latest.pop()
        new = [n for n in node.all_input_nodes if n not in behind and n not in found] if is_pure(node) else []
        behind.update(new)
        latest += new
    for node in sorted(behind - found.keys()):
        operands = {n: found.get(n) for n in node.all_input_nodes}
        is_known = is_pure(node) and all(each is not None for each in operands.values())
        found[node] = _result(node, operands) if is_known else None
    return found[mask]


def _result(node: fx.Node, operands: dict[fx.Node, Known]) -> Known:
    value, rule = node.meta["val"], RULES.get(node.target)
    args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), lambda x: _given(x, operands))
    if value.numel() > SMALL and value.dim() > 1 and value.dtype == torch.bool and rule is not None:
        allowed = rule(value.shape[-1], list(args))
        if allowed is not None:
            return allowed
    if value.numel() > LARGE or any(isinstance(each, Interval) for each in operands.values()):
        return None
    made: torch.Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
    return made


def _given(x: Any, operands: dict[fx.Node, Known]) -> Any:
    if isinstance(x, fx.Node):
        return operands[x]
    return torch.device("cpu") if isinstance(x, torch.device) else x


def as_interval(value: Any, keys: int) -> Interval | None:
    """What a boolean mask allows each query, of so many keys; None where that is not one run.

    >>> found = as_interval(torch.ones(3, 3).tril().bool(), 3)
    >>> found.start.tolist(), found.stop.tolist(), found.is_causal(3)
    ([0, 0, 0], [1, 2, 3], True)
    """
    if isinstance(value, Interval):
        return value if value.keys == keys else None
    if not isinstance(value, torch.Tensor) or value.dtype != torch.bool:
        return None
    rows = torch.atleast_2d(value)
    rows = rows.expand(*rows.shape[:-1], keys)
    start = rows.to(torch.uint8).argmax(-1)
    found = Interval(start, start + rows.sum(-1), keys)
    at = torch.arange(keys)
    is_one_run = ((at >= start.unsqueeze(-1)) & (at < found.stop.unsqueeze(-1))) == rows
    return found if bool(is_one_run.all()) else None


def _compares(inclusive: bool, below: bool) -> Rule:
    """The rule of a comparison of keys with queries: it allows the keys below the query's, or those above it."""

    def rule(keys: int, args: list[Any]) -> Interval | None:
        of_keys, of_queries = args
        rising = of_keys.reshape(-1, keys) if _is_of_keys(of_keys, keys) else None
        if rising is None or not isinstance(of_queries, torch.Tensor) or of_queries.dim() < 2:
            return None
        is_sorted = bool((rising == rising[0]).all() and (rising[0].diff() >= 0).all())
        if of_queries.shape[-1] != 1 or of_queries.dtype != of_keys.dtype or not is_sorted:
            return None
        place = torch.searchsorted(
            rising[0].contiguous(), of_queries.squeeze(-1).contiguous(), right=inclusive == below
        )
        if below:
            return Interval(torch.zeros_like(place), place, keys)
        return Interval(place, torch.full_like(place, keys), keys)

    return rule


def _is_of_keys(x: Any, keys: int) -> bool:
    """Whether a value differs by key, and not by query."""
    if not isinstance(x, torch.Tensor) or x.dtype.is_floating_point or not x.dim() or x.shape[-1] != keys:
        return False
    return x.dim() < 2 or x.shape[-2] == 1


def _either_way(rule: Rule, mirrored: Rule) -> Rule:
    """Keys are compared with queries, or queries with keys."""

    def both(keys: int, args: list[Any]) -> Interval | None:
        return rule(keys, args) if _is_of_keys(args[0], keys) else mirrored(keys, args[::-1])

    return both


_le, _lt, _gt, _ge = _compares(True, True), _compares(False, True), _compares(False, False), _compares(True, False)


def _eq(keys: int, args: list[Any]) -> Interval | None:
    return _and(keys, [_ge(keys, args), _le(keys, args)])


def _and(keys: int, args: list[Any]) -> Interval | None:
    a, b = (as_interval(each, keys) for each in args)
    return a & b if a is not None and b is not None else None


def _same(keys: int, args: list[Any]) -> Interval | None:
    """Broadcast to more queries, heads and batches, and copies."""
    return as_interval(args[0], keys)


RULES: dict[Any, Rule] = {
    aten.le.Tensor: _either_way(_le, _ge),
    aten.lt.Tensor: _either_way(_lt, _gt),
    aten.gt.Tensor: _either_way(_gt, _lt),
    aten.ge.Tensor: _either_way(_ge, _le),
    aten.eq.Tensor: _either_way(_eq, _eq),
    aten.__and__.Tensor: _and,
    aten.bitwise_and.Tensor: _and,
    aten.logical_and.default: _and,
    aten.expand.default: _same,
    aten.contiguous.default: _same,
    aten.clone.default: _same,
}
"""Operators whose boolean results, where they are large, are found without making them."""
