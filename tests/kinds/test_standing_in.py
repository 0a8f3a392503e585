"""A program stands in for its model, or refuses: what people do to modules, one by one."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import fxshard
from fxshard import data_parallel, tensor_parallel
from fxshard.errors import CaptureError, FxshardError, InputError
from tests.distributed import inside
from tests.distributed.launch import launch

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.down(self.up(x).relu()))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = {"width": 8}
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.register_buffer("shift", torch.zeros(8))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def get_input_layer(self) -> nn.Module:
        return self.layers[0].up

    def forward(self, hidden: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden * scale + self.shift


def made(plan: fxshard.Plan | None = None) -> fxshard.ParallelModule:
    torch.manual_seed(0)
    return fxshard.parallelize(Net(), plan or tensor_parallel(2), (X,))


# --- what is refused --------------------------------------------------------------------------------------------------


def hook(*args: Any) -> None:
    """Does nothing."""


REFUSED: dict[str, tuple[Callable[[Any], object], str]] = {
    "a weight": (lambda p: setattr(p.layers[0].up, "weight", nn.Parameter(torch.zeros(8, 8))), "layers.0.up.weight"),
    "a buffer": (lambda p: setattr(p, "shift", torch.ones(8)), "the program.shift"),
    "a module": (lambda p: setattr(p.layers[1], "norm", nn.Identity()), "layers.1.norm cannot be given another"),
    "none for a weight": (lambda p: setattr(p.layers[0].up, "bias", None), "layers.0.up.bias"),
    "a deleted weight": (lambda p: delattr(p.layers[0].up, "bias"), "layers.0.up.bias cannot be deleted"),
    "a new module": (lambda p: p.add_module("more", nn.Linear(2, 2)), "nothing can be added"),
    "a new parameter": (lambda p: p.layers[0].register_parameter("w", None), "nothing can be added to layers.0"),
    "a module put into a list": (lambda p: p.layers.insert(0, nn.Identity()), "the modules in layers cannot be"),
    "a module appended": (lambda p: p.layers.append(nn.Identity()), "nothing can be added|the modules in layers"),
    "a module taken from a list": (lambda p: p.layers.pop(0), "cannot be deleted: the program"),
    "forward of a part, patched": (
        lambda p: setattr(p.layers[0].norm, "forward", hook),
        "cannot be given another func",
    ),
    "a forward hook": (lambda p: p.layers[0].register_forward_hook(hook), "a hook on layers.0 would never run"),
    "a hook before": (lambda p: p.layers[0].norm.register_forward_pre_hook(hook), "a hook on layers.0.norm"),
    "a backward hook": (lambda p: p.layers[0].register_full_backward_hook(hook), "a hook on layers.0 would"),
    "whole weights for a part": (
        lambda p: p.layers[0].load_state_dict(Net().layers[0].state_dict()),
        "layers.0 is a part of a program, and cannot",
    ),
    "a call of a part": (lambda p: p.layers[0](X), "layers.0 is a part of a program"),
    "another dtype": (lambda p: p.half(), "cannot become one of torch.float16"),
    "another dtype of a part": (lambda p: p.layers[0].double(), "cannot become one of torch.float64"),
    "another device": (lambda p: p.to("meta"), "cannot become one of torch.float32 on meta"),
    "a pickle": (pickle.dumps, "cannot be pickled"),
    "a file": (lambda p: torch.save(p, io.BytesIO()), "cannot be pickled"),
    "a copied part": (lambda p: copy.deepcopy(p.layers[0]), "layers.0 is a part of a program, and cannot be copied"),
    "another class": (lambda p: setattr(p, "__class__", nn.Module), "cannot become another class"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(what: str) -> None:
    program = made()
    before = fxshard.simulate(program, X).outputs[0]
    act, said = REFUSED[what]
    with pytest.raises(FxshardError, match=said) as caught:
        act(program)
    assert caught.value.fix
    assert torch.equal(fxshard.simulate(program, X).outputs[0], before)


# --- what works -------------------------------------------------------------------------------------------------------


def test_what_the_model_has_can_be_read() -> None:
    program = made()
    assert program.config == {"width": 8}
    assert program.dtype == torch.float32
    assert program.get_input_layer() is program.layers[0].up
    assert inspect.signature(program.forward) == inspect.signature(Net().forward)
    assert [type(m).__name__ for m in program.layers[0].children()] == ["Linear", "Linear", "LayerNorm"]
    assert isinstance(program.layers[0].norm, nn.LayerNorm)
    assert isinstance(program.layers, nn.ModuleList)
    assert len(program.layers) == 2
    assert not hasattr(program, "anything")


def test_before_the_first_call() -> None:
    program = fxshard.parallelize(Net(), tensor_parallel(2))
    assert program.config == {"width": 8}
    with pytest.raises(FxshardError, match="before the model was captured"):
        _ = program.layers
    fxshard.simulate(program, X)
    assert len(program.layers) == 2


@pytest.mark.parametrize("fixed", [True, False])
def test_a_copy_is_a_program_of_its_own(fixed: bool) -> None:
    program = fxshard.parallelize(Net(), tensor_parallel(2), (X,) if fixed else ())
    want = fxshard.simulate(program, X).outputs[0]
    other = copy.deepcopy(program)
    with torch.no_grad():
        for rank in range(2):
            for parameter in other.rank_module(rank).parameters():
                parameter.zero_()
    assert torch.equal(fxshard.simulate(program, X).outputs[0], want)
    assert not fxshard.simulate(other, X).outputs[0].any()
    other.eval()
    assert program.training
    with pytest.raises(FxshardError, match=r"a hook on layers\.0"):
        other.layers[0].register_forward_hook(hook)


def test_an_average_of_programs() -> None:
    program = made(data_parallel(1))
    model = Net()
    model.load_state_dict(program.full_state_dict())
    ours, theirs = AveragedModel(program), AveragedModel(model)
    for step in range(3):
        for each, average in ((program, ours), (model, theirs)):
            with torch.no_grad():
                for parameter in each.parameters():
                    parameter.add_(step + 1)
            average.update_parameters(each)
    torch.testing.assert_close(ours(X), theirs(X))


def test_gradients_of_all_ranks_at_once() -> None:
    program = made()
    fxshard.simulate(program, X).backward(torch.sum)
    program.zero_grad()
    assert all(p.grad is None for rank in range(2) for p in program.rank_module(rank).parameters())
    program.requires_grad_(False)
    assert not fxshard.simulate(program, X).outputs[1].requires_grad


def test_ranks_whose_weights_were_changed_apart() -> None:
    program = made()
    optimizer = torch.optim.SGD(program.parameters(), 0.1)
    fxshard.simulate(program, X).backward(torch.sum)
    optimizer.step()
    with pytest.raises(InputError, match="was changed on rank 0, and on no other"):
        fxshard.simulate(program, X)


def test_a_module_of_a_model_can_be_its_program() -> None:
    launch(2, inside.replaced, ("tp2",))


@pytest.mark.slow
def test_a_module_of_a_model_can_be_its_program_under_other_plans() -> None:
    launch(2, inside.replaced, ("sp2", "dp2", "zero2"))


# --- of the model -----------------------------------------------------------------------------------------------------


class Frozen(nn.Module):
    """Keeps a norm in evaluation, whatever is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.up(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("captured", [False, True])
def test_the_models_own_train_decides_the_modes(captured: bool) -> None:
    torch.manual_seed(0)
    model = Frozen()
    program = fxshard.parallelize(model, tensor_parallel(2), (X,) if captured else ())
    other = copy.deepcopy(model)
    for mode in (True, False, True):
        program.train(mode)
        other.train(mode)
        torch.testing.assert_close(fxshard.simulate(program, X).outputs[1], other(X))
        assert program.norm.training is other.norm.training
    assert model.norm.training, "the user's model keeps its modes"


CHANGED: dict[str, Callable[[Net], object]] = {
    "a module is appended": lambda m: m.layers.append(Layer()),
    "a module is deleted": lambda m: m.layers.__delitem__(1),
    "a weight is gone": lambda m: setattr(m.layers[0].up, "bias", None),
    "another dtype": lambda m: m.double(),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_model_with_other_weights_is_another_model(name: str) -> None:
    torch.manual_seed(0)
    model = Net()
    program = fxshard.parallelize(model, tensor_parallel(2), (X,))
    CHANGED[name](model)
    with pytest.raises(CaptureError, match="of the model"):
        fxshard.simulate(program.eval(), X)


def test_weights_that_share_memory_and_are_two() -> None:
    model = Net()
    model.layers[0].up.weight.data = model.layers[0].down.weight.data.t()
    with pytest.raises(CaptureError, match=r"layers.0.up.weight and layers.0.down.weight share memory"):
        fxshard.parallelize(model, data_parallel(2), (X,))


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_gradients_of_the_model(register: str) -> None:
    model = Net()
    handle = getattr(model.layers[0].up.weight, register)(hook)
    with pytest.raises(CaptureError, match=r"the parameter layers.0.up.weight has a hook"):
        fxshard.parallelize(model, tensor_parallel(2), (X,))
    handle.remove()
    fxshard.parallelize(model, tensor_parallel(2), (X,))


# --- in simulation ----------------------------------------------------------------------------------------------------


def test_a_loss_of_one_ranks_outputs_is_refused() -> None:
    program = made()
    with pytest.raises(InputError, match="outputs of rank 0, and not of those of rank 1"):
        fxshard.simulate(program, X).outputs[0].sum().backward()
    with pytest.raises(InputError, match="outputs of rank 1, and not of those of rank 0"):
        torch.autograd.grad(
            fxshard.simulate(program, X).outputs[1].sum(), list(program.parameters()), allow_unused=True
        )
    run = fxshard.simulate(program, X)
    (run.outputs[0].sum() + run.outputs[1].sum()).backward()


SINGLED_OUT: dict[str, Callable[[Any], object]] = {
    "a buffer": lambda p: p.shift.fill_(3.0),
    "a weight, by .data": lambda p: p.layers[0].up.weight.data.mul_(2.0),
    "one element, by .data": lambda p: p.layers[0].up.weight.data[1, 1].add_(1e-3),
    "what needs a gradient": lambda p: p.layers[0].up.weight.requires_grad_(False),
}


@pytest.mark.parametrize("name", SINGLED_OUT)
def test_what_is_done_to_one_rank_alone_is_told(name: str) -> None:
    program = made()
    fxshard.simulate(program, X)
    SINGLED_OUT[name](program)
    with pytest.raises(InputError, match="was changed on rank 0, and on no other"):
        fxshard.simulate(program, X)


def test_ddp_over_what_holds_a_program() -> None:
    launch(2, inside.wrapped)


# --- optimizers -------------------------------------------------------------------------------------------------------


def test_an_optimizer_over_the_models_parameters_would_train_nothing() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    program = fxshard.parallelize(model, tensor_parallel(2), (X,))
    fxshard.simulate(program, X).backward(lambda y: y.sum())
    with pytest.raises(InputError, match=r"that was parallelized, the first 'layers\.0\.up\.weight'"):
        optimizer.step()
    model(X).sum().backward()  # the model is trained by itself
    optimizer.step()


def test_memory_that_processes_share() -> None:
    program = made().share_memory()
    assert all(parameter.is_shared() for parameter in program.parameters())
    torch.testing.assert_close(fxshard.simulate(program, X).outputs[0], program._original.get()(X))
