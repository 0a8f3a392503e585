"""Modules used in odd ways: shared, tied, borrowed, with lists, constants, buffers; the code computes the same."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxshard
from fxshard import Plan, Replicate, data_parallel, sequence_parallel, tensor_parallel
from fxshard.codegen import freeing
from tests.codegen.test_emit import Layer, Mlp, X, checked, classes_of
from tests.helpers import assert_equivalent
from tests.models.zoo import bert, gpt2, llama, t5, vit

ROOT = Path(__file__).resolve().parents[2]
PLANS = {
    "tp": tensor_parallel(2),
    "sp": sequence_parallel(2),
    "dp": data_parallel(2),
    "dp_tp": data_parallel(2) | tensor_parallel(2),
}


class Chain(nn.Module):
    """Modules one after the other."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def tied() -> nn.Module:
    """Weights that several modules share, and a module that stands in a list twice."""
    model = Chain(*(Layer() for _ in range(4)))
    model.layers[1].mlp.up.weight = model.layers[0].mlp.up.weight
    model.layers[3].mlp = model.layers[0].mlp
    return model


class Borrower(nn.Module):
    """Calls a module that belongs to another one."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.other = [other]
        self.first = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other[0](F.relu(self.first(x))).tanh() + 1


def borrowed() -> nn.Module:
    shared = Layer()
    model = Chain(Borrower(shared), Borrower(shared))
    model.shared = shared
    return model


class Constant(nn.Module):
    """Tensors that the code makes, which export lifts out under numbered names."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([torch.tensor([], dtype=x.dtype), x.flatten()]).view(x.shape)
        return self.mlp(x * torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8], dtype=x.dtype)).tanh()


