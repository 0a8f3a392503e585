"""The source that a rank runs: what it looks like, and that it computes the model whatever things are called."""

from __future__ import annotations

import ast
import inspect
import re
import time
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxshard
from fxshard import data_parallel, sequence_parallel, tensor_parallel
from fxshard.codegen.emit import emit
from fxshard.codegen.text import WIDTH, statement, summarize
from tests.helpers import assert_equivalent
from tests.models.zoo import llama


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(self.up(x))
        return self.down(hidden)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.mlp = Mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


class Stack(nn.Module):
    """Layers one after the other, and a head."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(count))
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


X = torch.randn(4, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def code_of(model: nn.Module, plan: Any, *args: torch.Tensor) -> str:
    """The code of a model that was found to compute the same as the original."""
    return checked(assert_equivalent(model.double(), plan, args or (X.clone().requires_grad_(),)))


def checked(program: fxshard.ParallelModule) -> str:
    """The code of a program: valid, in lines of the width, without unused imports."""
    code = program.code()
    tree = ast.parse(code)
    assert max(map(len, code.splitlines())) <= WIDTH
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert {alias.asname or alias.name for alias in node.names} <= used
    return code


def classes_of(code: str) -> dict[str, str]:
    """Class -> its docstring."""
    return {n.name: ast.get_docstring(n) or "" for n in ast.parse(code).body if isinstance(n, ast.ClassDef)}


# --- what it looks like ----------------------------------------------------------------------------------------------


def test_a_small_mlp() -> None:
    line = inspect.getsourcelines(Mlp.forward)[1] + 1
    assert (
        code_of(Mlp(), tensor_parallel(2))
        == f'''\
"""Mlp, rank 0 of 2 (tp=0)."""

from torch.nn import functional as F

from fxshard.runtime.collectives import all_reduce, vary

# fxshard.runtime.module.load gives: tp, the Axis of 2 ranks.


class Mlp:
    """The whole model."""

    def __init__(self, m):
        self.up = m.up
        self.down = m.down

    def __call__(self, x):
        x = vary(x, tp, inplace=True)  # f64[4, 6, 8]  tp: Varying
        # test_emit.py:{line}: hidden = F.relu(self.up(x))
        hidden = F.linear(x, self.up.weight, self.up.bias)  # f64[4, 6, 8]  tp: Shard(2)
        hidden = hidden.relu()  # f64[4, 6, 8]  tp: Shard(2)
        # test_emit.py:{line + 1}: return self.down(hidden)
        down = F.linear(hidden, self.down.weight)  # f64[4, 6, 8]  tp: Partial(sum)
        down = all_reduce(down, tp, inplace=True)  # f64[4, 6, 8]
        down = down + self.down.bias  # f64[4, 6, 8]
        return (down,)


def build(m):
    """The model over one rank's weights."""
    return Mlp(m)
