"""What a value is along each mesh axis.

``Shard(dim)``, ``Replicate()`` and ``Partial(op)`` are PyTorch's own. Two internal kinds refine them:

- ``BlockShard(dim, blocks)``: the dim is a row of blocks and *each block* is cut alike. A packed QKV weight
  ``[3 * D, i]`` under ``BlockShard(0, (1, 1, 1))`` leaves every rank with its slice of q, of k and of v. The
  numbers are relative block sizes; ``(1,)`` is a plain ``Shard``. Where sizes do not divide, ``shares`` says how
  much each rank holds: 5 rows on 4 ranks, as ``torch.chunk`` gives them, are ``shares=(2, 2, 1, 0)``. Rows that a
  router sorted into ``groups`` go to the ranks with their groups; how many that are is known when the program runs.
- ``Varying()``: equal on all ranks like ``Replicate``, but its readers compute different things on every rank,
  so its *gradient* is a partial sum (Megatron's *f*, JAX's ``pvary``). Only conversions make it.

A value's ``Placements`` is a tuple, one placement a mesh axis, outermost axis first. Where two axes cut one dim,
the outer axis cuts first, and the inner one cuts what it left.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

__all__ = ["BlockShard", "Partial", "Placement", "Placements", "Replicate", "Shard", "Varying"]

Placements: TypeAlias = tuple[Placement, ...]


class Groups(NamedTuple):
    """Rows that lie in groups, one behind the other, as tokens sorted by expert do.

    Attributes:
        ends: the name of the value of the graph that says where each group ends.
        rows: how many rows there are in all.
    """

    ends: str
    rows: int


class Cut(NamedTuple):
    """How a dim is cut along one axis.

    Attributes:
        blocks: the relative sizes of the blocks that are each cut alike.
        shares: the relative sizes of what the ranks hold, in rank order; empty where all hold the same.
        groups: where it is the groups of rows that are dealt out so, which groups: a rank holds the rows of its own.
    """

    blocks: tuple[int, ...] = (1,)
    shares: tuple[int, ...] = ()
    groups: Groups | None = None

    def pieces(self, size: int) -> int:
        """Into how many equal pieces each block falls, over an axis of ``size`` ranks: a rank takes some of them."""
        return sum(self.shares) or size

    def share(self, size: int, position: int) -> int:
        """How many of these pieces the rank at ``position`` takes."""
        return self.shares[position] if self.shares else 1


PLAIN = Cut()


class BlockShard(Shard):
    """``Shard(dim)`` of a dim made of blocks that are each cut alike, or of which the ranks hold different shares.

    >>> BlockShard(0, (2, 1, 1)), BlockShard(0, shares=(2, 2, 1, 0)), BlockShard(0, groups=Groups("ends", 64))
    (Shard(0, blocks=(2, 1, 1)), Shard(0, shares=(2, 2, 1, 0)), Shard(0, groups=%ends))
    """

    cut: Cut

    def __init__(
        self, dim: int, blocks: Sequence[int] = (1,), shares: Sequence[int] = (), groups: Groups | None = None
    ) -> None:
        super().__init__(dim)
        self.cut = Cut(normalize_blocks(blocks), normalize_shares(shares), groups)

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return BlockShard, (self.dim, *self.cut)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shard) and self.dim == other.dim and self.cut == cut_of(other)

    def __hash__(self) -> int:
        return hash(Shard(self.dim)) if self.cut == PLAIN else hash((self.dim, self.cut))

    def __repr__(self) -> str:
        blocks, shares, groups = self.cut
        more = (f", blocks={blocks}" if blocks != (1,) else "") + (f", shares={shares}" if shares else "")
        more += f", groups=%{groups.ends}" if groups else ""
        return f"Shard({self.dim}{more})"

    __str__ = __repr__


class Varying(Replicate):
    """Replicated in the forward pass, a partial sum in the backward pass."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Varying)

    def __hash__(self) -> int:
        return hash("Varying")

    def __repr__(self) -> str:
        return "Varying()"

    __str__ = __repr__


REPLICATE = Replicate()
PARTIAL = Partial()
VARYING = Varying()


