"""Boxes against what ``cut_all`` cuts, and against where PyTorch says that a ``DTensor``'s part lies."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

from fxshard.mesh import Mesh
from fxshard.placement import BlockShard, Placement, Replicate, Shard, chunk_shares, cut_all
from fxshard.weights.layout import Layout, boxes_of, dtensor_placements

SIZES = st.sampled_from([1, 2, 3, 4, 5, 6, 8, 12, 24, 36])


@st.composite
def layouts(draw: Any) -> tuple[tuple[int, ...], tuple[Placement, ...], tuple[int, ...]]:
    shape = tuple(draw(st.lists(SIZES, min_size=1, max_size=2)))
    sizes = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    return shape, tuple(draw(placements(len(shape), size)) for size in sizes), sizes


@st.composite
def placements(draw: Any, ndim: int, size: int) -> Placement:
    dim = draw(st.integers(-ndim, ndim - 1))
    blocks = draw(st.sampled_from([(1,), (1, 1), (2, 1, 1)]))
    shares = draw(st.sampled_from([(), chunk_shares(5, size), chunk_shares(6, size), tuple(range(size))]))
    return draw(st.sampled_from([Replicate(), Shard(dim), BlockShard(dim, blocks, shares if size > 1 else ())]))


def parts_of(shape: Any, placed: Any, sizes: Any) -> dict[tuple[int, ...], torch.Tensor] | None:
    whole = torch.arange(math.prod(shape)).reshape(shape)
    try:
        return {at: cut_all(whole, placed, sizes, at) for at in itertools.product(*map(range, sizes))}
    except AssertionError:  # it does not divide
        return None


@given(layouts())
@example(((16,), (BlockShard(0, (2, 1, 1)), Shard(0)), (2, 2)))
@example(((6, 6), (BlockShard(-1, (1, 1)), BlockShard(0, shares=(2, 1))), (3, 2)))
def test_boxes_are_what_is_cut(case: Any) -> None:
    shape, placed, sizes = case
    parts = parts_of(shape, placed, sizes)
    if parts is None:
        return
    whole = torch.arange(math.prod(shape)).reshape(shape)
    for at, part in parts.items():
        filled = torch.full_like(part, -1)
        for box in boxes_of(shape, placed, sizes, at):
            filled[box.of_part] = whole[box.of_whole]
        assert torch.equal(filled, part)
    mesh = Mesh(tuple("abc"[: len(sizes)]), sizes)
    for rank in range(mesh.world_size):
        layout = Layout(shape, placed, mesh, rank)
        assert layout.local_shape == parts[mesh.coordinate(rank)].shape
        others = [part for at, part in parts.items() if part.shape != parts[mesh.coordinate(0)].shape]
        assert layout.is_cut or not others


@given(layouts())
@example(((6,), (BlockShard(0, shares=(1, 1, 1, 0)),), (4,)))
@example(((5, 3), (BlockShard(0, shares=(3, 2)), Replicate()), (2, 2)))
def test_a_dtensor_means_the_same_parts(case: Any) -> None:
    shape, placed, sizes = case
    parts = parts_of(shape, placed, sizes)
    plain = dtensor_placements(shape, placed, sizes) if parts is not None else None
    if plain is None:
        return
    assert all(type(p) in (Shard, Replicate) for p in plain)
    for at in itertools.product(*map(range, sizes)):
        local, offset = _compute_local_shape_and_global_offset(shape, sizes, lambda i, at=at: at[i], plain)
        boxes = boxes_of(shape, placed, sizes, at)
        expected = [] if 0 in local else [(tuple(offset), tuple(local))]
        assert [(box.start, box.sizes) for box in boxes] == expected


def test_which_parts_are_dtensors() -> None:
    assert dtensor_placements((10,), (BlockShard(0, shares=(3, 3, 3, 1)),), (4,)) == (Shard(0),)
    assert dtensor_placements((20,), (BlockShard(0, shares=(3, 3, 3, 1)),), (4,)) is None, "chunk gives 5, 5, 5, 5"
    assert dtensor_placements((8,), (BlockShard(0, (1, 1)),), (1,)) == (Shard(0),)
    assert dtensor_placements((8,), (BlockShard(0, (1, 1)),), (2,)) is None
    assert dtensor_placements((8,), (BlockShard(0, (1, 1)), Shard(0)), (2, 2)) is None
    assert dtensor_placements((8, 4), (Shard(-1), Shard(-1)), (2, 2)) == (Shard(1), Shard(1))
