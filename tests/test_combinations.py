"""Features together that are each tested by themselves: presets on odd models, what a plan says of itself, reports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxshard
from fxshard import Plan, Shard, zero
from fxshard.errors import PlanError
from fxshard.placement import BlockShard
from tests.distributed import combinations
from tests.distributed.launch import launch
from tests.helpers import assert_equivalent
from tests.presets import preset

DOUBLE = torch.float64


class Attends(nn.Module):
    """An attention of the model's inputs as they come."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(3, 3)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return out


class Block(nn.Module):
    """Its residual stream is an input; q, k and v are packed in one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(12, 3, batch_first=True), nn.LayerNorm(12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return out


MODELS: dict[str, Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...]]]] = {
    "attends": lambda: (Attends(), tuple(torch.randn(3, 2, 4, 8, 3, dtype=DOUBLE))),
    "block": lambda: (Block(), (torch.randn(4, 6, 12, dtype=DOUBLE),)),
}


@pytest.mark.thin(2)
@pytest.mark.parametrize("plan", ["zero2", "zero3", "cp2", "sp2", "zero2_cp2", "cp2_zero2", "zero2_sp2"])
@pytest.mark.parametrize("name", MODELS)
def test_a_plan_that_was_saved_is_the_same_program(name: str, plan: str) -> None:
    """What a preset found, and ``program.plan`` says, is read back: the code of every rank is the same."""
    model, args = MODELS[name]()
    program = assert_equivalent(model.to(DOUBLE), preset(plan), args)
    again = fxshard.parallelize(model, Plan.from_json(program.plan.to_json()), args)
    assert again.plan == program.plan
    for rank in range(program.mesh.world_size):
        assert again.code(rank) == program.code(rank)


class Sometimes(nn.Module):
    """Reads its packed weight only when it is asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: torch.Tensor, attends: bool) -> torch.Tensor:
        return self.block(x) if attends else x * 2


def test_what_a_later_capture_reads_lies_as_it_lies() -> None:
    """The first capture does not see that the weight is packed."""
    model, x = Sometimes().to(DOUBLE), torch.randn(4, 6, 12, dtype=DOUBLE)
    program = fxshard.parallelize(model, Plan({"tp": 2}, params={"*.in_proj_weight": {"tp": Shard(0)}}))
    for attends in (False, True):
        for out in fxshard.simulate(program, x, attends).outputs:
            torch.testing.assert_close(out, model(x, attends), rtol=1e-12, atol=1e-12)


class Changes(nn.Module):
    """With labels it returns a loss, too; in evaluation its dropout is nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        out = self.head(self.drop(x))
        return (out,) if labels is None else (out, F.cross_entropy(out, labels, reduction="none"))


def test_what_a_plan_names_need_not_be_in_later_captures() -> None:
    model, x, labels = Changes().to(DOUBLE), torch.randn(4, 12, dtype=DOUBLE), torch.tensor([0, 1, 2, 3])
    rows = {"dp": Shard(0)}
    plan = Plan({"dp": 2}, inputs={"x": rows, "labels": rows}, activations={"drop": rows}, outputs={"1": rows})
    program = fxshard.parallelize(model, plan)
    assert [loss.shape for _, loss in fxshard.simulate(program, x, labels).outputs] == [(2,), (2,)]
    program.eval()
    model.eval()
    for (out,) in fxshard.simulate(program, x).outputs:
        torch.testing.assert_close(out, model(x)[0], rtol=1e-12, atol=1e-12)
    with pytest.raises(PlanError, match="3 entries of the plan cannot be applied"):
        fxshard.parallelize(model.eval(), plan, (x,))


class Views(nn.Module):
    """Weights that are read through views, twice, as scalars, and where no gradient comes."""

    def __init__(self) -> None:
        super().__init__()
        self.square, self.long = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(64, 8))
        self.scale, self.last = nn.Parameter(torch.ones(())), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x @ self.square).relu() @ self.square.t() + self.square.diagonal() * x
        x = x * self.long[:8].sum(0) * self.long[1] + x * self.long.view(8, 64)[:, 8:16].mT[0]
        part, _ = self.long.split([8, 56])
        with torch.no_grad():
            still = self.last(x)
        out: torch.Tensor = x @ part * self.scale + still + self.last(x).detach()
        return out


def views() -> tuple[nn.Module, tuple[Any, ...]]:
    return Views(), (torch.randn(4, 8),)


def tied() -> tuple[nn.Module, tuple[Any, ...]]:
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 16, bias=False))
    model[2].weight = model[0].weight
    return model, (torch.arange(16).view(4, 4),)


@pytest.mark.slow
def test_reports_of_gathered_weights() -> None:
    """What one step on real ranks issues is what the program says, though weights are read through views."""
    launch(2, combinations.as_many_collectives_as_it_says, [(views, "zero2", {}), (tied, "zero2", {"checkpoint": "*"})])


@pytest.mark.slow
def test_reports_of_gathered_weights_on_two_axes() -> None:
    cases = [(made, plan, {}) for made in (views, tied) for plan in ("zero2_cp2", "cp2_zero2", "zero2_tp2")]
    launch(4, combinations.as_many_collectives_as_it_says, cases)


def small() -> tuple[nn.Module, tuple[Any, ...]]:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)), (torch.randn(3, 8),)


def test_weights_are_gathered_for_ranks_that_have_no_rows() -> None:
    """A batch of 3 on 4 ranks: the last one computes nothing, and keeps no weight that it would gather again."""
    launch(4, combinations.trains_as_one_device, [(small, "zero4", {}), (small, "zero4", {"checkpoint": "*"})])


def test_weights_are_gathered_again_where_every_rank_computes() -> None:
    model, (x,) = small()
    assert not fxshard.parallelize(model, zero(4), (x,)).compiled.regathers
    assert fxshard.parallelize(model, zero(3), (x,)).compiled.regathers
    assert fxshard.parallelize(model, preset("tp4_zero2"), (x[:2],)).compiled.regathers


def test_the_last_backward_pass_sums_all_that_waits() -> None:
    launch(2, combinations.accumulation_over_several_sums)


@pytest.mark.slow
def test_the_last_backward_pass_sums_all_that_waits_on_other_axes() -> None:
    launch(4, combinations.accumulation_over_several_axes)


class Residual(nn.Module):
    """A product that is added to what it is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.down(F.gelu(self.up(x)))
        return out.relu()


EIGHT = {"a": 2, "b": 2, "c": 2}


def test_an_outer_axis_in_blocks_around_two_that_cut_within() -> None:
    """The blocks are fine enough for either of the inner axes, not for both."""
    inputs = {"x": {"a": BlockShard(2, (1, 1))}}
    plan = Plan(EIGHT, inputs=inputs, params={"down.weight": {"b": Shard(0), "c": Shard(0)}})
    x = torch.randn(4, 4, 8, dtype=DOUBLE).requires_grad_()
    assert_equivalent(Residual().to(DOUBLE), plan, (x,))


def test_blocks_of_nothing() -> None:
    """On an outer axis a rank holds nothing; an inner one cuts that in blocks, unevenly."""
    placed = {"a": BlockShard(0, shares=(1, 0)), "b": BlockShard(0, (1, 1), (1, 0))}
    x = torch.randn(4, 8, dtype=DOUBLE).requires_grad_()
    assert_equivalent(Residual().to(DOUBLE), Plan({"a": 2, "b": 2}, inputs={"x": placed}), (x,))
