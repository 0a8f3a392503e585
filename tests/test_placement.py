"""Placements: cut and join are inverse, shapes agree with cuts, kinds are told apart, and their text."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxshard.placement import (
    PARTIAL,
    REPLICATE,
    VARYING,
    BlockShard,
    Partial,
    Placement,
    Placements,
    Replicate,
    Shard,
    Varying,
    blocks_of,
    cut,
    describe,
    describe_all,
    is_partial,
    is_shard,
    join,
    local_shape,
    normalize_blocks,
    same,
    shard,
)

blocks = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)
ranks = st.integers(1, 4)

EACH_KIND: list[Placement] = [
    Shard(0),
    Shard(1),
    BlockShard(0, (1, 1)),
    BlockShard(1, (1, 1)),
    BlockShard(0, (2, 1, 1)),
    Replicate(),
    Varying(),
    Partial(),
    Partial("avg"),
    Partial("max"),
]


@st.composite
def cuts(draw: st.DrawFn) -> tuple[torch.Tensor, Shard, int]:
    """A tensor, a shard of one of its dims, and an axis size that divides each block."""
    size = draw(ranks)
    shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    dim = draw(st.integers(0, len(shape) - 1))
    placement = shard(dim, draw(blocks))
    shape[dim] *= sum(blocks_of(placement)) * size
    return torch.arange(math.prod(shape)).reshape(shape), placement, size


@given(cuts())
def test_join_undoes_cut(case: tuple[torch.Tensor, Shard, int]) -> None:
    tensor, placement, size = case
    parts = [cut(tensor, placement, size, position) for position in range(size)]
    assert torch.equal(join(parts, placement), tensor)


@given(cuts())
def test_a_cut_has_the_local_shape(case: tuple[torch.Tensor, Shard, int]) -> None:
    tensor, placement, size = case
    expected = local_shape(tensor.shape, (placement,), (size,))
    assert all(tuple(cut(tensor, placement, size, position).shape) == expected for position in range(size))


@given(cuts())
def test_a_plain_shard_cuts_as_torch_chunks(case: tuple[torch.Tensor, Shard, int]) -> None:
    tensor, placement, size = case
    chunks = tensor.chunk(size, placement.dim)
    parts = [cut(tensor, Shard(placement.dim), size, position) for position in range(size)]
    assert all(torch.equal(part, chunk) for part, chunk in zip(parts, chunks, strict=True))


@given(cuts())
def test_a_block_shard_cuts_each_block_alike(case: tuple[torch.Tensor, Shard, int]) -> None:
    """Block by block it is a plain shard of each, put together again."""
    tensor, placement, size = case
    dim, relative = placement.dim, blocks_of(placement)
    unit = tensor.shape[dim] // sum(relative)
    whole = tensor.split([block * unit for block in relative], dim)
    for position in range(size):
        expected = torch.cat([block.chunk(size, dim)[position] for block in whole], dim)
        assert torch.equal(cut(tensor, placement, size, position), expected)


@given(cuts())
def test_a_negative_dim_counts_from_the_end(case: tuple[torch.Tensor, Shard, int]) -> None:
    tensor, placement, size = case
    negative = shard(placement.dim - tensor.ndim, blocks_of(placement))
    parts = [cut(tensor, negative, size, position) for position in range(size)]
    assert all(torch.equal(p, cut(tensor, placement, size, i)) for i, p in enumerate(parts))
    assert torch.equal(join(parts, negative), tensor)
    assert local_shape(tensor.shape, (negative,), (size,)) == local_shape(tensor.shape, (placement,), (size,))


@given(ranks, ranks, st.integers(0, 1), st.integers(0, 1))
def test_where_two_axes_cut_the_outer_cuts_first(outer: int, inner: int, outer_dim: int, inner_dim: int) -> None:
    tensor = torch.arange(2 * (outer * inner) ** 2).reshape(outer * inner, -1)
    placements: Placements = (Shard(outer_dim), Shard(inner_dim))
    parts = {}
    for i, j in itertools.product(range(outer), range(inner)):
        parts[i, j] = cut(cut(tensor, placements[0], outer, i), placements[1], inner, j)
        assert tuple(parts[i, j].shape) == local_shape(tensor.shape, placements, (outer, inner))
    rows = [join([parts[i, j] for j in range(inner)], placements[1]) for i in range(outer)]
    assert torch.equal(join(rows, placements[0]), tensor)
    if outer_dim == inner_dim:  # then rank-major order is the order of the chunks
        assert torch.equal(torch.cat(list(parts.values()), outer_dim), tensor)


@pytest.mark.parametrize("placement", [Replicate(), Varying(), Partial()], ids=str)
def test_what_is_not_split_is_cut_into_itself(placement: Placement) -> None:
    tensor = torch.arange(6)
    assert cut(tensor, placement, 2, 1) is tensor
    assert local_shape((6,), (placement,), (2,)) == (6,)


@pytest.mark.parametrize("placement", [Replicate(), Varying()], ids=str)
def test_replicas_join_to_any_of_them(placement: Placement) -> None:
    assert join([torch.arange(3), torch.arange(3)], placement).tolist() == [0, 1, 2]


def test_partials_join_to_their_sum() -> None:
    assert join([torch.tensor([1, 2]), torch.tensor([10, 20])], Partial()).tolist() == [11, 22]


def test_gradients_flow_through_cut_and_join() -> None:
    tensor = torch.arange(8.0, requires_grad=True)
    placement = BlockShard(0, (2, 1, 1))
    parts = [cut(tensor, placement, 2, position) * (position + 1) for position in range(2)]
    join(parts, placement).sum().backward()
    assert tensor.grad is not None
    assert tensor.grad.tolist() == [1, 1, 2, 2, 1, 2, 1, 2]


@given(blocks, st.integers(1, 5))
def test_blocks_are_relative(some: tuple[int, ...], factor: int) -> None:
    lowest = normalize_blocks(some)
    assert math.gcd(*lowest) == 1
    assert normalize_blocks([factor * block for block in some]) == lowest == normalize_blocks(lowest)
    assert all(a * some[0] == b * lowest[0] for a, b in zip(lowest, some, strict=True))


def test_one_block_is_a_plain_shard() -> None:
    assert type(shard(1)) is type(shard(1, (7,))) is Shard
    assert type(shard(1, (7, 7))) is BlockShard
    assert blocks_of(shard(1, (7,))) == (1,)
    assert blocks_of(shard(1, (8, 4, 4))) == (2, 1, 1)
    assert blocks_of(Replicate()) == (1,)


@pytest.mark.parametrize(("a", "b"), list(itertools.product(EACH_KIND, EACH_KIND)))
def test_same_tells_kinds_apart(a: Placement, b: Placement) -> None:
    assert same(a, b) == (describe(a) == describe(b))
    assert same(a, b) == (a == b)
    assert same(a, b) == same(b, a)
    if a == b:
        assert hash(a) == hash(b)


def test_placements_of_one_kind_are_equal_and_hash_alike() -> None:
    assert BlockShard(0, (1, 1)) == shard(0, (5, 5))
    assert len({BlockShard(0, (1, 1)), shard(0, (5, 5)), BlockShard(1, (1, 1)), Shard(0)}) == 3
    assert len({Varying(), VARYING, Replicate(), REPLICATE, Partial(), PARTIAL}) == 3


def test_what_a_kind_is() -> None:
    assert [is_shard(each) for each in EACH_KIND] == [True] * 5 + [False] * 5
    assert [is_partial(each) for each in EACH_KIND] == [False] * 7 + [True] * 3


def test_text() -> None:
    assert [describe(each) for each in EACH_KIND] == [
        "Shard(0)",
        "Shard(1)",
        "Shard(0, blocks=(1, 1))",
        "Shard(1, blocks=(1, 1))",
        "Shard(0, blocks=(2, 1, 1))",
        "Replicate",
        "Varying",
        "Partial(sum)",
        "Partial(avg)",
        "Partial(max)",
    ]
    assert str(BlockShard(0, (1, 1))) == repr(BlockShard(0, (1, 1))) == "Shard(0, blocks=(1, 1))"
    assert str(Varying()) == repr(Varying()) == "Varying()"


def test_text_of_all_axes() -> None:
    names = ("dp", "tp")
    assert describe_all((Replicate(), Replicate()), names) == "Replicate"
    assert describe_all((Shard(0), Replicate()), names) == "dp: Shard(0)"
    assert describe_all((Shard(0), Partial()), names) == "dp: Shard(0), tp: Partial(sum)"
    assert describe_all((Varying(), Shard(1)), names) == "dp: Varying, tp: Shard(1)"


def test_local_shape_of_symbolic_sizes_stays_symbolic() -> None:
    """Dynamic sizes are divided, not evaluated."""
    from torch.export import Dim, export

    class Identity(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    program = export(Identity(), (torch.ones(4, 6),), dynamic_shapes={"x": {0: Dim("batch")}})
    shape = next(iter(program.graph.nodes)).meta["val"].shape
    rows, columns = local_shape(shape, (Shard(0), Shard(1)), (2, 3))
    assert isinstance(rows, torch.SymInt)
    assert columns == 2