class Inner(nn.Module):
    def forward(self, parts: Any, more: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        a, b, c = parts
        return (a * b.sigmoid() + more["x"]).tanh(), c.chunk(2, -1)[0].repeat(1, 1, 2)


class Lists(nn.Module):
    """Lists and dicts of tensors that cross a call."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.inner = Inner()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, z = self.inner(self.qkv(x).split(8, -1), {"x": x})
        return y + z


class Counting(nn.Module):
    """Buffers that every call updates."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return self.mlp(x) * self.count


class WithoutGrad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = (x.exp().sin() * 2).cos()
        return self.mlp(x) * y


class Cross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer()
        self.second = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        return self.layer(x).tanh() + self.second(memory).sigmoid()


class TwoStacks(nn.Module):
    """Every layer of the second stack reads the result of the first; a part of the first one runs again."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(Layer() for _ in range(3))
        self.decoder = nn.ModuleList(Cross() for _ in range(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        memory = x
        for layer in self.encoder:
            memory = layer(memory)
        y = memory * 2
        for layer in self.decoder:
            y = layer(y, memory)
        for layer in self.encoder[1:]:
            y = layer(y)
        return y, memory


class Names(nn.Module):
    """Modules under names that a program has itself."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("rank", "mesh", "place", "plan", "explain", "compiled", "axes"):
            self.add_module(name, Mlp())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for child in self.children():
            x = child(x)
        return x


class Attention(nn.Module):
    """Sizes that are known only at run time."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, 4, 2).transpose(1, 2)
        mask = torch.ones(t, t, dtype=torch.bool).tril()
        return x + self.o(F.scaled_dot_product_attention(q, q, q, mask).transpose(1, 2).reshape(b, t, 8))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "tied": tied,
    "borrowed": borrowed,
    "constants": lambda: Chain(*(Constant() for _ in range(3))),
    "lists": lambda: Chain(Lists(), Lists()),
    "buffers": lambda: Chain(Counting(), nn.BatchNorm1d(6), Counting()),
    "without_grad": lambda: Chain(WithoutGrad(), WithoutGrad()),
    "two_stacks": TwoStacks,
    "names": Names,
    "dynamic": lambda: Chain(*(Attention() for _ in range(3))),
}


@pytest.mark.thin(2)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", MODELS)
def test_odd_models(name: str, plan: str) -> None:
    options = (
        {"dynamic_shapes": {"x": {0: torch.export.Dim("b"), 1: torch.export.Dim("t")}}} if name == "dynamic" else {}
    )
    program = assert_equivalent(MODELS[name]().double(), PLANS[plan], (X.clone().requires_grad_(),), **options)
    checked(program)
    assert (
        dict(program.rank_module(1).named_parameters()).keys()
        == dict(program._original.get().named_parameters()).keys()
    )


def test_loops() -> None:
    keep = Plan({"tp": 2}, params={"*.second.weight": Replicate()})
    code = checked(fxshard.parallelize(TwoStacks(), tensor_parallel(2) | keep, (X.float(),)))
    assert (
        "        memory = x\n        for layer in self.encoder:\n            memory = layer(memory)  # f32[4, 6, 8]"
        in code
    )
    assert "        for layer in self.decoder:\n" in code
    assert "        for layer in self.encoder[1:3]:\n" in code
    assert set(classes_of(code)) == {"Mlp", "Layer", "Cross", "TwoStacks"}


def test_a_borrowed_module_is_written_where_it_is_called() -> None:
    keep = Plan({"tp": 2}, params={"*.first.weight": Replicate()})
    code = checked(fxshard.parallelize(borrowed(), tensor_parallel(2) | keep, (X.float(),)))
    assert set(classes_of(code)) == {"Borrower", "Chain"}
    assert "self.up = m.shared.mlp.up" in code  # the model reads the weights, and hands them to its layers


def test_conversions_do_not_cut_a_layer() -> None:
    """Between the layers of sequence_parallel nothing stands; the gathers of one are inside it."""
    layers = Chain(*(Layer() for _ in range(4)))
    code = checked(fxshard.parallelize(layers, sequence_parallel(2), (X.float(),)))
    assert len([name for name in classes_of(code) if name.startswith("Layer")]) <= 2
    assert code.count("all_gather(") + code.count("reduce_scatter(") <= 8


def test_albert_calls_one_layer_often() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AlbertConfig(
        vocab_size=64, embedding_size=32, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.AlbertModel(config).double().eval()
    program = assert_equivalent(model, tensor_parallel(2), (), {"input_ids": torch.arange(16).view(2, 8)})
    code = checked(program)
    assert code.count(" = self.albert_layers_0_2(") == 2  # the first call is another: its input comes split
    assert code.count("class AlbertLayer") == 2


# --- memory ----------------------------------------------------------------------------------------------------------


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.gate(x)
        hidden = self.up(x) * gate.transpose(0, 1).transpose(0, 1)
        return F.relu(self.down(F.relu(hidden) + 1))


def test_large_dead_values_are_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    program = fxshard.parallelize(Wide(), tensor_parallel(2), (X.float(),))
    assert "        del " not in program.code()
    monkeypatch.setattr(freeing, "LARGE", 1)
    assert "        del gate" in program.code()


@pytest.mark.thin(2)
@pytest.mark.parametrize("build", [llama, gpt2, bert, vit, t5], ids=lambda b: b.__name__)
def test_deletions_change_nothing(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freeing, "LARGE", 1)
    model, inputs = build()
    program = assert_equivalent(model.double().eval(), tensor_parallel(2), (), _double(inputs))
    code = checked(program)
    assert code.count("        del ") >= 3
    _check_format(code)


def _double(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


@pytest.mark.parametrize("name", MODELS)
def test_the_formatter_agrees(name: str) -> None:
    options = (
        {"dynamic_shapes": {"x": {0: torch.export.Dim("b"), 1: torch.export.Dim("t")}}} if name == "dynamic" else {}
    )
    _check_format(fxshard.parallelize(MODELS[name](), PLANS["dp_tp"], (X.float(),), **options).code())


def _check_format(code: str) -> None:
    command = [
        sys.executable,
        "-m",
        "ruff",
        "format",
        "--diff",
        "--line-length",
        "120",
        "--stdin-filename",
        "code.py",
        "-",
    ]
    done = subprocess.run(
        command, input=code, text=True, capture_output=True, cwd=ROOT, env={**os.environ}, check=False
    )
    assert not done.returncode, done.stdout
