"""Sabotage: wrong rules, wrong conversions and a wrong runtime are caught, each by the check that is there for it."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fxshard
from fxshard import Mesh, Plan, Replicate, Shard, sequence_parallel, tensor_parallel
from fxshard.errors import SoundnessError
from fxshard.ir.info import copy_graph
from fxshard.passes.check import check
from fxshard.rules.table import all_rules, temporary_rule
from fxshard.runtime import collectives as run
from fxshard.runtime import lockstep

X = torch.randn(4, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


class MLP(nn.Module):
    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.up, self.down, self.between = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 8), between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)  # its gradient needs that of what follows
        return x + self.down(self.between(self.up(x)))


class Sum(nn.Module):
    """A product of split weights without a bias: a partial sum, that must be reduced before what follows."""

    def __init__(self, after: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.up, self.after = nn.Linear(8, 16, bias=False), after
        self.register_buffer("shift", torch.linspace(1, 2, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.up(x), self.shift)


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8)
        nn.init.normal_(self.norm.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.norm(self.up(x)))  # type: ignore[no-any-return]


UP = {"up.weight": Shard(0), "up.bias": Shard(0)}
DOWN = {"down.weight": Shard(1)}
IN = {"up.weight": Shard(1)}


def program_of(model: nn.Module, params: dict[str, Any], **options: Any) -> fxshard.ParallelModule:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return fxshard.parallelize(model.double(), Plan({"tp": 2}, params=params, **options), (X,))


def verified(program: fxshard.ParallelModule) -> fxshard.VerifyReport:
    with redirect_stdout(io.StringIO()) as text:
        report = fxshard.verify(program, X)
    assert ("NOT EQUAL" in text.getvalue()) is not report.ok
    return report


# --- rules ----------------------------------------------------------------------------------------------------------

RULES: dict[str, tuple[str, str, str, Callable[[], nn.Module], dict[str, Any]]] = {
    "softmax over a split dim": ("aten.softmax", "... d -> ... d", "", lambda: MLP(lambda h: h.softmax(-1)), UP | DOWN),
    "cumsum over a split dim": ("aten.cumsum", "... d -> ... d", "", lambda: MLP(lambda h: h.cumsum(-1)), UP | DOWN),
    "flip along a split dim": ("aten.flip", "... d -> ... d", "", lambda: MLP(lambda h: h.flip(-1)), UP | DOWN),
    "an addition linear in one operand": ("aten.add", "@pointwise", "0;1", lambda: Sum(torch.add), IN),
    "gelu of partial sums": ("aten.gelu", "@pointwise", "0", lambda: Sum(lambda h, _: F.gelu(h)), IN),
    "a product of partial sums": ("aten.square", "@pointwise", "0", lambda: Sum(lambda h, _: torch.square(h)), IN),
}  # fmt: skip


@pytest.fixture
def fresh_rules() -> Iterator[None]:
    before = all_rules()
    yield
    assert all_rules() == before


@pytest.mark.usefixtures("fresh_rules")
@pytest.mark.parametrize("case", RULES)
def test_a_wrong_rule_is_caught(case: str) -> None:
    name, rule, linear, make, params = RULES[case]
    assert verified(program_of(make(), params)).ok, "right before the sabotage"
    with temporary_rule(name, rule, linear=linear):
        program = program_of(make(), params)
        report = verified(program)
        assert not report.ok, program.explain()
        assert report.first_divergence is not None
        assert name in report.first_divergence, report.first_divergence
        assert "test_sabotage.py:" in report.first_divergence, "the source line"
    assert verified(program_of(make(), params)).ok, "right again"


@pytest.mark.usefixtures("fresh_rules")
def test_a_wrong_rule_whose_local_call_cannot_run_fails_at_that_call() -> None:
    """layer_norm over split features: its normalized_shape is the whole one."""
    refused = pytest.raises(SoundnessError, match=r"(?s)%layer_norm of rank 0 cannot run: .* of shape .*\[8\]")
    with temporary_rule("aten.layer_norm", "... d, d, d -> ... d"), refused:
        program_of(Norm(), UP | DOWN)


# --- conversions ----------------------------------------------------------------------------------------------------


def column_row() -> fxshard.ParallelModule:
    """vary in front of the column weight, all_reduce behind the row weight."""
    return program_of(MLP(F.gelu), UP | DOWN)


def sequence() -> fxshard.ParallelModule:
    """all_gather summed, reduce_scatter, chunk."""
    return program_of(MLP(F.gelu), UP | DOWN, inputs={"x": Shard(1)}, activations={"down": Shard(1)})


def gathered() -> fxshard.ParallelModule:
    """A column result that is gathered: all_gather, not summed."""
    return program_of(MLP(F.gelu), {**UP, "down.weight": Replicate()}, activations={"up": Replicate()})


def moved() -> fxshard.ParallelModule:
    """all_to_all, from one dim to another."""
    return program_of(MLP(F.gelu), {}, inputs={"x": Shard(1)}, activations={"up": Shard(2)})


def remove(graph: fx.Graph, node: fx.Node) -> None:
    node.replace_all_uses_with(node.args[0])
    graph.erase_node(node)


def not_summed(graph: fx.Graph, node: fx.Node) -> None:
    node.args = node.args[:2]


def summed(graph: fx.Graph, node: fx.Node) -> None:
    node.args = (*node.args[:2], True)


def gathered_along_another(graph: fx.Graph, node: fx.Node) -> None:
    node.kwargs = {**node.kwargs, "dim": 1}


def gathered_in_blocks(graph: fx.Graph, node: fx.Node) -> None:
    node.kwargs = {**node.kwargs, "blocks": (1, 1)}


def gathered_of_lengths(graph: fx.Graph, node: fx.Node) -> None:
    node.kwargs = {**node.kwargs, "lengths": (3, 1)}


def other_dim(graph: fx.Graph, node: fx.Node) -> None:
    node.args = (*node.args[:2], (node.args[2] + 1) % 3, *node.args[3:])


def swapped(graph: fx.Graph, node: fx.Node) -> None:
    node.args = (*node.args[:2], node.args[3], node.args[2])


def become(target: Any, *more: Any) -> Callable[[fx.Graph, fx.Node], None]:
    def change(graph: fx.Graph, node: fx.Node) -> None:
        node.target, node.args = target, (*node.args[:2], *more)

    return change


def other_axis(graph: fx.Graph, node: fx.Node) -> None:
    node.args = (node.args[0], "dp", *node.args[2:])


SABOTAGES: dict[str, tuple[Callable[[], fxshard.ParallelModule], Any, Callable[[fx.Graph, fx.Node], None]]] = {
    "no vary": (column_row, run.vary, remove),
    "no all_reduce": (column_row, run.all_reduce, remove),
    "a vary for an all_reduce": (column_row, run.all_reduce, become(run.vary)),
    "an all_reduce for a vary": (column_row, run.vary, become(run.all_reduce)),
    "a chunk for an all_reduce": (column_row, run.all_reduce, become(run.chunk, 2)),
    "a gather for an all_reduce": (column_row, run.all_reduce, become(run.all_gather)),
    "an axis that is not there": (column_row, run.all_reduce, other_axis),
    "a gather whose gradient is not summed": (sequence, run.all_gather, not_summed),
    "a gather along another dim": (gathered, run.all_gather, gathered_along_another),
    "a gather of other blocks": (gathered, run.all_gather, gathered_in_blocks),
    "a gather of other parts": (gathered, run.all_gather, gathered_of_lengths),
    "no gather": (gathered, run.all_gather, remove),
    "a reduce_scatter along another dim": (sequence, run.reduce_scatter, other_dim),
    "no reduce_scatter": (sequence, run.reduce_scatter, remove),
    "an all_reduce for a reduce_scatter": (sequence, run.reduce_scatter, become(run.all_reduce)),
    "a chunk for a reduce_scatter": (sequence, run.reduce_scatter, become(run.chunk, 1)),
    "a chunk along another dim": (sequence, run.chunk, other_dim),
    "no chunk": (sequence, run.chunk, remove),
    "a reduce_scatter for a chunk": (sequence, run.chunk, become(run.reduce_scatter, 1)),
    "a gather whose equal gradients are summed": (gathered, run.all_gather, summed),
    "an all_to_all the other way": (moved, run.all_to_all, swapped),
    "no all_to_all": (moved, run.all_to_all, remove),
}


@pytest.mark.parametrize("case", SABOTAGES)
def test_a_wrong_conversion_is_refused(case: str) -> None:
    make, target, change = SABOTAGES[case]
    program = make()
    graph = copy_graph(program.graph_after("insert_collectives"))
    check(graph, program.mesh)
    node = next(n for n in graph.nodes if n.target is target)
    if change is not_summed:
        assert node.args[2] is True
    change(graph, node)
    with pytest.raises(SoundnessError, match="does not follow from its operands on mesh axis") as caught:
        check(graph, program.mesh)
    assert caught.value.op
    assert caught.value.fix


@pytest.mark.parametrize("layers", [1, 2])
def test_a_wrong_placement_is_refused(layers: int) -> None:
    """A node that claims to be another than its operands make it; also where a node like it was right, just before."""
    from dataclasses import replace

    from fxshard.ir.info import info_of, set_info

    model = nn.Sequential(*(MLP(F.gelu) for _ in range(layers))).double()
    program = fxshard.parallelize(model, tensor_parallel(2), (X,))
    for node in program.graph_after("insert_collectives").nodes:
        if node.op != "call_function":
            continue
        graph = copy_graph(program.graph_after("insert_collectives"))
        copy = next(n for n in graph.nodes if n.name == node.name)
        claimed = Replicate() if str(info_of(node).placements[0]) != str(Replicate()) else Shard(0)
        set_info(copy, replace(info_of(node), outputs=((claimed,),)))
        where = f"%{node.name} " if isinstance(node.target, torch._ops.OpOverload) else None  # else its reader may
        with pytest.raises(SoundnessError, match=where):
            check(graph, Mesh(("tp",), (2,)))


# --- the runtime ----------------------------------------------------------------------------------------------------


def paired(wrong: dict[tuple[str, str], tuple[str, str]]) -> Any:
    """An ``exchange`` that runs other collectives than it was asked for, by (collective, its gradient)."""
    right = lockstep.LockstepGroup.exchange

    def exchange(self: Any, rank: int, name: str, backward: str, x: torch.Tensor) -> torch.Tensor:
        return right(self, rank, *wrong.get((name, backward), (name, backward)), x)

    return exchange


@pytest.mark.parametrize(
    ("make", "asked", "given"),
    [
        (column_row, ("all_reduce", "identity"), ("all_reduce", "all_reduce")),  # the classical error: gradients n-fold
        (column_row, ("identity", "all_reduce"), ("identity", "identity")),
        (column_row, ("all_reduce", "identity"), ("identity", "identity")),
        (gathered, ("all_gather", "own_part"), ("all_gather", "reduce_scatter")),
        (sequence, ("all_gather", "reduce_scatter"), ("all_gather", "own_part")),
    ],
)
def test_a_wrong_gradient_of_a_collective_is_caught(
    monkeypatch: pytest.MonkeyPatch, make: Any, asked: tuple[str, str], given: tuple[str, str]
) -> None:
    program = make()
    assert verified(program).ok
    monkeypatch.setattr(lockstep.LockstepGroup, "exchange", paired({asked: given}))
    report = verified(program)
    assert not report.ok
    assert report.first_divergence is not None
    if asked[0] == given[0]:
        assert report.max_grad_error > 1e-3
        assert report.max_output_error < 1e-9, "only the gradients are wrong"
        assert "its gradient differs" in report.first_divergence, report.first_divergence
    else:
        assert "its value differs" in report.first_divergence, report.first_divergence


@pytest.mark.parametrize("name", ["all_reduce", "reduce_scatter", "all_gather"])
def test_a_wrong_collective_is_caught(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    program = column_row() if name == "all_reduce" else sequence()
    right = lockstep.COLLECTIVES[name]
    monkeypatch.setitem(lockstep.COLLECTIVES, name, lambda xs: [out * 1.01 for out in right(xs)])
    report = verified(program)
    assert not report.ok
    assert report.max_output_error > 1e-4
    assert report.first_divergence is not None
    assert "its value differs" in report.first_divergence


@pytest.mark.parametrize("plan", [tensor_parallel(2), sequence_parallel(2)])
def test_a_wrong_weight_is_caught(plan: Plan) -> None:
    """One rank's part of a bias that all hold has drifted."""
    model = MLP(F.gelu).double()
    program = fxshard.parallelize(model, plan, (X,))
    assert verified(program).ok, "before"
    with torch.no_grad():
        program.rank_module(1).down.bias += 1
    assert not verified(program).ok
