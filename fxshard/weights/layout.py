"""Where a rank's part lies in the whole tensor: as boxes, and as PyTorch's ``DTensor`` would say it.

A part is what ``placement.cut_all`` cuts. Along a dim it is a row of *runs* of the whole: one for a plain shard, one a
block of a packed weight. A *box* takes one run of each dim:

    [6] under BlockShard(0, (1, 1, 1)) on 2 ranks: rank 1 has the runs (1, 1), (3, 1), (5, 1), and as many boxes.

The boxes of all ranks that hold different parts fill the whole, and none overlap. This is what checkpoints are made of.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch.distributed.tensor import Replicate, Shard

from fxshard.mesh import Mesh
from fxshard.placement import PLAIN, Placement, Placements, cut_of, describe_all, is_shard, local_shape

Runs = tuple[tuple[int, int], ...]


class Box(NamedTuple):
    """A box of a tensor, and where it lies in a rank's part.

    Attributes:
        start: its first index in the whole, a number a dim.
        sizes: its sizes.
        local: its first index in the part.
    """

    start: tuple[int, ...]
    sizes: tuple[int, ...]
    local: tuple[int, ...]

    @property
    def of_whole(self) -> tuple[slice, ...]:
        """What indexes the whole."""
        return tuple(slice(a, a + n) for a, n in zip(self.start, self.sizes, strict=True))

    @property
    def of_part(self) -> tuple[slice, ...]:
        """What indexes the part."""
        return tuple(slice(a, a + n) for a, n in zip(self.local, self.sizes, strict=True))


@dataclass(frozen=True)
class Layout:
    """How a tensor lies on a mesh, as one rank sees it.

    Attributes:
        shape: of the whole tensor.
        placements: one an axis.
        mesh: the mesh.
        rank: the rank.

    >>> layout = Layout((8, 4), (Shard(0),), Mesh(("tp",), (2,)), 1)
    >>> layout.local_shape, layout.boxes
    ((4, 4), (Box(start=(4, 0), sizes=(4, 4), local=(0, 0)),))
    >>> print(layout)
    rank 1 of {tp: 2}, [8, 4] under tp: Shard(0)
    """

    shape: tuple[int, ...]
    placements: Placements
    mesh: Mesh
    rank: int = 0

    @property
    def boxes(self) -> tuple[Box, ...]:
        """What this rank holds."""
        return boxes_of(self.shape, self.placements, self.mesh.sizes, self.mesh.coordinate(self.rank))

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of this rank's part."""
        return local_shape(self.shape, self.placements, self.mesh.sizes, self.mesh.coordinate(self.rank))

    @property
    def is_cut(self) -> bool:
        """Whether ranks hold different parts."""
        return any(is_shard(p) and n > 1 for p, n in zip(self.placements, self.mesh.sizes, strict=True))

    def of(self, rank: int) -> Layout:
        """The same tensor, as another rank sees it."""
        return Layout(self.shape, self.placements, self.mesh, rank)

    def __str__(self) -> str:
        where = describe_all(self.placements, self.mesh.names)
        return f"rank {self.rank} of {self.mesh}, {list(self.shape)} under {where}"


_PART = "fxshard_layout"


def mark_part(parameter: torch.Tensor, layout: Layout) -> None:
    """Notes on a parameter of which tensor it is a part."""
    setattr(parameter, _PART, layout)


def layout_of(parameter: torch.Tensor) -> Layout | None:
    """Of which whole tensor a program's parameter is this rank's part, and how that lies; None of any other tensor.

    >>> import fxshard
    >>> x = torch.randn(2, 4)
    >>> program = fxshard.parallelize(torch.nn.Linear(4, 8), {"weight": fxshard.Shard(0)}, (x,), mesh={"tp": 2})
    >>> print(program.weight.shape, "of", fxshard.layout_of(program.weight))
    torch.Size([4, 4]) of rank 0 of {tp: 2}, [8, 4] under tp: Shard(0)
    >>> fxshard.layout_of(torch.nn.Linear(4, 8).weight)
    """
    found: Layout | None = getattr(parameter, _PART, None)
    return found


