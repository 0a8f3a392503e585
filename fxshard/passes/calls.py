"""A call of the captured model: written in one way, and held against what was captured."""

from __future__ import annotations

import inspect
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fxshard.errors import InputError
from fxshard.passes.guards import broken
from fxshard.passes.trees import paths
from fxshard.torch_internals import pytree

if TYPE_CHECKING:
    from fxshard.passes.capture import Captured

__all__ = [
    "DECLARED",
    "Excluded",
    "Leaf",
    "bounds_of",
    "free_of",
    "in_words",
    "is_default",
    "canonical_call",
    "check_leaves",
    "is_declared",
    "leaf_of",
    "named_dynamic_shapes",
    "structure_error",
]

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


class Excluded(InputError):
    """Dynamic sizes that what was captured does not serve, though a capture of these very sizes would."""


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


def check_leaves(captured: Captured, leaves: list[Any]) -> None:
    """Compare each leaf with what was captured; all that do not fit are named in one error."""
    sizes = _Sizes(captured.ranges, captured.free_sizes)
    derived: list[tuple[Leaf, Any, int, str]] = []
    problems = []
    others = False  # values of a declared constant that were not captured yet, nor the sizes that go with them
    for index, (leaf, info) in enumerate(zip(leaves, captured.example_inputs, strict=True)):
        if info.shape is not None:
            problem = _check_tensor(leaf, info, sizes, derived)
        elif info.symbol is not None:
            problem = sizes.check(leaf, info.symbol)
        else:
            problem = _check_constant(leaf, captured.constants[index])
            others |= bool(problem) and is_declared(leaf)
        if problem:
            problems.append(f"{info.path}: {problem}")
    for info, expr, size, where in derived:
        expected = expr.subs(sizes.known)
        if expected.is_Integer and int(expected) != size:
            problems.append(f"{info.path}: {where} is {size}, expected {expr} = {expected}")
    if problems:
        raise (Excluded if others or len(problems) == sizes.excluded else InputError)(
            "the inputs do not fit what was captured: " + "; ".join(problems),
            fix="give inputs of the captured shapes, capture again with these, or name the dims that vary in "
            "dynamic_shapes, in a range that has these sizes",
        )
    if captured.pattern is not None and pattern_of(leaves) != captured.pattern:
        raise Excluded(
            "the inputs do not fit what was captured: which of them are one tensor differs",
            fix="clone what is given twice, or capture again with these",
        )
    if problems := broken(captured.guards, sizes.known, _places(captured)):
        raise Excluded(
            "the inputs do not fit what was captured: " + "; ".join(problems),
            fix="the model branches on that size: give sizes that take the captured branch, or make another program, "
            "from an example that takes this one",
        )


def _places(captured: Captured) -> dict[Any, tuple[str, int]]:
    """The first input and dim that each dynamic size is of."""
    found: dict[Any, tuple[str, int]] = {}
    for info in captured.example_inputs:
        for dim, size in enumerate(info.shape or ()):
            if getattr(size, "is_Symbol", False):
                found.setdefault(size, (info.path, dim))
    return found


def _check_tensor(
    leaf: Any,
    info: Leaf,
    sizes: _Sizes,
    derived: list[tuple[Leaf, Any, int, str]],
) -> str:
    expected = in_words(info.dtype, info.shape)
    if not isinstance(leaf, torch.Tensor):
        return f"expected {expected}, got {leaf!r}"
    assert info.shape is not None
    if leaf.dtype != info.dtype or leaf.dim() != len(info.shape):
        return f"expected {expected}, got {in_words(leaf.dtype, leaf.shape)}"
    for dim, (size, want) in enumerate(zip(leaf.shape, info.shape, strict=True)):
        if isinstance(want, int):
            if size != want:
                return f"expected {expected}, got {in_words(leaf.dtype, leaf.shape)} (dim {dim})"
        elif want.is_Symbol:
            if problem := sizes.check(size, want):
                return f"dim {dim} {problem}"
        else:
            derived.append((info, want, size, f"dim {dim}"))
    return ""


class _Sizes:
    """The dynamic sizes of a call, as they are met.

    Attributes:
        known: symbol -> its value in the call.
        excluded: how many were outside of a range that nobody asked for: the model made it.
    """

    def __init__(self, ranges: Mapping[Any, tuple[float, float]], free: Container[Any]) -> None:
        self.known: dict[Any, int] = {}
        self.excluded = 0
        self._ranges, self._free = ranges, free

    def check(self, size: Any, symbol: Any) -> str:
        """What is wrong with a size; empty where nothing is."""
        low, high = self._ranges.get(symbol, (0, math.inf))
        if not low <= size <= high:
            self.excluded += symbol in self._free
            return f"is {size}, outside of its range {low} to {high}"
        if self.known.setdefault(symbol, size) != size:
            return f"is {size}, but the same dynamic size {symbol} is {self.known[symbol]} in another input"
        return ""


DECLARED = "fxshard constant: "
"""Begins the text that stands for a tensor whose values were declared constant: see ``constants.py``."""


def is_declared(leaf: Any) -> bool:
    """Whether a leaf stands for such a tensor."""
    return isinstance(leaf, str) and leaf.startswith(DECLARED)


def _check_constant(leaf: Any, value: Any) -> str:
    if isinstance(leaf, torch.Tensor):
        return f"expected the constant {value!r}, got {in_words(leaf.dtype, leaf.shape)}"
    same = type(leaf) is type(value) and (leaf == value or (leaf != leaf and value != value))
    return "" if same else f"was {value!r} at capture, which the graph holds as a constant; got {leaf!r}"


def structure_error(captured: Captured, tree: Any) -> InputError:
    """Return the error for a call whose tree is another than the captured one."""
    given, known = paths(tree), [info.path for info in captured.example_inputs]
    missing = [path for path in known if path not in given]
    extra = [path for path in given if path not in known]
    parameters = captured.signature.parameters
    left_out = [path for path in extra if path in parameters and type(parameters[path].default) in _PLAIN]
    extra = [path for path in extra if path not in left_out]
    parts = [f"{path} was {parameters[path].default!r} at capture, its default" for path in left_out]
    parts += [f"missing {', '.join(missing)}"] * bool(missing) + [f"unexpected {', '.join(extra)}"] * bool(extra)
    return InputError(
        "the inputs have another structure than what was captured: " + ("; ".join(parts) or "other container types"),
        fix=f"pass exactly {', '.join(map(str, captured.example_inputs))}, or capture again with these inputs",
    )
