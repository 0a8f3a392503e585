"""Activation checkpointing: what the model or the user asks for is written into the program, and changes no gradient.

A program of one rank runs without a process group, and computes anew for real. Real ranks:
``tests/distributed/test_checkpoint.py``.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.export import Dim
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

import fxshard
from fxshard import data_parallel, sequence_parallel, tensor_parallel
from fxshard.errors import PlanError
from tests.helpers import assert_equivalent, weighted_loss
from tests.models.zoo import build

X = torch.randn(4, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
anew = functools.partial(checkpoint, use_reentrant=False)


class Mlp(nn.Module):
    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(8, 16), nn.Linear(16, 8), nn.Dropout(p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.up(x))
        return self.drop(self.down(hidden))


class Layer(nn.Module):
    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(8), Mlp(p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


class Stack(nn.Module):
    """Layers, each called by a function of a test."""

    def __init__(self, call: Callable[..., Any] | None = None, count: int = 3, p: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(p) for _ in range(count))
        self.call = call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = self.call(layer, x) if self.call else layer(x)
        return x


def gradients(model: nn.Module, *args: Any) -> list[torch.Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    weighted_loss(model(*args)).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def kept_bytes(model: nn.Module, *args: Any) -> int:
    """The bytes that a forward pass keeps for the backward pass, beside weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        model(*args)
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in weights)


def check(model: nn.Module, *args: torch.Tensor, plain: nn.Module | None = None, **options: Any) -> str:
    """The code of a program that computes anew: its gradients are the model's, and it keeps less than without."""
    args = args or (X,)
    model = model.double().train()
    plain = plain or model
    program = fxshard.parallelize(copy.deepcopy(model), tensor_parallel(1), args, **options)
    assert "checkpoint(" in program.code()
    ours, theirs = gradients(program, *args), gradients(plain.double().train(), *args)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    return program.code()


# --- what asks for it ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_module_that_the_model_checkpoints(use_reentrant: bool) -> None:
    model = Stack(functools.partial(checkpoint, use_reentrant=use_reentrant))
    code = check(model, X.clone().requires_grad_())
    assert "        for layer in self.layers:\n            x = checkpoint(layer, x)  # f64[4, 6, 8]\n" in code


def test_modules_that_the_user_names() -> None:
    code = check(Stack(), checkpoint="layers.*")  # of layers.0 and layers.0.mlp the outermost
    assert code.count("checkpoint(") == 1
    assert "x = checkpoint(layer, x)" in code
    code = check(Stack(), checkpoint=["layers.*.mlp"])
    assert "checkpoint(self.mlp, " in code
    assert "x = layer(x)" in code
    code = check(Stack(), checkpoint=["layers.0", "layers.2.mlp"])
    assert code.count("checkpoint(") == 2
    assert "checkpoint(self.layers[0], x)" in code


def test_the_code_of_a_small_model() -> None:
    line = inspect.getsourcelines(Mlp.forward)[1] + 1
    nested = nn.Sequential(Mlp(0.1), nn.Linear(8, 8)).double().train()
    program = fxshard.parallelize(nested, {"0.up.*": fxshard.Shard(0), "0.down.weight": fxshard.Shard(1)}, (X,),
        mesh={"tp": 2}, checkpoint="0")  # fmt: skip
    assert (
        program.code()
        == f'''\
"""Sequential, rank 0 of 2 (tp=0)."""

import torch
from torch.nn import functional as F

from fxshard.runtime.collectives import all_reduce, vary
from fxshard.runtime.recompute import checkpoint

# fxshard.runtime.module.load gives: tp, the Axis of 2 ranks.


class Mlp:
    """0"""

    def __init__(self, m):
        self.up = m.up
        self.down = m.down

    def __call__(self, input_):
        input_ = vary(input_, tp, inplace=True)  # f64[4, 6, 8]  tp: Varying
        # test_recomputation.py:{line}: hidden = torch.tanh(self.up(x))
        hidden = F.linear(input_, self.up.weight, self.up.bias)  # f64[4, 6, 8]  tp: Shard(2)
        hidden = hidden.tanh()  # f64[4, 6, 8]  tp: Shard(2)
        # test_recomputation.py:{line + 1}: return self.drop(self.down(hidden))
        down = F.linear(hidden, self.down.weight)  # f64[4, 6, 8]  tp: Partial(sum)
        down = all_reduce(down, tp, inplace=True)  # f64[4, 6, 8]
        down = down + self.down.bias  # f64[4, 6, 8]
        drop = torch.dropout(down, 0.1, True)  # f64[4, 6, 8]
        return drop


class Sequential:
    """The whole model."""

    def __init__(self, m):
        self.layer_0 = Mlp(m[0])
        self.layer_1 = m[1]

    def __call__(self, input_):
        dropout = checkpoint(self.layer_0, input_, draws=True)  # f64[4, 6, 8]
        linear = F.linear(dropout, self.layer_1.weight, self.layer_1.bias)  # f64[4, 6, 8]
        return (linear,)


def build(m):
    """The model over one rank's weights."""
    return Sequential(m)
'''
    )


