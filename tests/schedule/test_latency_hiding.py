"""Which collectives are under way, where they begin and end, and that the graph they leave is equal."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

import fxshard
from fxshard import Plan, Shard
from fxshard.ir.conversions import BEGIN
from fxshard.runtime.async_collectives import wait

X = torch.randn(2, 8, 16)
GATHERED = Plan({"tp": 2}, params={"key.weight": {"tp": Shard(0)}}, activations={"key": {"tp": fxshard.Replicate()}})


class Beside(nn.Module):
    """A product whose result is gathered, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.value, self.out = (nn.Linear(16, 16, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        key = self.key(x).unflatten(-1, (4, 4)).transpose(1, 2)
        value = self.value(x).unflatten(-1, (4, 4)).transpose(1, 2)
        y = F.scaled_dot_product_attention(value, key, value)
        out: torch.Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


class Straight(Beside):
    """One product after the other."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(self.value(self.key(x)))
        return out


def written(model: nn.Module, plan: Any = GATHERED, **options: Any) -> list[str]:
    program = fxshard.parallelize(model, plan, (X,), **options)
    assert fxshard.verify(program, X), "the program differs from the model"
    return [_name(node) for node in program.compiled.graph_for(0, "schedule").nodes if node.op == "call_function"]


def _name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return str(schema.name if schema is not None else node.target.__name__)  # type: ignore[union-attr]


def test_a_collective_begins_early_and_is_waited_for_late() -> None:
    names = written(Beside())
    assert names.index("begin_all_gather") == names.index("aten::linear") + 1
    assert "aten::scaled_dot_product_attention" in names[names.index("wait") : names.index("wait") + 4]
    between = names[names.index("begin_all_gather") : names.index("wait")]
    assert "aten::linear" in between
    assert "all_gather" not in names


def test_what_is_read_at_once_stays() -> None:
    assert "wait" not in written(Straight())


def test_a_call_that_is_computed_anew_stays() -> None:
    names = written(nn.Sequential(Beside()), _inside("0"), checkpoint="0")
    assert "wait" not in names
    assert "wait" in written(nn.Sequential(Beside()), _inside("0"))


def _inside(path: str) -> Plan:
    return Plan(
        {"tp": 2},
        params={f"{path}.key.weight": {"tp": Shard(0)}},
        activations={f"{path}.key": {"tp": fxshard.Replicate()}},
    )


def test_uneven_parts_stay() -> None:
    plan = Plan({"tp": 3}, params=GATHERED.params, activations=GATHERED.activations)
    assert "wait" not in written(Beside(), plan)


def test_every_layer_alike() -> None:
    """Layers that are alike are written once."""
    model = nn.Sequential(*(Beside() for _ in range(4)))
    plan = Plan(
        {"tp": 2},
        params={"*.key.weight": {"tp": Shard(0)}},
        activations={"*.key": {"tp": fxshard.Replicate()}},
    )
    code = fxshard.parallelize(model, plan, (X,)).code()
    assert code.count("begin_all_gather(") == 2
    assert '"""1 to 3"""' in code


def test_the_graph_that_came_in_is_as_it_was() -> None:
    compiled = fxshard.parallelize(Beside(), GATHERED, (X,)).compiled
    before = str(compiled.graph)
    compiled.graph_for(0, "schedule").lint()
    assert str(compiled.graph) == before
    assert not any(node.target in {*BEGIN.values(), wait} for node in compiled.graph.nodes)


def test_exchanges_around_attention_run_side_by_side() -> None:
    names = written(Beside(), fxshard.context_parallel(2))
    begun = [at for at, name in enumerate(names) if name == "begin_all_to_all"]
    assert len(begun) == 1  # the other one is read at once
    assert "all_to_all" in names[begun[0] : names.index("wait")]