@lru_cache(maxsize=4096)
def boxes_of(
    shape: tuple[int, ...], placements: Placements, sizes: tuple[int, ...], at: tuple[int, ...]
) -> tuple[Box, ...]:
    """The boxes that the rank at the coordinate ``at`` holds; none where its part is empty.

    Args:
        shape: of the whole tensor.
        placements: one an axis.
        sizes: of the axes.
        at: the rank's coordinate.

    >>> from fxshard.placement import BlockShard, Shard
    >>> boxes_of((6, 4), (BlockShard(0, (2, 1)), Shard(1)), (2, 2), (1, 0))
    (Box(start=(2, 0), sizes=(2, 2), local=(0, 0)), Box(start=(5, 0), sizes=(1, 2), local=(2, 0)))
    """
    dims = []
    for dim, size in enumerate(shape):
        runs: Runs = ((0, size),)
        for placement, count, position in zip(placements, sizes, at, strict=True):
            if is_shard(placement) and placement.dim % len(shape) == dim:
                runs = _cut(runs, placement, count, position)
        before = itertools.accumulate((length for _, length in runs), initial=0)
        dims.append([(start, length, local) for (start, length), local in zip(runs, before, strict=False)])
    return tuple(
        Box(*(tuple(run[field] for run in runs) for field in range(3)))
        for runs in itertools.product(*dims)
        if all(length for _, length, _ in runs)
    )


def _cut(runs: Runs, placement: Placement, count: int, position: int) -> Runs:
    """What ``placement.cut`` leaves of a row of runs."""
    length = sum(n for _, n in runs)
    blocks, shares, _ = cut_of(placement)
    pieces = sum(shares) or count
    before, share = (sum(shares[:position]), shares[position]) if shares else (position, 1)
    out: list[tuple[int, int]] = []
    first = 0
    for block in blocks:
        size = block * (length // sum(blocks))
        piece = size // pieces
        out += _between(runs, first + before * piece, share * piece)
        first += size
    return _merged(out)


def _between(runs: Runs, first: int, length: int) -> list[tuple[int, int]]:
    """The runs of ``length`` indices of a part, from its ``first`` one on."""
    out, local = [], 0
    for start, n in runs:
        low, high = max(first, local), min(first + length, local + n)
        if low < high:
            out.append((start + low - local, high - low))
        local += n
    return out


def _merged(runs: Sequence[tuple[int, int]]) -> Runs:
    out: list[tuple[int, int]] = []
    for start, length in runs:
        if out and out[-1][0] + out[-1][1] == start:
            out[-1] = (out[-1][0], out[-1][1] + length)
        else:
            out.append((start, length))
    return tuple(out)


@lru_cache(maxsize=4096)
def dtensor_placements(
    shape: tuple[int, ...], placements: Placements, sizes: tuple[int, ...]
) -> tuple[Placement, ...] | None:
    """The plain placements with which a ``DTensor`` means the same parts; None where none do.

    A ``DTensor`` cuts as ``torch.chunk`` does.

    >>> from fxshard.placement import BlockShard
    >>> dtensor_placements((5, 8), (BlockShard(0, shares=(2, 2, 1, 0)),), (4,))
    (Shard(dim=0),)
    >>> dtensor_placements((8, 8), (BlockShard(0, shares=(3, 1)),), (2,))
    """
    plain: tuple[Placement, ...] = tuple(Shard(p.dim % len(shape)) if is_shard(p) else Replicate() for p in placements)
    if all(cut_of(p) == PLAIN for p in placements):
        return plain  # what fxshard cuts without shares divides
    for dim, size in enumerate(shape):
        axes = [i for i, p in enumerate(plain) if is_shard(p) and p.dim == dim]
        for at in itertools.product(*(range(sizes[i]) for i in axes)):
            runs: Runs = ((0, size),)
            start, length = 0, size
            for axis, position in zip(axes, at, strict=True):
                runs = _cut(runs, placements[axis], sizes[axis], position)
                most = -(-length // sizes[axis])
                low = min(length, position * most)
                start, length = start + low, min(most, length - low)
            if runs != (((start, length),) if length else ()):
                return None
    return plain


def fill(part: torch.Tensor, boxes: Sequence[Box], read: Callable[[Box], torch.Tensor]) -> None:
    """Copies a part together, box by box.

    >>> part, whole = torch.zeros(2), torch.arange(4.0)
    >>> fill(part, [Box((0,), (1,), (0,)), Box((3,), (1,), (1,))], lambda box: whole[box.of_whole])
    >>> part
    tensor([0., 3.])
    """
    with torch.no_grad():
        for box in boxes:
            part[box.of_part].copy_(read(box))
