"""What a rule says of one call: its factors, and through which operands it is linear.

A *factor* is something that an operator iterates over: the rows of a matrix product, the heads of an attention.
A mesh axis splits at most one factor of a call. For each operand and result a factor tells where it sits (``At``):

    linear [b, i] x [o, i] -> [b, o]
      factor o:  inputs (None, At(0)),  outputs (At(1),)      column sharding
      factor i:  inputs (At(1), At(1)), outputs (None,)       row sharding: the result is Partial(sum)

An operand without the factor is needed whole by every rank (``None``). ``At.blocks`` says that the factor's pieces
repeat along the dim: splitting ``h`` of a packed dim ``(3 h d)`` cuts each of 3 blocks.

Reference: the sharding-propagation view of GSPMD (Xu et al., 2021) and of Shardy's factor rules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import sympy
import torch
from torch import fx

from fxshard.placement import Cut, Groups, Placement, Shard, cut_of, is_shard, normalize_blocks, shard
from fxshard.torch_internals import OpOverload

Dim: TypeAlias = "int | sympy.Expr"
Shape: TypeAlias = tuple[Dim, ...]


class At(NamedTuple):
    """Where a factor sits in one tensor, or where a tensor is cut.

    Attributes:
        dim: the dim.
        blocks: the relative sizes of the blocks that are each cut alike.
        shares: where a tensor is cut unevenly, what the ranks hold; a factor has none.
        groups: the dim holds the rows of the factor's units, which go with them. A rule says which operand holds the
            ends of these groups of rows.
    """

    dim: int
    blocks: tuple[int, ...] = (1,)
    shares: tuple[int, ...] = ()
    groups: Groups | int | None = None

    def cut(self, cut: Cut) -> At:
        """Where the dim is cut when the factor here is cut so."""
        return At(self.dim, combine(self.blocks, cut.blocks), cut.shares, cut.groups or self.groups)

    def placement(self, cut: Cut) -> Shard:
        """How the tensor lies on an axis that cuts the factor here so."""
        dim, blocks, shares, groups = self.cut(cut)
        assert not isinstance(groups, int), "a rule's groups have no name yet"
        return shard(dim, blocks, shares, groups)

    @staticmethod
    def of(placement: Placement) -> At | None:
        """Where a placement cuts; None where it does not."""
        return At(placement.dim, *cut_of(placement)) if is_shard(placement) else None


@dataclass(frozen=True)
class Factor:
    """One factor of a call.

    Attributes:
        name: as in the notation.
        size: how many units there are to distribute.
        inputs: where it sits in each tensor operand, in order; None where that operand lacks it.
        outputs: likewise for each result; a result that lacks it is ``Partial(sum)``.
        lowering: the name of the local replacement, where computing on a slice differs from slicing the result.
        reduced: the lowering gives results that lack the factor whole, not as summands.
        plain: the lowering knows one range a rank: the factor is not cut in blocks.
        even: the ranks must hold the same, for it lies in a dim of a dynamic size.
        alone: every dim in which it sits is made of it alone.
    """

    name: str
    size: Dim
    inputs: tuple[At | None, ...]
    outputs: tuple[At | None, ...]
    lowering: str | None = None
    reduced: bool = False
    plain: bool = False
    even: bool = False
    alone: bool = False

    def cut_for(self, at: At | None, wanted: At | None, parts: int) -> Cut | None:
        """How to cut the factor so that the dim in which it sits at ``at`` is cut as ``wanted``.

        None where that cannot be: another dim, other blocks, or a size that does not fall into the pieces that
        ``parts`` ranks hold.
        """
        if at is None or wanted is None or at.dim != wanted.dim:
            return None
        if at.groups != wanted.groups:
            return self._by_groups(wanted)
        if self.even and wanted.shares:
            return None
        blocks = uncombine(wanted.blocks, at.blocks)
        if blocks is None or (self.plain and blocks != (1,)):
            return None
        cut = Cut(blocks, wanted.shares)
        return cut if units(self.size, blocks, cut.pieces(parts)) else None

    def _by_groups(self, wanted: At) -> Cut | None:
        """How to cut the factor where its units are rows, which are dealt out in groups."""
        if not isinstance(wanted.groups, Groups) or self.size != wanted.groups.rows:
            return None
        if self.lowering not in ROWS or not self.alone or not any(self.inputs):
            return None
        if any(at is not None and (at.groups is not None or at.blocks != (1,)) for at in (*self.inputs, *self.outputs)):
            return None
        return Cut((1,), wanted.shares, wanted.groups)


ROWS = (None, "picked", "added")
"""Lowerings that need not know before the program runs how many rows a rank has."""


@dataclass(frozen=True)
class Recipe:
    """What a rule says of one call.

    Attributes:
        factors: those that an axis may split, in the order of preference.
        linear: sets of operands; where exactly the operands of one set are Partial, so is the result.
        unread: operands of which only shape, dtype or device is read, never the values.
    """

    factors: tuple[Factor, ...] = ()
    linear: tuple[frozenset[int], ...] = ()
    unread: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Call:
    """One call of an operator, as a rule sees it: shapes and arguments, no values.

    Attributes:
        name: e.g. ``aten.linear``.
        inputs: the shape of each tensor operand, in the order of the schema, lists flattened.
        outputs: the shape of each result (one that is no tensor has the shape ``()``).
        arguments: every argument by its schema name; a tensor is an ``Operand`` (its position in ``inputs``).
        whole_inputs: the shapes before any mesh axis cut them. Literal positions (of slices) speak of these.
        carried: how the axis at hand already cuts each operand. Only rules of ``lookup._LAYOUT`` are told.
        affine: a number stands where the schema has a tensor, as in ``x + 1``: the operator is then not linear.
    """

    name: str
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    arguments: Mapping[str, Any]
    whole_inputs: tuple[Shape, ...] = ()
    carried: tuple[At | None, ...] = ()
    affine: bool = False

    def operand(self, name: str) -> int | None:
        """The position of the tensor operand ``name``; None where it was not given."""
        value = self.arguments.get(name)
        return value.index if isinstance(value, Operand) else None

    def dtype(self, name: str) -> torch.dtype | None:
        """The dtype of the tensor operand ``name``."""
        value = self.arguments.get(name)
        return value.dtype if isinstance(value, Operand) else None

    @property
    def is_cut(self) -> bool:
        """Whether an outer mesh axis already cuts an operand."""
        return bool(self.whole_inputs) and self.whole_inputs != self.inputs

    def dim(self, name: str, ndim: int, default: int | None = None) -> int:
        """The argument ``name`` as a dim counted from 0."""
        value = self.arguments.get(name)
        value = default if value is None else value
        assert isinstance(value, int)
        return value % max(ndim, 1)

    def dims(self, name: str, ndim: int) -> tuple[int, ...]:
        """The argument ``name`` as dims counted from 0; all of them where it is None or empty, none of a scalar."""
        value = self.arguments.get(name)
        if value is None or value == () or ndim == 0:
            return tuple(range(ndim))
        return tuple(d % max(ndim, 1) for d in ((value,) if isinstance(value, int) else value))


class Operand(NamedTuple):
    """Stands for a tensor among a call's arguments."""

    index: int  # type: ignore[assignment]
    dtype: torch.dtype | None = None


