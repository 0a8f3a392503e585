"""Whole tensors from the parts of the ranks: on every rank, or streamed to rank 0 alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

from fxshard.mesh import Mesh
from fxshard.placement import Placements, cut_of, is_shard
from fxshard.ranks.faults import guarded
from fxshard.runtime.collectives import Axis, all_gather
from fxshard.weights.layout import Layout


def gather_whole(part: torch.Tensor, placed: Placements, mesh: Mesh, axes: Mapping[str, Axis]) -> torch.Tensor:
    """The whole tensor from this rank's part; collective."""
    for placement, name in zip(reversed(placed), reversed(mesh.names), strict=True):
        if is_shard(placement):
            axis, dim = axes[name], placement.dim
            lengths: tuple[int, ...] = ()
            if cut_of(placement).shares:
                length = torch.tensor([part.shape[dim]], device=part.device)
                lengths = tuple(axis.group.run("all_gather", "own_part", length).tolist())
            part = all_gather(part, axis, False, dim, cut_of(placement).blocks, lengths)
    return part


def stream_whole(part: torch.Tensor, layout: Layout) -> torch.Tensor | None:
    """The whole tensor, on rank 0 and its CPU; None on the other ranks, which send their part and hold no more.

    Args:
        part: what this rank holds.
        layout: how it lies; the ranks of the mesh are those of the default process group, and every one must call this.
    """
    every = [layout.of(rank) for rank in range(layout.mesh.world_size)]
    holders = [each for each in every if _is_first(each)]  # of equal parts, one rank's will do
    if layout.rank != 0:
        if layout in holders and part.numel():
            with guarded(None, "send", part):
                dist.send(part.detach().contiguous(), 0)
        return None
    whole = torch.empty(layout.shape, dtype=part.dtype)
    for holder in holders:
        received = part.detach()
        if holder.rank != 0:
            received = part.new_empty(holder.local_shape)
            if received.numel():
                with guarded(None, "recv", received):
                    dist.recv(received, holder.rank)
        fill_whole(whole, received, holder)
    return whole


def fill_whole(whole: torch.Tensor, part: torch.Tensor, layout: Layout) -> None:
    """Copies a rank's part to where it lies in the whole."""
    for box in layout.boxes:
        whole[box.of_whole].copy_(part[box.of_part])


def _is_first(layout: Layout) -> bool:
    """Whether no rank before this one holds the same part."""
    at = layout.mesh.coordinate(layout.rank)
    return all(is_shard(p) or position == 0 for p, position in zip(layout.placements, at, strict=True))
