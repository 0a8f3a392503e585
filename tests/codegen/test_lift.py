"""Weights whose gradients are summed become inputs of the graph."""

from __future__ import annotations

import torch
from torch import nn

import fxshard
from fxshard.codegen.lift import Lifted, lift
from fxshard.runtime.collectives import vary_weight


def test_varied_weights_become_inputs() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4, bias=False))
    program = fxshard.parallelize(model, fxshard.data_parallel(2), (torch.randn(4, 4),))
    graph = program.compiled.graph
    before = [str(node) for node in graph.nodes]
    lifted_graph, lifted = lift(graph)
    lifted_graph.lint()
    assert [str(node) for node in graph.nodes] == before
    assert list(lifted) == [Lifted(name, ("dp",)) for name in ("0.weight", "0.bias", "2.weight")]
    inputs = lifted_graph.find_nodes(op="placeholder")
    assert len(inputs) == 1 + len(lifted)
    assert inputs[0].name == graph.find_nodes(op="placeholder")[0].name
    assert not lifted_graph.find_nodes(op="get_attr")
    assert not lifted_graph.find_nodes(op="call_function", target=vary_weight)


def test_weights_that_are_not_varied_stay() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    program = fxshard.parallelize(model, fxshard.tensor_parallel(2), (torch.randn(4, 4),))
    graph, lifted = lift(program.compiled.graph)
    assert not lifted
    assert [str(n) for n in graph.nodes] == [str(n) for n in program.compiled.graph.nodes]