RuleFunction: TypeAlias = Callable[[Call], Recipe]


def to_dim(size: Any) -> Dim:
    """A size as an int, or as the expression of a symbolic one."""
    if isinstance(size, torch.SymInt):
        expr = size.node.expr
        return int(expr) if expr.is_number else expr
    return int(size)


def shape_of(value: Any) -> Shape:
    """The shape of a value of the graph, symbols as expressions."""
    if not isinstance(value, torch.Tensor):
        return ()
    shape = tuple(value.shape)
    for size in shape:
        if type(size) is not int:
            try:
                return tuple(map(to_dim, shape))
            except AttributeError:
                break
    return shape


def divides(size: Dim, parts: int) -> bool:
    """Whether ``size`` can be cut in ``parts`` equal ones; a symbolic size is checked when the program runs."""
    if isinstance(size, int):
        return size % parts == 0 and size > 0
    return not size.is_number or int(size) % parts == 0


def combine(outer: tuple[int, ...], inner: tuple[int, ...]) -> tuple[int, ...]:
    """Blocks ``inner`` within each of the blocks ``outer``.

    >>> combine((1, 1), (2, 1)), combine((1,), (1, 1))
    ((2, 1, 2, 1), (1, 1))
    """
    if outer == (1,):
        return inner
    return normalize_blocks([o * i for o in outer for i in inner])


