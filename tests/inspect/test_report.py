"""What a program says of itself: the table, the records of its collectives, the explanation."""

from __future__ import annotations

import inspect
import io
import re
import threading
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxshard
from fxshard import data_parallel, sequence_parallel, tensor_parallel
from fxshard.inspect.report import format_graph
from fxshard.ir.conversions import FORWARD
from fxshard.runtime.lockstep import LockstepAxisGroup


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.relu(self.up(x)))


class Lm(nn.Module):
    """An embedding, residual layers, a head and a loss."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 8)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(count))
        self.layers = nn.ModuleList(Mlp() for _ in range(count))
        self.head = nn.Linear(8, 32, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


KINDS = set(FORWARD.values())
IDS = torch.arange(16).reshape(4, 4)
LINE = inspect.getsourcelines(Mlp.forward)[1] + 1
PLANS = {
    "tp": tensor_parallel(2),
    "sp": sequence_parallel(2),
    "dp": data_parallel(2),
    "dp_tp": data_parallel(2) | tensor_parallel(2),
}


def mlp(grad: bool = True, plan: Any = None, batch: int = 4) -> fxshard.ParallelModule:
    return fxshard.parallelize(Mlp(), plan or tensor_parallel(2), (torch.randn(batch, 8, requires_grad=grad),))


def table_of(program: fxshard.ParallelModule) -> str:
    out = io.StringIO()
    program.print_tabular(out)
    return out.getvalue()


def rows_of(program: fxshard.ParallelModule) -> list[dict[str, str]]:
    """The table's cells, by column."""
    header, rule, *lines = table_of(program).splitlines()
    columns = [m.span() for m in re.finditer("-+", rule)]
    names = [header[a:b].strip() for a, b in columns]
    lines = lines[: lines.index("")]
    return [dict(zip(names, (line[a:b].strip() for a, b in columns), strict=True)) for line in lines]


# --- the table -------------------------------------------------------------------------------------------------------


def test_the_table_of_a_small_mlp() -> None:
    assert [line.rstrip() for line in table_of(mlp()).splitlines()] == [
        "op          module    in             out    local shape    forward     backward      bytes",
        "----------  --------  -------------  -----  -------------  ----------  ----------  -------",
        "vary        up        R              V      f32[4, 8]                  all_reduce      128",
        "linear      up        V, S(0), S(0)  S(1)   f32[4, 8]",
        "relu                  S(1)           S(1)   f32[4, 8]",
        "linear      down      S(1), S(1)     P      f32[4, 8]",
        "all_reduce  down      P              R      f32[4, 8]      all_reduce                  128",
        "add         down      R, R           R      f32[4, 8]",
        "",
        "Placements on axis tp. R: whole on every rank. S(d): split along dim d. P: a partial sum. "
        "V: whole, its gradient a partial sum.",
        "Total, forward: 1 all_reduce over tp (128 bytes)",
        "Total, backward: 1 all_reduce over tp (128 bytes)",
    ]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("frozen", [False, True])
def test_the_table_has_the_collectives_of_the_records(plan: str, frozen: bool) -> None:
    """Frozen parts and inputs without gradient have no backward collectives, in either."""
    model = Lm()
    if frozen:
        for module in (model.embed, model.norms, model.layers[0], model.layers[1]):
            module.requires_grad_(False)
    program = fxshard.parallelize(model, PLANS[plan], (IDS,), bucket_bytes=0)
    rows, records = rows_of(program), program.collectives()
    assert records
    for phase in ("forward", "backward"):
        shown = Counter((row[phase], int(row["bytes"].replace(",", ""))) for row in rows if row[phase])
        assert shown == Counter((r.kind, r.num_bytes) for r in records if r.phase == phase)
    assert all(bool(row["bytes"]) == bool(row["forward"] or row["backward"]) for row in rows)


