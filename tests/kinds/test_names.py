"""Names of modules, weights, classes and buffers are data: whatever their spelling, they never become code."""

from __future__ import annotations

import os
import tokenize
from io import StringIO

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxshard
from fxshard import Plan, Shard
from tests.helpers import assert_equivalent
from tests.presets import preset

X = torch.linspace(-1, 1, 32, dtype=torch.float64).view(4, 8)
RAN = "/tmp/fxshard-test-names"


class Chain(nn.Module):
    """Blocks under any names, whose weights, buffers and classes have such names, too."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        for name in names:
            self._modules[name] = type(name, (Block,), {"__module__": __name__})(name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self._modules.values():
            assert block is not None
            x = block(x)
        return x


class Block(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self._parameters[name] = nn.Parameter(torch.randn(16, 8, dtype=torch.float64))
        self._parameters[f"{name}2"] = nn.Parameter(torch.randn(8, 16, dtype=torch.float64))
        self._buffers[f"{name}3"] = torch.rand(8, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, down = self._parameters[self.name], self._parameters[f"{self.name}2"]
        shift = self._buffers[f"{self.name}3"]
        assert up is not None
        assert down is not None
        assert shift is not None
        return x + (torch.tanh(x @ up.T) @ down.T) * shift


EVIL = f'"""\nopen("{RAN}", "w")\n"""'
NAMES = [
    *("00", "0", "1", "01", "²", "2", "٣", "µ", "μ", "ﬁle", "file", "class", "in", "None", 'a"b', "a'b", "a\\", "a b"),
    *("code", "graph", "meta", "plan", "mesh", "options", "compiled", "rank", "capture", "explain", "axes", "find"),
    *("m", "self", "F", "torch", "aten", "device", "build", "__x", "__x__"),
    *("{0}", "%s", " ", "\n", "\t", "\x0c", "\u2028", "a" * 300, EVIL, "[0]", "*"),
]
ANY = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=".\0"), min_size=1, max_size=6)


def check(names: list[str], plan: str) -> None:
    model = Chain(names)
    program = assert_equivalent(model, preset(plan), (X,))
    for rank in range(program.mesh.world_size):
        list(tokenize.generate_tokens(StringIO(program.code(rank)).readline))
    whole, state = program.full_state_dict(), model.state_dict()
    assert list(whole) == list(state)
    assert all(torch.equal(whole[name], value) for name, value in state.items())
    assert not os.path.exists(RAN), "a name was run"
    assert program.explain()
    assert "tanh" in program.graph_module.code


@pytest.mark.parametrize("plan", ["tp2", "dp2", "zero2"])
def test_odd_names(plan: str) -> None:
    check(NAMES, plan)


@settings(max_examples=10)
@given(st.lists(ANY, min_size=1, max_size=12, unique=True), st.sampled_from(["tp2", "dp2"]))
def test_any_names(names: list[str], plan: str) -> None:
    check([name for name in names if not hasattr(nn.Module, name)], plan)


@pytest.mark.parametrize("axis", ["µ", "torch", "F", "class_", "device", "axes", "x", "ﬁ", "self", "m", "all_reduce"])
def test_odd_names_of_mesh_axes(axis: str) -> None:
    plan = Plan({axis: 2}, params={"a.a": {axis: Shard(0)}, "a.a2": {axis: Shard(1)}})
    assert_equivalent(Chain(["a"]), plan, (X,))


def test_a_plan_names_them_as_the_model_does() -> None:
    plan = {'a"b.a"b': Shard(0), 'a"b.a"b2': Shard(1)}
    program = fxshard.parallelize(Chain(['a"b']), plan, (X,), mesh={"tp": 2})
    assert program.placements_of('a"b.a"b') == (Shard(0),)
    assert Plan.from_json(program.plan.to_json()) == program.plan