def normalize_blocks(blocks: Sequence[int]) -> tuple[int, ...]:
    """Relative block sizes in lowest terms.

    >>> normalize_blocks([64, 32, 32]), normalize_blocks([48])
    ((2, 1, 1), (1,))
    """
    divisor = math.gcd(*blocks) or 1
    return tuple(block // divisor for block in blocks)


def normalize_shares(shares: Sequence[int]) -> tuple[int, ...]:
    """Relative shares in lowest terms; empty where all are equal.

    >>> normalize_shares([64, 64, 64, 0]), normalize_shares([48, 48])
    ((1, 1, 1, 0), ())
    """
    if len(set(shares)) <= 1:
        return ()
    divisor = math.gcd(*shares)
    return tuple(share // divisor for share in shares)


def chunk_shares(count: int, size: int) -> tuple[int, ...]:
    """The shares that ``torch.chunk`` gives ``size`` ranks of ``count`` units; the last ones may get nothing.

    >>> chunk_shares(10, 4), chunk_shares(6, 4), chunk_shares(8, 4)
    ((3, 3, 3, 1), (1, 1, 1, 0), ())
    """
    most = -(-count // size)
    return normalize_shares([max(0, min(most, count - rank * most)) for rank in range(size)])


def shard(dim: int, blocks: Sequence[int] = (1,), shares: Sequence[int] = (), groups: Groups | None = None) -> Shard:
    """A ``Shard``, or a ``BlockShard`` of several blocks, of shares that differ, or of groups."""
    plain = len(blocks) == 1 and not shares and groups is None
    return Shard(dim) if plain else BlockShard(dim, blocks, shares, groups)


def cut_of(placement: Placement) -> Cut:
    """The blocks and shares of a shard; ``Cut()`` of a plain one."""
    return placement.cut if type(placement) is BlockShard else PLAIN


def is_grouped(placement: Placement | None) -> bool:
    """Whether rows go to the ranks with their groups: how many each has is known when the program runs."""
    return type(placement) is BlockShard and placement.cut.groups is not None


def blocks_of(placement: Placement) -> tuple[int, ...]:
    """The relative sizes of the blocks that a shard cuts alike; ``(1,)`` for a plain one."""
    return cut_of(placement).blocks


def cut_within(placement: Shard, inner: Iterable[tuple[Placement, int]]) -> Cut | None:
    """How a shard cuts what the axes inside of its own leave each rank of the dim; None where it cuts across them.

    An outer axis cuts first. But where its blocks are so fine that every part of the inner axes is made of whole
    blocks, the two cuts do not disturb each other: the outer one can be undone on the inner one's parts alone.

    Args:
        placement: the shard.
        inner: the placements on the axes inside, with these axes' sizes.

    >>> cut_within(BlockShard(0, (1, 1, 1, 1)), [(Shard(0), 2)]), cut_within(Shard(0), [(Shard(0), 2)])
    (Cut(blocks=(1, 1), shares=(), groups=None), None)
    """
    blocks, shares, groups = cut_of(placement)
    for other, size in inner:
        if not (is_shard(other) and other.dim == placement.dim):
            continue
        beside = cut_of(other)
        if (
            shares
            or groups
            or beside.shares
            or beside.groups
            or len(set(blocks)) > 1
            or len(blocks) % (sum(beside.blocks) * size)
        ):
            return None
        blocks = (1,) * (len(blocks) // size)
    return Cut(blocks, shares, groups)


@cache
def _is_a(kind: type, base: type) -> bool:
    return issubclass(kind, base)  # once a type: the metaclass of torch's placements makes isinstance slow


def is_shard(placement: Placement | None) -> TypeGuard[Shard]:
    """Whether the placement cuts a dim."""
    return _is_a(type(placement), Shard)  # type: ignore[arg-type]


def is_partial(placement: Placement | None) -> TypeGuard[Partial]:
    """Whether the ranks hold summands."""
    return _is_a(type(placement), Partial)  # type: ignore[arg-type]


def same(a: Placement, b: Placement) -> bool:
    """Whether two placements are one (PyTorch's ``Shard`` does not see blocks)."""
    if a is b:
        return True
    if is_shard(a) and is_shard(b):
        return a.dim == b.dim and cut_of(a) == cut_of(b)
    return type(a) is type(b) and a == b


def placement_key(placement: Placement) -> object:
    """What tells a placement from all others (to PyTorch's, a ``Shard`` of blocks is one without).

    >>> placement_key(Shard(0)) == placement_key(BlockShard(0)), placement_key(Shard(0)) == placement_key(Shard(1))
    (True, False)
    >>> placement_key(Replicate()) == placement_key(Varying())
    False
    """
    if is_shard(placement):
        cut = cut_of(placement)
        return placement.dim if cut is PLAIN or cut == PLAIN else (placement.dim, cut)
    return (Partial, placement.reduce_op) if is_partial(placement) else type(placement)


def describe(placement: Placement) -> str:
    """The placement as users write it.

    >>> describe(Shard(1)), describe(Replicate()), describe(Partial())
    ('Shard(1)', 'Replicate', 'Partial(sum)')
    """
    if isinstance(placement, BlockShard):
        return repr(placement)
    if isinstance(placement, Shard):
        return f"Shard({placement.dim})"
    if isinstance(placement, Varying):
        return "Varying"
    if isinstance(placement, Partial):
        return f"Partial({placement.reduce_op})"
    return "Replicate"


def describe_all(placements: Placements, names: Sequence[str]) -> str:
    """A value's placements, one an axis; axes on which it is replicated are left out.

    >>> describe_all((Replicate(), Shard(1)), ("dp", "tp"))
    'tp: Shard(1)'
    """
    parts = [f"{n}: {describe(p)}" for n, p in zip(names, placements, strict=True) if type(p) is not Replicate]
    return ", ".join(parts) or "Replicate"


def local_size(size: Any, placement: Placement, count: int, position: int) -> Any:
    """What the rank at ``position`` of ``count`` holds of a dim of ``size`` that ``placement`` cuts.

    Of rows in groups it is what the rank would hold if all groups were equal.
    """
    cut = cut_of(placement)
    return size * cut.share(count, position) // cut.pieces(count)


def local_shape(
    shape: Sequence[Any], placements: Placements, sizes: Sequence[int], at: Sequence[int] = ()
) -> tuple[Any, ...]:
    """The shape that one rank holds of a tensor of ``shape``: ``[4, 10] -> [4, 5]``.

    Args:
        shape: of the whole tensor.
        placements: one an axis.
        sizes: of the axes.
        at: the rank's coordinate; that of the first rank, which holds the most, where it is not given.

    >>> local_shape((4, 10), (Replicate(), Shard(1)), (2, 2))
    (4, 5)
    >>> local_shape((5, 10), (BlockShard(0, shares=(3, 2)),), (2,), (1,))
    (2, 10)
    """
    out = list(shape)
    for axis, (placement, size) in enumerate(zip(placements, sizes, strict=True)):
        if is_shard(placement):
            dim = placement.dim
            out[dim] = local_size(out[dim], placement, size, at[axis] if at else 0)
    return tuple(out)


def lengths_of(size: int, placement: Placement, count: int) -> tuple[int, ...]:
    """What each of ``count`` ranks holds of a dim of ``size``; empty where all hold the same.

    >>> lengths_of(20, BlockShard(0, shares=(2, 2, 1, 0)), 4)
    (8, 8, 4, 0)
    """
    if not cut_of(placement).shares:
        return ()
    return tuple(local_size(size, placement, count, position) for position in range(count))


def is_uneven(placements: Sequence[Placement]) -> bool:
    """Whether the ranks hold parts of different sizes."""
    return any(type(p) is BlockShard and p.cut.shares for p in placements)


def cut(tensor: torch.Tensor, placement: Placement, size: int, position: int) -> torch.Tensor:
    """The part of ``tensor`` that the rank at ``position`` of an axis of ``size`` ranks holds.

    >>> cut(torch.arange(6), BlockShard(0, (1, 1, 1)), 2, 0).tolist()
    [0, 2, 4]
    >>> [cut(torch.arange(5), BlockShard(0, shares=(3, 2)), 2, i).tolist() for i in (0, 1)]
    [[0, 1, 2], [3, 4]]
    """
    if not is_shard(placement):
        return tensor
    dim, (blocks, shares, groups) = placement.dim, cut_of(placement)
    assert groups is None, f"where {placement} cuts is known when the program runs"
    pieces = sum(shares) or size
    before, share = (sum(shares[:position]), shares[position]) if shares else (position, 1)
    unit = tensor.shape[dim] // sum(blocks)
    assert unit * sum(blocks) == tensor.shape[dim], f"{tensor.shape} has not the blocks of {placement}"
    assert all(block * unit % pieces == 0 for block in blocks), f"{tensor.shape} does not divide as {placement}"
    parts, start = [], 0
    for block in blocks:
        piece = block * unit // pieces
        parts.append(tensor.narrow(dim, start + before * piece, share * piece))
        start += block * unit
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def join(parts: Sequence[torch.Tensor], placement: Placement) -> torch.Tensor:
    """The whole tensor from the parts that the ranks of one axis hold: the inverse of ``cut``.

    >>> join([torch.tensor([0, 2, 4]), torch.tensor([1, 3, 5])], BlockShard(0, (1, 1, 1))).tolist()
    [0, 1, 2, 3, 4, 5]
    """
    if isinstance(placement, Partial):
        assert placement.reduce_op == "sum", placement
        return torch.stack(tuple(parts)).sum(0)
    if not is_shard(placement):
        return parts[0]
    dim, blocks = placement.dim, blocks_of(placement)
    pieces, before = [], 0
    for block in blocks:
        for part in parts:
            unit = part.shape[dim] // sum(blocks)
            pieces.append(part.narrow(dim, before * unit, block * unit))
        before += block
    return torch.cat(pieces, dim)


def cut_all(tensor: torch.Tensor, placements: Placements, sizes: Sequence[int], at: Sequence[int]) -> torch.Tensor:
    """The part of ``tensor`` that the rank at the coordinate ``at`` holds; the outer axes cut first."""
    for placement, size, position in zip(placements, sizes, at, strict=True):
        tensor = cut(tensor, placement, size, position)
    return tensor


def join_all(parts: Sequence[torch.Tensor], placements: Placements, sizes: Sequence[int]) -> torch.Tensor:
    """The whole tensor from the parts of all ranks, in rank order: the inner axes are joined first."""
    for placement, size in zip(reversed(placements), reversed(sizes), strict=True):
        parts = [join(parts[i : i + size], placement) for i in range(0, len(parts), size)]
    return parts[0]
