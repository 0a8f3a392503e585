"""Experts dealt out to the ranks: whole matrices, the rows routed to them, one sum of tokens a layer."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import nn

import fxshard
from fxshard import Plan, Shard, data_parallel, expert_parallel, tensor_parallel
from fxshard.runtime import row_groups
from tests.distributed.launch import launch
from tests.helpers import assert_equivalent
from tests.models import test_moe
from tests.models.experts import KINDS, build
from tests.models.zoo import ids

SAME = data_parallel(2) | expert_parallel(2, "dp")
PLANS = {
    "ep2": expert_parallel(2),
    "ep4": expert_parallel(4),
    "same axis": SAME,
    "dp2 ep2": data_parallel(2) | expert_parallel(2),
    "ep2 dp2": expert_parallel(2) | data_parallel(2),
    "ep2 tp2": expert_parallel(2) | tensor_parallel(2),
}
HIDDEN = ("up", "down", "up_bias")


def experts_of(model: nn.Module) -> set[str]:
    return {n for n, _ in model.named_parameters() if n.rpartition(".")[2] in HIDDEN}


def moved(program: fxshard.ParallelModule, phase: str = "forward", axis: str = "ep") -> list[tuple[str, int]]:
    return [(c.kind, c.num_bytes) for c in program.collectives() if (c.phase, c.axis) == (phase, axis)]


@pytest.mark.thin(2)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", KINDS)
def test_as_the_original(kind: str, plan: str) -> None:
    model, x = build(kind, layers=2, bias=kind != "unsorted")
    program = assert_equivalent(model, PLANS[plan], (x,))
    assert not program.fallbacks()
    matrices = {n for n in experts_of(model) if not n.endswith("bias")}
    axis = "dp" if plan == "same axis" else "ep"
    assert all(program.plan.params[name][axis] == Shard(0) for name in matrices)
    if "tp" not in plan:
        assert set(program.plan.params) <= experts_of(model), "the router is whole"


@pytest.mark.thin(2)
@pytest.mark.parametrize("count", [1, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_experts_that_the_ranks_do_not_divide(kind: str, count: int) -> None:
    """Some ranks have one expert more, and some have none."""
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    model = KINDS[kind](count, min(count, 2), bias=True).double()
    for size in (2, 4):
        program = assert_equivalent(model, expert_parallel(size), (x,))
        if count > 1:
            assert "up" in program.plan.params


def test_an_expert_that_nothing_is_routed_to() -> None:
    """One rank has experts, and no rows."""
    for kind in ("sorted", "unsorted"):
        model, x = build(kind)
        with torch.no_grad():
            model[0].router.bias += torch.tensor([9.0, 9.0, 0.0, 0.0])  # type: ignore[union-attr, operator]
        assert_equivalent(model, expert_parallel(2), (x,))
        assert_equivalent(model, SAME, (x,))


@pytest.mark.parametrize("kind", ["sorted", "unsorted"])
def test_what_is_moved(kind: str) -> None:
    """The tokens' sums once, forward and backward, not the rows of all their experts; and their weights' gradients."""
    model, x = build(kind)
    program = fxshard.parallelize(model, expert_parallel(2), (x,))
    tokens = x.numel() * 8
    rows = 2 * x.numel() // 8 * 8  # two experts a token, one number each
    assert moved(program) == [("all_reduce", tokens)]
    assert moved(program, "backward") == [("all_gather", rows), ("all_reduce", tokens)]
    assert "Shard(0, groups=%cumsum)" in program.code()


def test_on_the_axis_of_the_batch() -> None:
    """Tokens are gathered for the experts, and their sums scattered back; the backward pass does the reverse."""
    model, x = build("unsorted")
    plan = SAME | Plan({"dp": 2}, outputs={"dp": Shard(0)})
    program = assert_equivalent(model, SAME, (x,))
    assert program.plan.inputs == {"input": {"dp": Shard(0)}}
    program = fxshard.parallelize(model, plan, (x,))
    tokens = x.numel() * 8
    large = [kind for kind, size in moved(program, axis="dp") if size >= tokens]
    assert large == ["all_gather", "reduce_scatter"]
    large = [kind for kind, size in moved(program, "backward", axis="dp") if size >= tokens]
    assert large == ["all_gather", "reduce_scatter"]


def test_a_rank_holds_and_computes_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build("sorted", experts=8)
    program = fxshard.parallelize(model, expert_parallel(4), (x,))
    mine = sum(p.numel() for n, p in program.rank_module(3).named_parameters() if n.endswith(("up", "down")))
    assert mine * 4 == sum(p.numel() for n, p in model.named_parameters() if n.endswith(("up", "down")))
    rows: list[tuple[int, ...]] = []
    count = row_groups.group_rows
    monkeypatch.setattr(row_groups, "group_rows", lambda *a, **k: rows.append(count(*a, **k)) or rows[-1])
    seen: list[int] = []
    product = torch.ops.transformers.grouped_mm_fallback.default
    monkeypatch.setattr(
        torch.ops.transformers.grouped_mm_fallback, "default", lambda x, *rest: seen.append(len(x)) or product(x, *rest)
    )
    fxshard.simulate(program, x)
    assert set(rows) == {rows[0]}, "all ranks count alike, once"
    assert len(rows) == 4
    assert sum(rows[0]) == 48
    assert sorted(seen) == sorted(rows[0] * 2), "two products of the rank's own rows"


TRANSFORMERS = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text"]


@pytest.mark.thin(4)
@pytest.mark.parametrize("plan", ["ep2", "same axis", "ep2 tp2"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name: str, plan: str) -> None:
    model = test_moe.build(name, "grouped_mm")
    inputs, done = {"input_ids": ids()}, test_moe.expected(name, "grouped_mm")
    program = assert_equivalent(model, PLANS[plan], (), inputs, expected=done, tolerance=5e-4)
    assert not program.fallbacks()
    axis = "dp" if plan == "same axis" else "ep"
    packed = {n: p for n, p in model.named_parameters() if ".experts." in n and p.dim() == 3}
    assert all(program.plan.params[n][axis] == Shard(0) for n in packed)
    tokens = 4 * ids().numel() * model.config.hidden_size
    large = [c for c in program.collectives() if c.phase == "forward" and c.axis == "ep" and c.num_bytes >= tokens]
    assert len(large) == (0 if axis == "dp" else model.config.num_hidden_layers)


@pytest.mark.slow
@pytest.mark.in_turn(2)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", test_moe.MODELS)
def test_all_of_transformers(name: str, plan: str) -> None:
    done = test_moe.expected(name, "grouped_mm")
    model = test_moe.build(name, "grouped_mm")
    assert_equivalent(model, PLANS[plan], (), {"input_ids": ids()}, expected=done, tolerance=5e-4)


@pytest.mark.parametrize("plan", ["ep2", "ep4", "same axis"])
def test_transformers_with_picked_matrices(plan: str) -> None:
    """The products of what was picked are summed, not the matrices; biases are dealt out with these."""
    model = test_moe.build("gpt_oss", "batched_mm", torch.float64)
    done = test_moe.expected("gpt_oss", "batched_mm", torch.float64)
    program = assert_equivalent(model, PLANS[plan], (), {"input_ids": ids()}, expected=done)
    held = {n for n, p in model.named_parameters() if ".experts." in n}
    assert held <= set(program.plan.params)
    largest = max(c.num_bytes for c in program.collectives())
    assert largest <= max(2 * ids().numel() * 192 * 8, 128 * 64 * ids().numel() * 8)


def test_native_products() -> None:
    """``aten._grouped_mm`` in bfloat16, whose rows must be aligned."""
    torch.manual_seed(0)
    for plan in ("ep2", "ep4", "same axis"):
        program = assert_equivalent(test_moe.Experts(), PLANS[plan], (torch.randn(24, 16),), tolerance=0.05)
        assert all(p == Shard(0) for n in ("up", "down") for p in program.plan.params[n].values())


def test_beside_features_on_the_same_axis() -> None:
    """Experts are dealt out, everything else is split in pairs, whichever preset is named first."""
    for plan in (tensor_parallel(2) | expert_parallel(2, "tp"), expert_parallel(2, "tp") | tensor_parallel(2)):
        program = fxshard.parallelize(test_moe.build("mixtral", "grouped_mm"), plan, (), {"input_ids": ids()})
        placed = program.plan.params
        assert placed["model.layers.0.mlp.experts.gate_up_proj"] == {"tp": Shard(0)}
        assert placed["model.layers.0.mlp.experts.down_proj"] == {"tp": Shard(0)}
        assert placed["model.layers.0.self_attn.o_proj.weight"] == {"tp": Shard(1)}


class Heads(nn.Module):
    """Attention whose heads have matrices of their own, and a table of positions: no experts."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Parameter(torch.randn(2, 8, 8)) for _ in range(4))
        self.table = nn.Parameter(torch.randn(12, 2, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (torch.einsum("btd,hde->bhte", x, w) for w in (self.q, self.k, self.v))
        bias = self.table[torch.arange(6)[:, None] - torch.arange(6) + 6].mean(-1).movedim(-1, 0)
        y = nn.functional.scaled_dot_product_attention(q, k, v, bias)
        return torch.einsum("bhte,hed->btd", y, self.o)


def test_without_experts_there_is_a_note() -> None:
    for model, x in ((Heads(), torch.randn(2, 6, 8)), (nn.Linear(4, 4), torch.randn(2, 4))):
        program = fxshard.parallelize(model, expert_parallel(2), (x,))
        assert not program.plan.params
        assert "expert_parallel found no weights of experts that axis 'ep' (size 2) could split" in program.explain()


@pytest.mark.slow
def test_on_real_ranks() -> None:
    cases = [(kind, plan) for kind in ("sorted", "unsorted", "picked", "batched") for plan in ("ep2", "same axis")]
    launch(2, equal_on_ranks, cases, 3)
    launch(4, equal_on_ranks, [("unsorted", "ep4"), ("sorted", "ep2 dp2"), ("unsorted", "ep2 tp2")], 5)


def equal_on_ranks(cases: list[tuple[str, str]], experts: int) -> None:
    for kind, plan in cases:
        model, x = build(kind, experts, bias=kind == "sorted")
        program = fxshard.parallelize(model, PLANS[plan], (x,))
        report = fxshard.verify(program, x)
        assert report.ok, f"{kind} under {plan}: {report}"


# --- sabotage ---------------------------------------------------------------------------------------------------------

own_ends = row_groups.own_ends


def shifted(ends: torch.Tensor, axis: Any, lengths: Any = ()) -> torch.Tensor:
    """A rank's own ends, as the whole counts them."""
    first = axis.index * (ends.shape[0] // axis.size)
    return ends[first : first + ends.shape[0] // axis.size]


def unmasked(x: torch.Tensor, dim: int, positions: torch.Tensor, axis: Any, lengths: Any = ()) -> Any:
    """Picks something for what other ranks hold."""
    return x.index_select(dim, positions.flatten() % x.shape[dim]).unflatten(dim, positions.shape)


def swapped(ends: torch.Tensor, axis: Any, rows: int, lengths: Any = ()) -> tuple[int, ...]:
    """The ranks' rows, in another order."""
    return group_rows(ends, axis, rows, lengths)[::-1]


group_rows = row_groups.group_rows


@pytest.mark.parametrize("broken", [shifted, unmasked, swapped])
def test_a_broken_function_is_caught(broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build("unsorted")
    program = fxshard.parallelize(model, expert_parallel(2), (x,))
    assert fxshard.verify(program, x).ok
    name = {shifted: "own_ends", unmasked: "pick", swapped: "group_rows"}[broken]
    monkeypatch.setattr(row_groups, name, broken)
    with contextlib.suppress(RuntimeError, IndexError):  # rows that a rank does not have
        assert not fxshard.verify(program, x).ok
