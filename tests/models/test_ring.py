"""Ring attention: queries, keys and values split along the sequence; keys and values go round the ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import fxshard
from fxshard import Plan, Shard, tensor_parallel
from fxshard.errors import FxshardError, PlanError
from fxshard.mesh import Mesh
from fxshard.placement import chunk_shares
from fxshard.plan.plan import Plan as SavedPlan
from fxshard.runtime import ring, rounds
from fxshard.runtime.lockstep import Turns, lockstep_axes, run_ranks
from tests.distributed.launch import launch
from tests.helpers import assert_equivalent
from tests.models import zoo

DOUBLE = torch.float64


def tensors(length: int, heads: int, keys: int, mask: str, dtype: torch.dtype = DOUBLE) -> list[Any]:
    """Query, key, value, and a mask, one of whose rows attends to nothing; or None."""
    made = [torch.randn(2, h, length, 4, dtype=DOUBLE).to(dtype).requires_grad_() for h in (heads, keys, keys)]
    masks = {
        "": None,
        "boolean": (torch.rand(2, 1, length, length) < 0.7) & (torch.arange(length) != 1)[:, None],
        "added": torch.randn(heads, length, length, dtype=DOUBLE).to(dtype).requires_grad_(),
        "of keys": torch.randn(2, 1, 1, length, dtype=DOUBLE).to(dtype).requires_grad_(),
    }
    return [*made, masks[mask]]


def in_ring(
    given: Sequence[Any], size: int, lengths: tuple[int, ...], causal: bool, scale: float | None
) -> torch.Tensor:
    """What all ranks of a simulation give."""
    turns = Turns(size)
    axes = lockstep_axes(Mesh(("cp",), (size,)), turns)
    query, key, value = (x.split(lengths, 2) for x in given[:3])
    mask = given[3]
    rows = [mask] * size if mask is None or mask.shape[-2] == 1 else mask.split(lengths, -2)

    def one(rank: int) -> torch.Tensor:
        told = lengths if len(set(lengths)) > 1 else ()
        return ring.ring_attention(
            query[rank], key[rank], value[rank], axes[rank]["cp"], rows[rank], causal, scale, told
        )

    return torch.cat(run_ranks(size, turns, one), 2)


def split(length: int, size: int) -> tuple[int, ...]:
    shares = chunk_shares(length, size) or (1,) * size
    return tuple(length * share // sum(shares) for share in shares)


@settings(max_examples=60)
@given(
    size=st.integers(1, 4),
    length=st.integers(2, 13),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    mask=st.sampled_from(["", "causal", "boolean", "added", "of keys"]),
    scale=st.sampled_from([None, 0.3]),
    tile=st.sampled_from([2, 1024]),
    seed=st.integers(0, 99),
)
@example(size=4, length=3, heads=(4, 2), mask="causal", scale=None, tile=2, seed=0)  # a rank has nothing
@example(size=4, length=13, heads=(4, 2), mask="added", scale=None, tile=2, seed=0)
def test_as_the_plain_operator(
    size: int, length: int, heads: tuple[int, int], mask: str, scale: float | None, tile: int, seed: int
) -> None:
    """Results and all gradients, in double precision."""
    torch.manual_seed(seed)
    causal = mask == "causal"
    given = tensors(length, *heads, "" if causal else mask)
    want = F.scaled_dot_product_attention(*given, 0.0, causal, scale=scale, enable_gqa=heads[0] != heads[1])
    before, ring.TILE = ring.TILE, tile
    try:
        got = in_ring(given, size, split(length, size), causal, scale)
        cotangent = torch.randn_like(want)
        leaves = [x for x in given if x is not None and x.requires_grad]
        grads = [torch.autograd.grad(out, leaves, cotangent) for out in (got, want)]
    finally:
        ring.TILE = before
    for a, b in zip((got, *grads[0]), (want, *grads[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    """The error is that of rounding inputs and results: no sum is made in half precision."""
    given = tensors(16, 4, 2, "", dtype)
    exact = [x.detach().to(DOUBLE).requires_grad_() for x in given[:3]]
    want = F.scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True)
    got = in_ring(given, 4, (4,) * 4, True, None)
    assert got.dtype == dtype
    cotangent = torch.randn_like(want).to(dtype)
    found = torch.autograd.grad(got, given[:3], cotangent)
    expected = torch.autograd.grad(want, exact, cotangent.to(DOUBLE))
    tolerance = 4 * torch.finfo(dtype).eps
    for a, b in zip((got, *found), (want, *expected), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.to(DOUBLE), b, rtol=tolerance, atol=tolerance * b.abs().max().item())


def test_a_rank_keeps_its_own_part() -> None:
    """For the backward pass it keeps what it was given, its result, and a number a row: not the others' keys."""
    kept = {}
    for size in (1, 2, 4):
        given = tensors(16, 4, 4, "")
        turns = Turns(size)
        axes = lockstep_axes(Mesh(("cp",), (size,)), turns)
        parts = [x.chunk(size, 2) for x in given[:3]]
        outs = run_ranks(
            size, turns, lambda r, p=parts, a=axes: ring.ring_attention(p[0][r], p[1][r], p[2][r], a[r]["cp"])
        )
        kept[size] = sum(x.numel() for x in outs[0].grad_fn.saved_tensors)  # of all ranks together
    assert kept[1] == kept[2] == kept[4]