'''
    )


def test_equal_layers_are_one_class_and_a_loop() -> None:
    code = code_of(Stack(3), tensor_parallel(2))
    assert classes_of(code) == {
        "Mlp": "layers.0.mlp to layers.2.mlp",
        "Layer": "layers.0 to layers.2",
        "Stack": "The whole model.",
    }
    assert "self.layers = [Layer(m.layers[i]) for i in range(3)]" in code
    assert "        for layer in self.layers:\n            x = layer(x)  # f64[4, 6, 8]\n" in code


def test_layers_that_differ_are_classes_of_their_own() -> None:
    model = Stack(4)
    model.layers[1].norm = nn.LayerNorm(8, eps=1e-3)
    code = code_of(model, tensor_parallel(2))
    assert classes_of(code) == {
        "Mlp": "layers.0.mlp to layers.3.mlp",
        "Layer": "layers.0, layers.2, layers.3",
        "Layer2": "layers.1",
        "Stack": "The whole model.",
    }
    assert "[Layer(m.layers[0]), Layer2(m.layers[1]), *(Layer(m.layers[i]) for i in range(2, 4))]" in code


def test_four_llama_layers_are_one_class() -> None:
    model, inputs = llama(num_hidden_layers=4)
    program = fxshard.parallelize(model.eval(), tensor_parallel(2), (), {**inputs, "use_cache": False})
    classes = classes_of(checked(program))
    assert classes["LlamaDecoderLayer"] == "model.layers.0 to model.layers.3"
    assert classes["LlamaMLP"] == "model.layers.0.mlp to model.layers.3.mlp"
    assert not [name for name in classes if name[-1].isdigit()]
    assert program.code().count("all_reduce(") == 2 + 1  # of a layer, and of the embedding


def test_every_rank_runs_the_same_statements() -> None:
    program = fxshard.parallelize(Stack(2), data_parallel(2) | tensor_parallel(2), (X.float(),))
    titles, bodies = zip(*(program.code(r).split("\n", 1) for r in range(4)), strict=True)
    assert len(set(bodies)) == 1
    assert titles[3] == '"""Stack, rank 3 of 4 (dp=1, tp=1)."""'


def test_a_calls_weights_that_are_converted_once_keep_their_names() -> None:
    """Under data_parallel a shared layer's weights are made to vary in its first call, for the later ones too."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Layer()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(self.layer(x)))

    code = code_of(Shared(), data_parallel(2))
    assert set(classes_of(code).values()) == {"layer.mlp", "layer", "The whole model."}
    assert code.count(" = vary_weight(") == 6  # norm, up and down: weight and bias
    plain = code_of(Shared(), tensor_parallel(2))
    assert classes_of(plain) == {"Mlp": "layer.mlp", "Layer": "layer", "Shared": "The whole model."}
    assert plain.count("self.layer(") == 3


def test_without_use_of_a_weight_a_class_takes_none() -> None:
    class Act(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.exp().sin().cos().tanh()

    code = code_of(nn.Sequential(nn.Linear(8, 8), Act()), tensor_parallel(2))
    assert "= Act()" in code
    assert "import torch" not in code.replace("from torch.nn import functional", "")


def test_comments_name_no_module_that_is_not_imported() -> None:
    """`aten` and `torch` in a user's line, or in a path, are no reason to import them; `checked` looks."""

    class User(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.aten = Layer()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sigmoid(self.aten(x)) + 1

    assert "import torch\n" in code_of(User(), tensor_parallel(2))  # for layer_norm
    assert "aten = torch.ops.aten" not in code_of(User(), tensor_parallel(2))


# --- whatever things are called --------------------------------------------------------------------------------------


class Names(nn.Module):
    """Modules, weights and inputs under the names of what generated code uses itself."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("m", "torch", "F", "self", "tp", "build", "vary", "aten", "None_"):
            self.add_module(name, Layer())
        self.match = nn.Parameter(torch.ones(8))
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(8)) for _ in range(2)])

    def forward(self, tp: torch.Tensor, device: torch.Tensor, vary: torch.Tensor, list: torch.Tensor) -> torch.Tensor:
        torch_ = self.m(tp) * self.match
        axes = self.torch(torch_)
        all_reduce = self.F(axes) + self.vary(device)
        build = self.build(self.tp(self.get_submodule("self")(all_reduce)))
        F_ = self.aten(build) + torch.zeros(8, dtype=vary.dtype, device=vary.device)
        return self.None_(F_) * self.scales[0] + vary * list * self.scales[1]


@pytest.mark.parametrize("axis", ["tp", "class", "torch", "F", "all_reduce", "self", "device", "axes", "list", "Layer"])
def test_names_that_collide(axis: str) -> None:
    Names.__name__ = Names.__qualname__ = "torch" if axis == "F" else "Names"
    code = code_of(Names(), tensor_parallel(2, axis), *[X.clone() for _ in range(4)])
    assert f"load gives: {axis}, the Axis of 2 ranks" in code or f'load gives: axes["{axis}"], the Axis' in code


@pytest.mark.parametrize("plan", [tensor_parallel(2), sequence_parallel(2), data_parallel(2)], ids=["tp", "sp", "dp"])
def test_odd_roots(plan: Any) -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.ModuleList(Layer() for _ in range(2)) for _ in range(2))

        def forward(self, x: torch.Tensor) -> tuple[Any, ...]:
            for layers in self.layers:
                for layer in layers:
                    x = layer(x)
            return x, {"n": 3, "s": 'a "quoted" one', "none": None}, [float("inf") * x.new_ones(2)], x.shape[1]

    assert classes_of(code_of(Nested(), plan))["Layer"] == "layers.0.0 to layers.1.1"
    code_of(nn.Linear(8, 8), plan)
    code_of(nn.Sequential(Layer(), nn.ReLU(), Layer()), plan)


@pytest.mark.parametrize("plan", [tensor_parallel(2), data_parallel(2)], ids=["tp", "dp"])
def test_models_without_parameters(plan: Any) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.acts = nn.ModuleList([nn.ReLU(), nn.Identity()])

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            for act in self.acts:
                x = act(x)
            return (x * 2,)

    for model, expected in ((Plain(), X.relu() * 2), (nn.Identity(), X)):
        program = fxshard.parallelize(model, plan, (X,))
        checked(program)
        output = fxshard.simulate(program, X).outputs[1]
        assert torch.equal(output if isinstance(output, torch.Tensor) else output[0], expected)


def test_a_traceback_shows_the_generated_line() -> None:
    program = fxshard.parallelize(Mlp(), tensor_parallel(2), (torch.randn(4, 8),))
    function = program.function(program.compiled, 0, {})  # without its axes
    with pytest.raises(NameError) as error:
        function(program.rank_module(0), torch.randn(4, 8))
    assert str(error.traceback[-1].statement).strip().startswith("x = vary(x, tp,")


# --- text ------------------------------------------------------------------------------------------------------------


def test_long_statements_are_broken_and_still_parse() -> None:
    code = f"x = f({', '.join(f'argument_{i}' for i in range(30))}, [1, 2], 'a, b)')"
    lines = list(statement(8, code, "f32[4]"))
    assert lines[0] == "        # f32[4]"
    assert max(map(len, lines)) <= WIDTH
    assert ast.dump(ast.parse("\n".join(line[8:] for line in lines))) == ast.dump(ast.parse(code))


@pytest.mark.parametrize(
    ("paths", "text"),
    [
        ([f"h.{i}" for i in range(32)], "h.0 to h.31"),
        (["h.0", "h.0"], "h.0"),
        (["h.0", "h.1"], "h.0, h.1"),
        (["h.0.e.0", "h.0.e.1", "h.1.e.0", "h.1.e.1"], "h.0.e.0 to h.1.e.1"),
        (["h.0.e.0", "h.1.e.0", "h.2.e.0", "h.2.e.1"], "h.0.e.0 to h.2.e.0, h.2.e.1"),
        (["h.0", "h.2", "h.4", "x3.y"], "h.0, h.2, h.4, x3.y"),
        ([f"h.{2 * i}" for i in range(10)], f"{', '.join(f'h.{2 * i}' for i in range(8))}, and 2 more"),
    ],
)
def test_summaries_of_paths(paths: list[str], text: str) -> None:
    assert summarize(paths) == text


def test_emit_is_fast() -> None:
    model, inputs = llama(num_hidden_layers=8)
    program = fxshard.parallelize(model.eval(), tensor_parallel(2), (), {**inputs, "use_cache": False})
    graph = program.compiled.graph
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        emit(graph, program.mesh, "")
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 100e-6 * len(graph.nodes)  # about 8e-6 on an idle machine
    assert len(re.findall("^class ", program.code(), re.MULTILINE)) == 8


class TripleGradient(torch.autograd.Function):
    """As one is that a script defines, which is run by itself."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.relu()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return 3 * grad


TripleGradient.__module__ = "__main__"


class Private(nn.Module):
    """Names of two underscores, which Python changes within a class."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("__up", nn.Linear(8, 16))
        self.add_module("down", nn.Linear(16, 8))
        self.register_parameter("__scale", nn.Parameter(torch.randn(16)))

    def forward(self, __x: torch.Tensor) -> torch.Tensor:
        hidden = getattr(self, "__up")(__x) * getattr(self, "__scale")
        out: torch.Tensor = self.down(TripleGradient.apply(hidden))  # type: ignore[no-untyped-call]
        return out


def test_names_of_two_underscores_are_not_those_of_a_class() -> None:
    program = assert_equivalent(Private(), tensor_parallel(2), (torch.randn(4, 8),))
    assert "torch.ops.fxshard_function.main_TripleGradient" in program.code()