def uncombine(blocks: tuple[int, ...], outer: tuple[int, ...]) -> tuple[int, ...] | None:
    """The ``inner`` with ``combine(outer, inner) == blocks``; None where there is none.

    >>> uncombine((2, 1, 2, 1), (1, 1)), uncombine((2, 1), (1, 1))
    ((2, 1), None)
    """
    if outer == (1,):
        return blocks
    if len(blocks) % len(outer):
        return None
    inner = normalize_blocks(blocks[: len(blocks) // len(outer)])
    return inner if combine(outer, inner) == blocks else None


@dataclass(frozen=True)
class Signature:
    """The schema of an operator, read once."""

    names: tuple[str, ...]
    defaults: tuple[Any, ...]
    tensor: tuple[bool, ...]
    kwarg_only: frozenset[str] = field(default_factory=frozenset)


@cache
def signature_of(target: OpOverload) -> Signature:
    """The schema of an overload: names, defaults, which arguments are tensors."""
    arguments = target._schema.arguments
    return Signature(
        tuple(a.name for a in arguments),
        tuple(a.default_value for a in arguments),
        tuple("Tensor" in str(a.type) for a in arguments),
        frozenset(a.name for a in arguments if a.kwarg_only),
    )


def bind(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by their schema names, defaults filled in."""
    assert isinstance(node.target, OpOverload)
    sig = signature_of(node.target)
    out = dict(zip(sig.names, sig.defaults, strict=True))
    out.update(zip(sig.names, node.args, strict=False))
    out.update(node.kwargs)
    return out


RUNNING = {
    "aten::batch_norm": "training",
    "aten::instance_norm": "use_input_stats",
    "aten::native_batch_norm": "training",
    "aten::cudnn_batch_norm": "training",
    "aten::miopen_batch_norm": "training",
    "aten::_batch_norm_impl_index": "training",
}
"""Norms that update running statistics, which their schemas do not say: the argument by which they are asked to."""


def written(node: fx.Node) -> dict[str, fx.Node]:
    """The tensors that a call updates in place, by argument: a buffer, the running statistics of a batch_norm."""
    if not isinstance(node.target, OpOverload):
        return {}
    names = [a.name for a in node.target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    trains = RUNNING.get(node.target._schema.name)
    if trains is not None and bind(node)[trains]:
        names += ["running_mean", "running_var"]
    if not names:
        return {}
    arguments = bind(node)
    return {name: arguments[name] for name in names if isinstance(arguments[name], fx.Node)}


def is_tensor(node: Any) -> bool:
    """Whether a node of the graph is one tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def is_list(node: fx.Node) -> bool:
    """Whether a node gives a list of tensors, of one or none as well, and not a tensor."""
    return isinstance(node.meta.get("val"), (list, tuple))


def operands_of(node: fx.Node) -> list[fx.Node]:
    """The tensor operands of a call, in the order of the schema, lists flattened, with repetitions."""
    if isinstance(node.target, OpOverload):
        values = bind(node).values() if node.kwargs else node.args
    else:
        values = (*node.args, *node.kwargs.values())
    out: list[fx.Node] = []
    _collect(values, out)
    return out


def _collect(values: Any, out: list[fx.Node]) -> None:
    for value in values:
        if isinstance(value, fx.Node):
            if isinstance(value.meta.get("val"), (torch.Tensor, list, tuple)):
                out.append(value)
        elif isinstance(value, (list, tuple)):
            _collect(value, out)
        elif isinstance(value, dict):
            _collect(value.values(), out)


def with_operands(
    node: fx.Node, operands: Sequence[fx.Node], others: Mapping[fx.Node, fx.Node]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with other tensor operands, in the order of ``operands_of``."""
    rest = iter(operands)

    def swap(value: Any) -> Any:
        if isinstance(value, fx.Node):
            is_operand = isinstance(value.meta.get("val"), (torch.Tensor, list, tuple))
            return next(rest) if is_operand else others[value]
        if isinstance(value, (list, tuple)):
            return type(value)(swap(v) for v in value) if type(value) in (list, tuple) else [swap(v) for v in value]
        if isinstance(value, dict):
            return {k: swap(v) for k, v in value.items()}
        if isinstance(value, slice):
            return slice(swap(value.start), swap(value.stop), swap(value.step))
        return value

    if node.kwargs and isinstance(node.target, OpOverload):
        swapped = {name: swap(value) for name, value in bind(node).items()}
        names = signature_of(node.target).names
        return tuple(swapped[n] for n in names[: len(node.args)]), {n: swapped[n] for n in node.kwargs}
    return tuple(swap(a) for a in node.args), {k: swap(v) for k, v in node.kwargs.items()}


def units(size: Dim, blocks: Sequence[int], parts: int) -> bool:
    """Whether every one of ``blocks`` along a factor of ``size`` divides by ``parts``."""
    if len(blocks) == 1:
        return divides(size, parts)
    if not isinstance(size, int):
        return False
    total = sum(blocks)
    return size % total == 0 and all((size // total * block) % parts == 0 for block in blocks)