# --- programs -----------------------------------------------------------------------------------------------------


def plan(size: int, ring: bool = True, name: str = "x") -> Plan:
    return Plan({"cp": size}, inputs={name: {"cp": Shard(1)}}, ring=("cp",) if ring else ())


def count(program: fxshard.ParallelModule, axis: str = "cp") -> dict[tuple[str, str], int]:
    return dict(Counter((c.phase, c.kind) for c in program.collectives() if c.axis == axis))


class Attention(nn.Module):
    def __init__(self, heads: int = 4, keys: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q, self.o = nn.Linear(8, heads * 4), nn.Linear(heads * 4, 8)
        self.k, self.v = nn.Linear(8, keys * 4), nn.Linear(8, keys * 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, None, self.dropout, True, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(-2))


@pytest.mark.parametrize(("size", "length"), [(2, 12), (4, 12), (3, 7), (4, 3)])
def test_a_program(size: int, length: int) -> None:
    """Fewer key heads than ranks, and lengths that they do not divide."""
    torch.manual_seed(0)
    model, x = Attention().double(), torch.randn(2, length, 8, dtype=DOUBLE)
    program = assert_equivalent(model, plan(size), (x,))
    found = count(program)
    assert found["forward", "rotate"] == size - 1
    assert found["backward", "rotate"] == 2 * size - 1, "keys and values, and their gradients home"
    assert found["forward", "all_gather"] == 1, "the output"
    if length % size == 0:
        passed = [c.num_bytes for c in program.collectives() if c.kind == "rotate"]
        assert set(passed) == {2 * 2 * 2 * (length // size) * 4 * 8}, "keys and values of a part of the sequence"
    assert "rotate" in str(program.explain())
    assert "go round" not in program.code()
    assert "ring_attention(" in program.code()


def test_without_being_asked_keys_are_gathered() -> None:
    model, x = Attention().double(), torch.randn(2, 12, 8, dtype=DOUBLE)
    program = assert_equivalent(model, plan(2, ring=False), (x,))
    assert count(program)["forward", "all_gather"] == 3
    assert ("forward", "rotate") not in count(program)


def test_where_a_ring_does_not_apply_keys_are_gathered() -> None:
    """Dropout; keys that are whole, as those of a cross-attention to something short."""
    model, x = Attention(keys=4, dropout=0.5).double(), torch.randn(2, 12, 8, dtype=DOUBLE)
    program = assert_equivalent(model, plan(2), (x,))
    assert ("forward", "rotate") not in count(program)


def test_beside_split_heads() -> None:
    model, x = Attention(keys=4).double(), torch.randn(2, 12, 8, dtype=DOUBLE)
    for both in (plan(2) | tensor_parallel(2), tensor_parallel(2) | plan(2)):
        program = assert_equivalent(model, both, (x,))
        assert count(program)["forward", "rotate"] == 1
        assert count(program, "tp")["forward", "all_reduce"] == 1


@pytest.mark.parametrize(("name", "size"), [("llama", 2), ("gpt2", 4)])
def test_transformers(name: str, size: int) -> None:
    model, inputs = zoo.build(name, DOUBLE)
    inputs["use_cache"] = False
    program = assert_equivalent(model, plan(size, name="input_ids"), (), inputs)
    found = count(program)
    assert found["forward", "rotate"] == 2 * (size - 1)
    assert found["forward", "all_gather"] == 1


def test_the_plan_says_so() -> None:
    """It is printed, saved, joined with others, and refused where there is no such axis."""
    asked = plan(2)
    assert SavedPlan.from_json(asked.to_json()) == asked
    assert "ring         attention  cp" in str(asked)
    assert (asked | tensor_parallel(2)).ring == ("cp",)
    model, x = Attention(), torch.randn(2, 12, 8)
    program = fxshard.parallelize(model, asked, (x,))
    assert program.plan.ring == ("cp",)
    again = fxshard.parallelize(model, program.plan, (x,))
    assert again.code() == program.code()
    with pytest.raises(PlanError, match="there is no mesh axis 'tp'"):
        fxshard.parallelize(model, Plan({"cp": 2}, ring=("tp",)), (x,))


def test_sizes_that_change() -> None:
    model, x = Attention().double(), torch.randn(2, 12, 8, dtype=DOUBLE)
    shapes = {"x": {1: torch.export.Dim("length", min=2, max=64)}}
    program = fxshard.parallelize(model, plan(2), (x,), dynamic_shapes=shapes)
    for length in (12, 20, 7):
        report = fxshard.verify(program, torch.randn(2, length, 8, dtype=DOUBLE))
        assert report.ok
    assert ("forward", "rotate") in count(program)


@pytest.mark.slow
def test_on_real_ranks() -> None:
    launch(2, equal_on_ranks, [12, 7])
    launch(4, equal_on_ranks, [12, 3])


def equal_on_ranks(lengths: list[int]) -> None:
    size = torch.distributed.get_world_size()
    for length in lengths:
        torch.manual_seed(0)
        model, x = Attention().double(), torch.randn(2, length, 8, dtype=DOUBLE)
        assert fxshard.verify(fxshard.parallelize(model, plan(size), (x,)), x).ok
        if size == 4:
            both = plan(2) | tensor_parallel(2)
            assert fxshard.verify(fxshard.parallelize(model, both, (x,)), x).ok


# --- sabotage -----------------------------------------------------------------------------------------------------


def stuck(sent: rounds.Rotation, mine: rounds.Rotation) -> Any:
    """Every rank keeps what it has."""
    return lambda: mine.tensors


def ahead(self: ring.Ring, rank: int, length: int) -> int:
    """Blocks in the opposite order."""
    return -rank * length


def wrong_way(self: ring.Ring, *args: Any) -> Any:
    """Gradients that nobody passes on."""
    given = forward_and_back(self, *args)
    first = next(given)
    answer: Any = None
    try:
        while True:
            answer = yield first
            own = first.tensors
            first = given.send((lambda own=own: own) if own[0].dtype == DOUBLE and len(own) == 2 else answer)
    except StopIteration as stop:
        return stop.value


forward_and_back = ring.Ring.backward


@pytest.mark.parametrize("broken", ["_arrival", "_start", "backward"])
def test_a_broken_ring_is_caught(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Attention().double(), torch.randn(2, 12, 8, dtype=DOUBLE)
    program = fxshard.parallelize(model, plan(2), (x,))
    assert fxshard.verify(program, x).ok
    if broken == "_arrival":
        monkeypatch.setattr(rounds, "_arrival", stuck)
    else:
        monkeypatch.setattr(ring.Ring, broken, ahead if broken == "_start" else wrong_way)
    assert not fxshard.verify(program, x).ok


def test_ranks_that_run_different_functions_are_refused() -> None:
    turns = Turns(2)
    axes = lockstep_axes(Mesh(("cp",), (2,)), turns)
    x = torch.randn(1, 1, 4, 4)
    with pytest.raises(FxshardError, match="the ranks run different functions"):
        run_ranks(2, turns, lambda r: ring.ring_attention(x, x, x, axes[r]["cp"], None, r == 1))
