"""A call of a model, written in one way, and what is known of each of its leaves."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxshard.errors import InputError
from fxshard.torch_internals import pytree

__all__ = [
    "DECLARED",
    "Leaf",
    "bounds_of",
    "free_of",
    "in_words",
    "is_default",
    "canonical_call",
    "is_declared",
    "leaf_of",
    "named_dynamic_shapes",
]

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


@dataclass(frozen=True)
class Leaf:
    """One leaf of the inputs, as it was at capture.

    Attributes:
        path: where it is in the call, e.g. ``input_ids`` or ``batch['x']``.
        shape: sizes; a dynamic dim is a sympy expression. ``None`` for what is not a tensor.
        dtype: ``None`` for what is not a tensor.
        requires_grad: whether the example required a gradient.
        symbol: the sympy expression of a dynamic number, else ``None``.
    """

    path: str
    shape: tuple[Any, ...] | None = None
    dtype: torch.dtype | None = None
    requires_grad: bool = False
    symbol: Any = None

    def __str__(self) -> str:
        return f"{self.path}: {in_words(self.dtype, self.shape)}" if self.shape is not None else self.path


def canonical_call(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Write a call in the one way in which captures are compared: by keyword, in the order of the signature.

    A plain value that is a parameter's default is left out, as though it had not been given.

    >>> canonical_call(inspect.signature(lambda x, scale=1.0, mask=None: 0), (3, 1.0), {"mask": None})
    ((), {'x': 3})
    """
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"the inputs do not fit the model's forward: {error}",
            fix=f"call it as forward{signature}",
        ) from None
    parameters = signature.parameters
    kinds = inspect.Parameter
    starred = any(parameters[name].kind is kinds.VAR_POSITIONAL for name in bound.arguments)
    positional: list[Any] = []
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = parameters[name].kind
        if kind is kinds.VAR_POSITIONAL:
            positional.extend(value)
        elif kind is kinds.VAR_KEYWORD:
            named.update(sorted(value.items()))
        elif kind is kinds.POSITIONAL_ONLY or (starred and kind is kinds.POSITIONAL_OR_KEYWORD):
            positional.append(value)
        elif not is_default(value, parameters[name].default):
            named[name] = value
    return tuple(positional), named


def is_default(value: Any, default: Any) -> bool:
    """Whether a plain value is what a parameter has where it is not given; ``torch.compile`` traces through it.

    >>> is_default(1.0, 1.0), is_default(1, 1.0), is_default(-0.0, 0.0), is_default(None, None)
    (True, False, False, True)
    """
    if type(value) not in _PLAIN or type(value) is not type(default):
        return False
    return bool(value == default and (value != 0 or repr(value) == repr(default)))


def is_plain_default(parameter: inspect.Parameter) -> bool:
    """Whether a parameter has a plain value where it is not given."""
    return type(parameter.default) in _PLAIN


def named_dynamic_shapes(
    shapes: Any,
    signature: inspect.Signature,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    tree: tuple[tuple[Any, ...], dict[str, Any]],
) -> Any:
    """Name the entries of ``dynamic_shapes`` as the canonical call does; entries that are left out are static."""
    if isinstance(shapes, list | tuple):
        names = list(signature.bind(*args, **kwargs).arguments)
        shapes = dict(zip(names, shapes, strict=False)) if len(shapes) == len(names) else shapes
    if not isinstance(shapes, dict):
        return shapes
    present = list(signature.bind(*tree[0], **tree[1]).arguments)
    starred = {name for name, p in signature.parameters.items() if p.kind is inspect.Parameter.VAR_KEYWORD}
    flat = {name: shapes.get(name) for name in present if name not in starred}
    flat |= {name: shapes.get(name) for name in tree[1] if name not in flat}
    for name in starred & shapes.keys():
        flat |= shapes[name] or {}
    return flat | {name: entry for name, entry in shapes.items() if name not in flat | dict.fromkeys(starred) and entry}


def leaf_of(path: str, leaf: Any, value: Any) -> Leaf:
    """Return what is known of a leaf whose placeholder holds ``value``."""
    if isinstance(leaf, torch.Tensor):
        shape = tuple(_expr(size) for size in (leaf if value is None else value).shape)
        return Leaf(path, shape, leaf.dtype, leaf.requires_grad)
    return Leaf(path, symbol=value.node.expr if isinstance(value, _SYMBOLIC) else None)


def _expr(size: Any) -> Any:
    if not isinstance(size, torch.SymInt):
        return int(size)
    expr = size.node.expr
    return int(expr) if expr.is_Integer else expr


def free_of(ranges: Mapping[Any, tuple[float, float]], shapes: Any) -> frozenset[Any]:
    """The dynamic sizes whose range no ``Dim`` of ``dynamic_shapes`` asked for."""
    dims = [dim for dim in pytree.tree_leaves(shapes) if getattr(dim, "max", None) is not None]
    asked = {float(dim.max) for dim in dims}
    return frozenset(symbol for symbol, (_, high) in ranges.items() if float(high) not in asked)


def bounds_of(span: Any) -> tuple[float, float]:
    """Return the smallest and the largest size of a range of export."""

    def number(value: Any) -> float:
        return int(value) if value.is_Integer else math.inf

    return number(span.lower), number(span.upper)


def in_words(dtype: torch.dtype | None, shape: Any) -> str:
    """A tensor's type as a message writes it.

    >>> in_words(torch.float32, (2, 3))
    'float32[2, 3]'
    """
    return f"{str(dtype).removeprefix('torch.')}[{', '.join(map(str, shape))}]"


def pattern_of(leaves: Sequence[Any]) -> tuple[int, ...]:
    """Which of the leaves are one tensor: for each the first place where it is; empty where each is another.

    >>> x, y = torch.ones(1), torch.ones(1)
    >>> pattern_of([x, 2, x]), pattern_of([x, 2, y])
    ((0, 1, 0), ())
    """
    first: dict[int, int] = {}
    places = tuple(first.setdefault(id(x), i) if isinstance(x, torch.Tensor) else i for i, x in enumerate(leaves))
    return places if any(place != i for i, place in enumerate(places)) else ()


DECLARED = "fxshard constant: "
"""Begins the text that stands for a tensor whose values were declared constant: see ``constants.py``."""


def is_declared(leaf: Any) -> bool:
    """Whether a leaf stands for such a tensor."""
    return isinstance(leaf, str) and leaf.startswith(DECLARED)
