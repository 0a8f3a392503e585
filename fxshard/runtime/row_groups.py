"""Rows that lie in groups, as tokens sorted by expert: each rank holds the rows of its own groups.

    ends        = [2, 2, 7, 9]             where each of 4 groups ends, equal on every rank
    group_rows  -> (2, 7)                  of two ranks, the first holds 2 rows and the second 7
    own_ends    -> [2, 2] and [5, 7]       where a rank's own groups end, among its own rows

``group_rows`` reads the ends to the host: once for all the values that lie in these groups.
"""

from __future__ import annotations

import torch

from fxshard.runtime.collectives import FAR, Axis, Lengths, nothing


def group_rows(ends: torch.Tensor, axis: Axis, rows: int, lengths: Lengths = ()) -> Lengths:
    """How many rows each rank of the axis holds.

    Args:
        ends: where each group ends.
        axis: the mesh axis that deals out the groups.
        rows: how many there are in all; those behind the last group are the last rank's.
        lengths: how many groups each rank has; empty where all have the same.
    """
    counts = lengths or (ends.shape[0] // axis.size,) * axis.size
    borders = [0, *ends.tolist()]
    found, group = [], 0
    for count in counts:
        found.append(borders[group + count] - borders[group])
        group += count
    return (*found[:-1], rows - sum(found[:-1]))


def own_ends(ends: torch.Tensor, axis: Axis, lengths: Lengths = ()) -> torch.Tensor:
    """Where this rank's groups end, counted from its first row; the arguments are those of ``group_rows``."""
    counts = lengths or (ends.shape[0] // axis.size,) * axis.size
    first = sum(counts[: axis.index])
    own = ends[first : first + counts[axis.index]]
    return own - ends[first - 1] if first else own


def pick(
    x: torch.Tensor, dim: int, positions: torch.Tensor, axis: Axis, lengths: Lengths = (), wraps: bool = True
) -> torch.Tensor:
    """``x`` at ``positions`` of a dim of which this rank holds a part; zeros at those that other ranks hold.

    Args:
        x: this rank's part.
        dim: the dim that is split.
        positions: in the whole of the dim.
        axis: the mesh axis.
        lengths: what each rank holds; empty where all hold the same.
        wraps: whether negative positions count from the end; else they are out of range, and raise.
    """
    size = sum(lengths) if lengths else x.shape[dim] * axis.size
    shape = (*x.shape[:dim], *positions.shape, *x.shape[dim + 1 :])
    if x.shape[dim] == 0:
        return nothing([x], shape, x.dtype)
    start = sum(lengths[: axis.index]) if lengths else axis.index * (size // axis.size)
    local = (torch.where(positions < 0, positions + size, positions) if wraps else positions) - start
    least = 0 if start else -FAR  # what is out of the whole range is the first or the last rank's, which raises
    bound = x.shape[dim] if start + x.shape[dim] < size else FAR
    foreign = (local < least) | (local >= bound)
    picked = x.index_select(dim, local.masked_fill(foreign, 0).reshape(-1)).view(shape)
    return picked.masked_fill(foreign.view(*[1] * dim, *positions.shape, *[1] * (x.dim() - dim - 1)), 0)