def test_a_function_is_a_class_of_its_own() -> None:
    class Half(Layer):
        def half(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.mlp.up(self.norm(x))).sin()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.mlp.down(anew(self.half, x))

    code = check(nn.Sequential(Half(), Half()))
    assert 'class HalfHalf:\n    """half in 0, 1"""' in code
    assert "self.half = HalfHalf(m)" in code
    assert "checkpoint(self.half, " in code


def test_a_function_of_the_whole_model() -> None:
    class Whole(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return anew(lambda y: self.mlp(y).sin().cos(), self.norm(x)) * 2

    code = check(Whole())
    assert "self.part = WholePart(m)" in code
    assert "checkpoint(self.part, " in code


def test_a_module_that_another_one_holds() -> None:
    class Borrowing(nn.Module):
        def __init__(self, layer: Layer) -> None:
            super().__init__()
            self.own = nn.Linear(8, 8)
            self.borrowed = [layer]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return anew(self.borrowed[0], self.own(x).sin().cos()) + x

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Layer()
            self.borrowing = Borrowing(self.layer)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.borrowing(self.layer(x))

    assert "checkpoint(self.layer, " in check(Both())


def test_segments_of_a_sequence() -> None:
    class Segments(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint_sequential(self.layers, 2, x, use_reentrant=False)

    code = check(Segments(count=4))
    assert code.count("checkpoint(") == 1  # the last segment is kept, as torch does


def test_one_that_is_called_twice() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Layer()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(x))

    assert check(Shared(), checkpoint="layer").count("checkpoint(self.layer, ") == 2


# --- that it changes nothing, but what is kept -----------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_dropout_draws_the_same_again(use_reentrant: bool) -> None:
    x = X.clone().requires_grad_()
    plain = Stack(p=0.5)
    model = copy.deepcopy(plain)
    model.call = functools.partial(checkpoint, use_reentrant=use_reentrant)
    assert "draws=True" in check(model, x, plain=plain)
    assert "draws=True" in check(plain, checkpoint="layers.*")
    assert not torch.equal(gradients(plain, X)[0], gradients(plain.eval(), X)[0])


def test_less_is_kept() -> None:
    model = Stack(count=8).double()
    programs = [fxshard.parallelize(model, tensor_parallel(1), (X,), checkpoint=c) for c in ((), "layers.*")]
    plain, less = (kept_bytes(program, X) for program in programs)
    assert less * 3 < plain
    assert less == 8 * X.untyped_storage().nbytes()  # the input of every layer, and nothing else


class Counting(nn.Module):
    """Reads a buffer, and its view, that it changes at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("scale", torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.linear(x) * self.scale.clone()) * self.scale[None].sin()
        self.scale += 1
        return y


def test_what_was_read_before_a_write_is_read_again() -> None:
    model = nn.Sequential(Counting(), Counting())
    code = check(copy.deepcopy(model), checkpoint=["0", "1"], plain=model)
    assert code.count("_2.scale.clone()") == 2
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(6), nn.Tanh())
    check(copy.deepcopy(model), checkpoint="*", plain=model)


def test_running_statistics_are_those_of_one_pass() -> None:
    """In eager mode a checkpointed batch norm is run twice, and its statistics go twice as far."""
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(6), nn.Tanh()).double()
    program = fxshard.parallelize(model, tensor_parallel(1), (X,), checkpoint="1")
    gradients(program, X)
    model(X)
    for name, want in model.state_dict().items():
        torch.testing.assert_close(program.full_state_dict()[name], want)


def test_dynamic_sizes() -> None:
    model = Stack().double()
    shapes = ({0: Dim("batch", min=2, max=64), 1: Dim("length", min=2, max=64)},)
    program = fxshard.parallelize(model, tensor_parallel(1), (X,), dynamic_shapes=shapes, checkpoint="layers.*")
    for x in (X, X[:3, :5], X[:, 1:]):
        for a, b in zip(gradients(program, x), gradients(model, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_without_gradients_nothing_is_computed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    program = fxshard.parallelize(Stack().double(), tensor_parallel(1), (X,), checkpoint="layers.*")
    monkeypatch.setattr("fxshard.runtime.recompute.checkpoint_whole", None)
    with torch.no_grad():
        program(X)
    with pytest.raises(TypeError):
        program(X)


@pytest.mark.parametrize("plan", [tensor_parallel(2), sequence_parallel(2), data_parallel(2)], ids=str)
def test_a_simulation_keeps_all(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxshard.runtime.recompute.checkpoint_whole", None)
    program = assert_equivalent(Stack().double(), plan, (X,), checkpoint="layers.*")
    assert fxshard.verify(program, X).ok


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_transformers(use_reentrant: bool) -> None:
    """With an embedding that is frozen, as adapters have it: a hook makes its output require a gradient."""
    model, inputs = copy.deepcopy(build("llama", training=True))
    inputs["use_cache"] = False
    model.model.embed_tokens.requires_grad_(False)
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    program = fxshard.parallelize(model, tensor_parallel(1), (), inputs)
    assert "checkpoint(layer, hidden_states, " in program.code()
    found = []
    for each in (program, model):
        torch.manual_seed(5)
        each.zero_grad(set_to_none=True)
        each(**inputs).logits.square().mean().backward()
        found.append([p.grad for p in each.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# --- what is said ----------------------------------------------------------------------------------------------------


def test_what_is_communicated_again_is_listed() -> None:
    plain, program = (
        fxshard.parallelize(Stack(p=0.1).double(), tensor_parallel(2), (X,), checkpoint=c) for c in ((), "layers.*")
    )
    before, after = plain.collectives(), program.collectives()
    again = [c for c in after if c.again]
    assert [c for c in after if not c.again] == before
    assert [(c.phase, c.kind, c.module) for c in again] == [
        ("backward", "all_reduce", f"layers.{i}.mlp.down") for i in (2, 1, 0)
    ]
    assert all("computed anew in the backward pass" in c.reason for c in again)
    text = program.explain()
    assert "backward: all_reduce of f64[4, 6, 8] over tp, 1,536 bytes, 3 times" in text
    # Behind `down` nothing of a layer is kept, so nothing behind it is computed anew, but for dropout.
    program = fxshard.parallelize(Stack().double(), tensor_parallel(2), (X,), checkpoint="layers.*")
    assert not [c for c in program.collectives() if c.again]


def test_the_table_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    fxshard.parallelize(Stack(p=0.1), tensor_parallel(2), (X.float(),), checkpoint="layers.*").print_tabular()
    assert capsys.readouterr().out.count("all_reduce again") == 3


def notes(caplog: pytest.LogCaptureFixture, model: nn.Module, **options: Any) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "fxshard"):
        program = fxshard.parallelize(model.double(), tensor_parallel(1), (X,), **options)
    said = [record.message for record in caplog.records if record.name == "fxshard"]
    assert all(note in program.explain() for note in said)
    return said


def test_one_within_another_goes_with_it(caplog: pytest.LogCaptureFixture) -> None:
    class Inner(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + anew(self.mlp, self.norm(x))

    model = Stack(anew)
    model.layers[1] = Inner()
    check(copy.deepcopy(model))
    assert notes(caplog, model) == [
        "checkpoint of Mlp in layers.1.mlp: within another checkpointed call, and computed anew with it, not by itself"
    ]
    assert notes(caplog, Stack(), checkpoint="layers.*") == []


def test_a_policy_is_not_followed(caplog: pytest.LogCaptureFixture) -> None:
    def keep(*args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE

    context = functools.partial(create_selective_checkpoint_contexts, keep)
    model = Stack(functools.partial(anew, context_fn=context))
    check(copy.deepcopy(model))
    assert notes(caplog, model) == [
        "checkpoint of Layer: its context_fn is not followed, everything in it is computed anew"
    ]


def test_globs_that_match_nothing_are_refused() -> None:
    model = Stack()
    with pytest.raises(PlanError, match=r"checkpoint 'layer\.\*' matches no module of the model") as caught:
        fxshard.parallelize(model, tensor_parallel(2), (X.float(),), checkpoint="layer.*")
    assert "the nearest names are 'layers.2'" in str(caught.value)
    with pytest.raises(PlanError, match=r"matches 'layers', which is not called") as caught:
        fxshard.parallelize(model, tensor_parallel(2), (X.float(),), checkpoint=["layers"])
    assert "'layers.*'" in str(caught.value)
    with pytest.raises(PlanError, match=r"2 entries of checkpoint cannot be applied:\n1\. .*'a' matches no"):
        fxshard.parallelize(model, tensor_parallel(2), (X.float(),), checkpoint=["a", "layers.0", "layers"])


class Folds(nn.Module):
    """A layer whose last operator is a view with sizes in it, which are local where its rows are split."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Folded()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x)
        return out


class Folded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.down.bias, self.up(x).relu().view(-1, 16), self.down.weight.T).view(x.shape)


def test_what_a_call_asks_for_last_is_found_where_its_rows_are_split() -> None:
    """The sum behind the last matrix is not computed anew: nothing needs it, and the call stops before."""
    plan = fxshard.data_parallel(2) | fxshard.tensor_parallel(2)
    program = fxshard.parallelize(Folds(), plan, (torch.randn(4, 6, 8),), checkpoint="layer")
    assert [c.reason for c in program.collectives() if c.again] == []
