"""Reductions are in place where nothing else reads the summands, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import fxshard
from fxshard import Plan, Shard
from fxshard.runtime.collectives import all_reduce, vary
from fxshard.schedule.reduce_in_place import reduces_in_place

aten = torch.ops.aten


class Net(nn.Module):
    """Two linear layers, and a function between and behind them."""

    def __init__(self, forward: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8, bias=False), nn.Linear(8, 4, bias=False)
        self.compute = forward

    def forward(self, x: torch.Tensor) -> Any:
        return self.compute(self, x)


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
ROWS = Plan({"tp": 2}, params={"up.weight": Shard(0), "down.weight": Shard(1)})


def reductions(forward: Callable[[Any, torch.Tensor], Any], target: Any) -> list[bool]:
    program = fxshard.parallelize(Net(forward), ROWS, (X.clone().requires_grad_(),))
    nodes = [n for n in program.graph_after("optimize").nodes if n.target is target]
    assert not any("inplace" in n.kwargs for n in program.graph_after("localize").nodes)
    return [bool(n.kwargs.get("inplace")) for n in nodes]


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda m, x: m.down(m.up(x)), True),
        (lambda m, x: (y := m.down(m.up(x))).sin() + 0 * y.shape[0], True),
        (lambda m, x: (m.down(m.up(x)) * 2).relu(), True),
        (lambda m, x: m.down(m.up(x)).transpose(0, 1).relu(), False),  # a view: of what, another may read
    ],
)
def test_all_reduce(forward: Callable[[Any, torch.Tensor], Any], expected: bool) -> None:
    found = reductions(forward, all_reduce)
    assert found
    assert all(found) == expected


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda m, x: m.down(m.up(x)), True),
        (lambda m, x: m.down(F.linear(x, m.up.weight) + m.up(x)), True),
    ],
)
def test_vary(forward: Callable[[Any, torch.Tensor], Any], expected: bool) -> None:
    found = reductions(forward, vary)
    assert found
    assert all(found) == expected


def written(target: Any, *readers: Any) -> bool:
    """Whether ``target`` of a linear layer's result, read by ``readers`` as they read a first operand, is in place."""
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    node = graph.call_function(target, (graph.call_function(aten.linear.default, (x, w)), "tp"))
    graph.output(tuple(graph.call_function(reader, (node, w)) for reader in readers))
    return reduces_in_place(node)


def test_all_readers_of_a_varied_value_count() -> None:
    assert written(vary, aten.linear.default, aten.mm.default)
    assert not written(vary, aten.linear.default, aten.add.Tensor)  # gives its own gradient on, to both operands
    assert not written(vary)


def test_the_summand_is_read_once() -> None:
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    summand = graph.call_function(aten.linear.default, (x, w))
    total = graph.call_function(all_reduce, (summand, "tp"))
    assert reduces_in_place(total)
    graph.call_function(aten.relu.default, (summand,))
    assert not reduces_in_place(total)


def test_what_autograd_keeps_is_not_overwritten() -> None:
    graph = fx.Graph()
    total = graph.call_function(all_reduce, (graph.call_function(aten.exp.default, (graph.placeholder("x"),)), "tp"))
    assert not reduces_in_place(total)
