"""What a value is along each mesh axis.

``Shard(dim)``, ``Replicate()`` and ``Partial(op)`` are PyTorch's own. Two internal kinds refine them:

- ``BlockShard(dim, blocks)``: the dim is a row of blocks and *each block* is cut alike. A packed QKV weight
  ``[3 * D, i]`` under ``BlockShard(0, (1, 1, 1))`` leaves every rank with its slice of q, of k and of v. The
  numbers are relative block sizes; ``(1,)`` is a plain ``Shard``.
- ``Varying()``: equal on all ranks like ``Replicate``, but its readers compute different things on every rank,
  so its *gradient* is a partial sum (Megatron's *f*, JAX's ``pvary``). Only conversions make it.

A value's ``Placements`` is a tuple, one placement a mesh axis, outermost axis first. Where two axes cut one dim,
the outer axis cuts first, and the inner one cuts what it left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, TypeAlias

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

__all__ = ["BlockShard", "Partial", "Placement", "Placements", "Replicate", "Shard", "Varying"]

Placements: TypeAlias = tuple[Placement, ...]


class BlockShard(Shard):
    """``Shard(dim)`` of a dim made of blocks that are each cut alike.

    >>> BlockShard(0, (2, 1, 1))
    Shard(0, blocks=(2, 1, 1))
    """

    blocks: tuple[int, ...]

    def __init__(self, dim: int, blocks: tuple[int, ...]) -> None:
        super().__init__(dim)
        self.blocks = normalize_blocks(blocks)

    def __reduce__(self) -> tuple[type, tuple[int, tuple[int, ...]]]:
        return BlockShard, (self.dim, self.blocks)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shard) and self.dim == other.dim and self.blocks == blocks_of(other)

    def __hash__(self) -> int:
        return hash(Shard(self.dim)) if self.blocks == (1,) else hash((self.dim, self.blocks))

    def __repr__(self) -> str:
        return f"Shard({self.dim}, blocks={self.blocks})"

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


def shard(dim: int, blocks: Sequence[int] = (1,)) -> Shard:
    """A ``Shard``, or a ``BlockShard`` where there is more than one block."""
    return Shard(dim) if len(blocks) == 1 else BlockShard(dim, normalize_blocks(blocks))


def blocks_of(placement: Placement) -> tuple[int, ...]:
    """The relative sizes of the blocks that a shard cuts alike; ``(1,)`` for a plain one."""
    return placement.blocks if type(placement) is BlockShard else (1,)


@cache
def _is_a(kind: type, base: type) -> bool:
    return issubclass(kind, base)  # once a type: the metaclass of torch's placements makes isinstance slow


def is_shard(placement: Placement | None) -> bool:
    """Whether the placement cuts a dim."""
    return _is_a(type(placement), Shard)  # type: ignore[arg-type]


def is_partial(placement: Placement | None) -> bool:
    """Whether the ranks hold summands."""
    return _is_a(type(placement), Partial)  # type: ignore[arg-type]


def same(a: Placement, b: Placement) -> bool:
    """Whether two placements are one (PyTorch's ``Shard`` does not see blocks)."""
    if a is b:
        return True
    if is_shard(a) and is_shard(b):
        return a.dim == b.dim and blocks_of(a) == blocks_of(b)  # type: ignore[attr-defined]
    return type(a) is type(b) and a == b


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


def local_shape(shape: Sequence[Any], placements: Placements, sizes: Sequence[int]) -> tuple[Any, ...]:
    """The shape that one rank holds of a tensor of ``shape``: ``[4, 10] -> [4, 5]``.

    >>> local_shape((4, 10), (Replicate(), Shard(1)), (2, 2))
    (4, 5)
    """
    out = list(shape)
    for placement, size in zip(placements, sizes, strict=True):
        if isinstance(placement, Shard):
            out[placement.dim] = out[placement.dim] // size
    return tuple(out)


def cut(tensor: torch.Tensor, placement: Placement, size: int, position: int) -> torch.Tensor:
    """The part of ``tensor`` that the rank at ``position`` of an axis of ``size`` ranks holds.

    >>> cut(torch.arange(6), BlockShard(0, (1, 1, 1)), 2, 0).tolist()
    [0, 2, 4]
    """
    if not isinstance(placement, Shard):
        return tensor
    dim, blocks = placement.dim, blocks_of(placement)
    unit = tensor.shape[dim] // sum(blocks)
    assert unit * sum(blocks) == tensor.shape[dim], f"{tensor.shape} has not the blocks of {placement}"
    assert all(block * unit % size == 0 for block in blocks), f"{tensor.shape} does not divide as {placement} by {size}"
    parts, start = [], 0
    for block in blocks:
        length = block * unit // size
        parts.append(tensor.narrow(dim, start + position * length, length))
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
    if not isinstance(placement, Shard):
        return parts[0]
    dim, blocks = placement.dim, blocks_of(placement)
    unit = parts[0].shape[dim] // sum(blocks)
    pieces, start = [], 0
    for block in blocks:
        pieces += [part.narrow(dim, start, block * unit) for part in parts]
        start += block * unit
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