@pytest.mark.parametrize("plan", PLANS)
def test_the_records_are_what_runs(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward collectives, in the order in which rank 0 issues them."""
    issued: list[str] = []
    run = LockstepAxisGroup.run

    def recorded(self: LockstepAxisGroup, name: str, backward: str, x: torch.Tensor, *more: Any, **how: Any) -> Any:
        issued.extend([name] if threading.current_thread() is first[0] else [])
        return run(self, name, backward, x, *more, **how)

    program = fxshard.parallelize(Lm(), PLANS[plan], (IDS,))
    function, first = program.function, []

    def marked(compiled: Any, rank: int, axes: Any) -> Any:
        generated = function(compiled, rank, axes)

        def called(*args: Any) -> Any:
            first.extend([threading.current_thread()] if rank == 0 else [])
            return generated(*args)

        return called

    monkeypatch.setattr(program, "function", marked)
    monkeypatch.setattr(LockstepAxisGroup, "run", recorded)
    fxshard.simulate(program, IDS)
    assert [n for n in issued if n in KINDS] == [r.kind for r in program.collectives() if r.phase == "forward"]


def test_an_input_without_gradient_needs_no_collective() -> None:
    assert [row["backward"] for row in rows_of(mlp(grad=False)) if row["backward"]] == []
    assert [r.phase for r in mlp(grad=False).collectives()] == ["forward"]
    assert [row["backward"] for row in rows_of(mlp()) if row["backward"]] == ["all_reduce"]


def test_a_graph_after_a_stage_as_text() -> None:
    program = mlp()
    text = format_graph(program.graph_after("optimize"), program.mesh)
    assert re.search(r"%\w+ +aten\.linear +%\w+, %\w+, %\w+ +f32\[4, 8\]  tp: Shard\(1\)", text)
    assert "placeholder x" in text


# --- the records -----------------------------------------------------------------------------------------------------


def test_a_record_says_what_and_where_and_why() -> None:
    forward, backward = mlp().collectives()
    assert (forward.kind, forward.axis, forward.phase, forward.num_bytes) == ("all_reduce", "tp", "forward", 128)
    assert (forward.module, forward.value) == ("down", "f32[4, 8]")
    assert forward.source.startswith(f"test_report.py:{LINE}")
    assert "its weight is split over `i` on axis tp" in forward.reason
    assert (backward.kind, backward.phase, backward.num_bytes) == ("all_reduce", "backward", 128)


def test_gradients_of_weights_belong_to_their_modules() -> None:
    records = fxshard.parallelize(Lm(), data_parallel(2), (IDS,), bucket_bytes=0).collectives()
    backward = [r for r in records if r.phase == "backward" and r.kind == "all_reduce"]
    assert {"layers.0.up", "layers.2.down", "norms.1", "embed", "head"} <= {r.module for r in backward}
    assert all(r.source for r in backward if r.module)


# --- the explanation -------------------------------------------------------------------------------------------------


def test_the_explanation_of_a_small_mlp() -> None:
    assert (
        mlp().explain()
        == f"""\
forward: all_reduce of f32[4, 8] over tp, 128 bytes
  at   down  (test_report.py:{LINE} in forward)
  why  every rank holds a partial sum, since its weight is split over `i` on axis tp; needed whole by the add after it

backward: all_reduce of the gradient of f32[4, 8] over tp, 128 bytes
  at   up  (test_report.py:{LINE} in forward)
  why  every rank computes only its share of this gradient, since its readers (linear in up) are split over `d0` on \
axis tp, as up.weight is

Total, forward: 1 all_reduce over tp (128 bytes)
Total, backward: 1 all_reduce over tp (128 bytes)"""
    )


def test_equal_layers_are_one_paragraph() -> None:
    text = fxshard.parallelize(Lm(), tensor_parallel(2), (IDS,)).explain()
    assert "forward: all_reduce of f32[4, 4, 8] over tp, 512 bytes, 3 times\n  at   layers.{0-2}.down" in text
    assert len(text.splitlines()) < 60


@pytest.mark.parametrize("plan", PLANS)
def test_every_collective_is_explained(plan: str) -> None:
    program = fxshard.parallelize(Lm(), PLANS[plan], (IDS,))
    times = [int(n or 1) for n in re.findall(r"^\w+: .* bytes(?:, (\d+) times)?$", program.explain(), re.MULTILINE)]
    assert sum(times) == len(program.collectives())
    assert all(r.reason for r in program.collectives())


@pytest.mark.parametrize("plan", [tensor_parallel(2), sequence_parallel(2)], ids=["tp", "sp"])
def test_notes_stand_where_there_are_no_collectives(plan: Any) -> None:
    text = fxshard.parallelize(nn.LayerNorm(8), plan, (torch.randn(2, 4, 8),)).explain()
    assert "split" in text.splitlines()[0]
    assert text.endswith("No collectives: every rank computes the whole model.")


def test_operators_without_a_rule_are_named() -> None:
    class Exotic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.ldl_factor(self.up(x)).LD

    program = fxshard.parallelize(Exotic(), data_parallel(2), (torch.randn(4, 8, 8),))
    (fallback,) = program.fallbacks()
    first = program.explain().splitlines()[0]
    assert first == str(fallback)
    assert "linalg_ldl_factor" in first
    assert "register_rule(" in first
