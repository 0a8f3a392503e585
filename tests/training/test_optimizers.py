"""Parts of matrices under functions that are made for whole ones: right, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxshard
from fxshard.errors import InputError
from tests.distributed import whole
from tests.distributed.launch import launch
from tests.helpers import slow_but_for
from tests.presets import preset


class Signs(torch.optim.Optimizer):
    """Treats each element alone, and is not torch's."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad.sign(), alpha=-group["lr"])


class Scaled(Signs):
    """Scales by the norm of the whole parameter, as LAMB does."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad / p.grad.norm() * p.norm(), alpha=-group["lr"])


class Together(Signs):
    """Scales by the norm of all gradients."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            norm = torch.stack([p.grad.norm() for p in group["params"]]).norm()
            for p in group["params"]:
                p.add_(p.grad / norm, alpha=-group["lr"])


class Secret(Signs):
    """Cannot be made with the options of its groups."""

    def __init__(self, params: Any, secret: object) -> None:
        super().__init__(params)


class Subclass(torch.optim.AdamW):
    """Steps as AdamW does."""


OPTIMIZERS: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], bool]] = {
    "muon": (torch.optim.Muon, False),
    "adafactor": (torch.optim.Adafactor, False),
    "lbfgs": (torch.optim.LBFGS, False),
    "scaled": (Scaled, False),
    "secret": (lambda params: Secret(params, 3), False),
    "signs": (Signs, True),
    "subclass": (Subclass, True),
    "adam": (torch.optim.Adam, True),
    "sgd": (lambda params: torch.optim.SGD(params, 0.1, momentum=0.9), True),
}


@pytest.mark.parametrize("plan", ["tp2", "zero2"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_needs_whole_matrices_is_refused_over_parts(name: str, plan: str) -> None:
    make, right = OPTIMIZERS[name]
    model, x = whole.model_of(), torch.randn(4, 8, dtype=torch.float64)
    program = fxshard.parallelize(model, preset(plan), (x,))
    optimizer = make(program.parameters())
    fxshard.simulate(program, x).backward(lambda y: y.pow(2).mean())
    if right:
        optimizer.step()
        return
    with pytest.raises(InputError, match="whole_matrix"):
        optimizer.step(lambda: 0.0) if name == "lbfgs" else optimizer.step()


def test_over_whole_parameters_any_optimizer_steps() -> None:
    model, x = whole.model_of(), torch.randn(4, 8, dtype=torch.float64)
    program = fxshard.parallelize(model, preset("dp2"), (x,))
    optimizer = torch.optim.Muon(program.parameters())
    fxshard.simulate(program, x).backward(lambda y: y.pow(2).mean())
    optimizer.step()


@slow_but_for("plan", ("tp2", "zero2", "dp2", "tp3", "zero2_tp2"), "tp3", "zero2_tp2")
@pytest.mark.parametrize("name", whole.MAKERS)
def test_whole_matrices_are_stepped_as_on_one_device(name: str, plan: str) -> None:
    cls, options = whole.MAKERS[name]
    model, x = whole.model_of(), torch.randn(4, 8, dtype=torch.float64)
    program = fxshard.parallelize(copy.deepcopy(model), preset(plan), (x,))
    whole.steps_of(cls(model.parameters(), **options), lambda: model(x).pow(2).mean().backward())
    optimizer = program.whole_matrix(cls, **options)
    whole.steps_of(optimizer, lambda: fxshard.simulate(program, x).backward(lambda y: y.pow(2).mean()))
    for key, weight in program.full_state_dict().items():
        torch.testing.assert_close(weight, model.state_dict()[key])


def test_strangers_are_refused() -> None:
    x = torch.randn(4, 8, dtype=torch.float64)
    program = fxshard.parallelize(whole.model_of(), preset("tp2"), (x,))
    with pytest.raises(InputError, match="not the program's"):
        program.whole_matrix(torch.optim.Muon, [nn.Parameter(torch.ones(2, 2))], lr=0.1)


@pytest.mark.slow
def test_on_ranks(tmp_path: Path) -> None:
    launch(2, whole.whole_matrices, ("tp2", "zero2", "dp2"))
    launch(2, whole.resumed, str(tmp_path))
    launch(2, whole.clipped)


@pytest.mark.parametrize(
    ("cls", "said"),
    [(Together, "from other parameters too"), (torch.optim.LBFGS, "cannot be tried on two small matrices")],
)
def test_what_steps_no_matrix_alone_is_refused(cls: Any, said: str) -> None:
    program = fxshard.parallelize(nn.Linear(8, 8), fxshard.zero(2), (torch.randn(4, 8),))
    with pytest.raises(InputError, match=said):
        program.whole_matrix(cls, lr=0.1)
