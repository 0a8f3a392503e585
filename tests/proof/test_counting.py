"""What a rank does is counted from the code that it runs, and is what the closed forms say."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

import fxshard
from benchmarks.scaling import PRESETS, Sizes, build, counted, expected, payload_of
from fxshard.runtime.lone_rank import Moved

SIZES = Sizes(batch=8, sequence=16, hidden=64, intermediate=192, heads=16, key_heads=8, layers=2, vocabulary=256)


@pytest.mark.thin(4)
@pytest.mark.parametrize("preset", PRESETS)
def test_counts_are_the_closed_forms(preset: str) -> None:
    model = build(SIZES)
    for ranks in (1, 2, 4, 8):
        counts, whole = counted(model, SIZES, preset, ranks)
        assert counts.forward_flops * ranks == SIZES.forward_flops
        assert counts.backward_flops == 2 * counts.forward_flops
        assert payload_of(counts) == expected(preset, SIZES, ranks, whole)
        assert whole == SIZES.norms or preset != "zero" or ranks == 1


def test_what_rings_send() -> None:
    counts, _ = counted(build(SIZES), SIZES, "tensor_parallel", 4)
    sums = 2 * (2 * SIZES.layers + 1) * SIZES.stream
    assert counts.sent("all_reduce") == sums * 2 * 3 / 4
    assert counts.sent() == sums * 2 * 3 / 4 + SIZES.logits * 3 / 4
    assert counts.payload("all_reduce", "forward") == sums / 2


@pytest.mark.thin(2)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_code_issues_what_the_report_lists(preset: str) -> None:
    """The code ran, the report read the graph: both say the same. (The gradients of whole weights go by themselves.)"""
    model, x = nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.ReLU(), nn.Linear(12, 6)), torch.randn(4, 5, 6)
    plan = PRESETS[preset](2) | (fxshard.tensor_parallel(2) if preset in ("zero", "data_parallel") else fxshard.zero(2))
    program = fxshard.parallelize(model, plan, (x,), bucket_bytes=0, regather=False)
    for rank in range(4):
        counts = fxshard.count(program, x, rank=rank)
        listed = [Moved(c.kind, axis, c.num_bytes) for c in counts.collectives for axis in c.axis.split("+")]
        assert Counter(counts.issued) == Counter(listed)
        assert listed


def test_what_is_computed_anew_counts() -> None:
    model, x = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)), torch.randn(4, 8)
    once = fxshard.count(fxshard.parallelize(model, fxshard.tensor_parallel(2), (x,)), x)
    anew = fxshard.count(fxshard.parallelize(nn.Sequential(model), fxshard.tensor_parallel(2), (x,), checkpoint="0"), x)
    assert anew.forward_flops == once.forward_flops
    assert anew.backward_flops > once.backward_flops


def test_ranks_of_different_shares() -> None:
    model, x = nn.Sequential(nn.Linear(8, 3), nn.ReLU(), nn.Linear(3, 8)), torch.randn(4, 8)
    program = fxshard.parallelize(model, fxshard.tensor_parallel(2), (x,))
    flops = [fxshard.count(program, x, rank=rank).forward_flops for rank in (0, 1)]
    assert flops == [2 * 4 * 2 * 8 * 2, 2 * 4 * 2 * 8 * 1]


def test_counting_leaves_the_program_as_it_was() -> None:
    model, x = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)), torch.randn(4, 8)
    program = fxshard.parallelize(model, fxshard.tensor_parallel(2), (x,))
    fxshard.count(program, x)
    assert all(p.grad is None and not p.is_meta for p in program.parameters())
    assert torch.allclose(fxshard.simulate(program, x).outputs[1], model(x), atol=1e-6)


class Picks(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[x > 0].sum() * x


def test_what_depends_on_values_is_refused() -> None:
    x = torch.randn(4, 8)
    program = fxshard.parallelize(Picks(), fxshard.data_parallel(1), (x,))
    with pytest.raises(fxshard.FxshardError, match="cannot be counted without values"):
        fxshard.count(program, x)
