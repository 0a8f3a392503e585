"""What ranks run to show that functions made for whole tensors are right over parts: torch's clipping, Muon."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fxshard
from tests.presets import preset

MAKERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "muon": (torch.optim.Muon, {"lr": 0.05, "momentum": 0.9}),
    "adafactor": (torch.optim.Adafactor, {"lr": 0.05}),
    "adamw": (torch.optim.AdamW, {"lr": 0.05}),
}


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12, bias=False), nn.GELU(), nn.Linear(12, 6, bias=False)).double()


def steps_of(optimizer: torch.optim.Optimizer, losses: Callable[[], object]) -> None:
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    for _ in range(5):
        optimizer.zero_grad()
        losses()
        optimizer.step()
        schedule.step()


def whole_matrices(plans: tuple[str, ...]) -> None:
    """Five steps under a schedule, against one device."""
    for plan in plans:
        for cls, options in MAKERS.values():
            model, x = model_of(), torch.randn(4, 8, dtype=torch.float64)
            program = fxshard.parallelize(copy.deepcopy(model), preset(plan), (x,))
            optimizer = program.whole_matrix(cls, **options)
            steps_of(cls(model.parameters(), **options), lambda model=model, x=x: model(x).pow(2).mean().backward())
            steps_of(optimizer, lambda program=program, x=x: program(x).pow(2).mean().backward())
            for name, weight in program.full_state_dict().items():
                torch.testing.assert_close(weight, model.state_dict()[name])


def resumed(folder: str) -> None:
    """Three steps, a checkpoint, and two more under another plan: as five steps on one device."""
    for cls, options in MAKERS.values():
        model, x = model_of(), torch.randn(4, 8, dtype=torch.float64)
        one = cls(model.parameters(), **options)
        for _ in range(5):
            one.zero_grad()
            model(x).pow(2).mean().backward()
            one.step()
        for plan, steps in (("tp2", 3), ("zero2", 2)):
            program = fxshard.parallelize(model_of(), preset(plan), (x,))
            optimizer = program.whole_matrix(cls, **options)
            if plan == "zero2":
                fxshard.load_checkpoint(f"{folder}/{cls.__name__}", program, optimizer)
            for _ in range(steps):
                optimizer.zero_grad()
                program(x).pow(2).mean().backward()
                optimizer.step()
            if plan == "tp2":
                fxshard.save_checkpoint(f"{folder}/{cls.__name__}", program, optimizer)
        for name, weight in program.full_state_dict().items():
            torch.testing.assert_close(weight, model.state_dict()[name])


def clipped() -> None:
    """``torch.nn.utils.clip_grad_norm_`` over a program's parameters, some of them, and others beside."""
    for plan in ("tp2", "zero2", "dp2", "sp2"):
        model, x = model_of(), torch.randn(4, 8, dtype=torch.float64)
        beside = [nn.Linear(3, 3).double() for _ in range(2)]
        beside[1].load_state_dict(beside[0].state_dict())
        program = fxshard.parallelize(copy.deepcopy(model), preset(plan), (x,))
        for order in (2.0, 1.0, float("inf")):
            for some in (slice(None), slice(1)):
                for module, other in ((model, beside[0]), (program, beside[1])):
                    module.zero_grad()
                    (module(x).pow(2).sum() + other(x[:, :3]).pow(2).sum()).backward()
                norms = [
                    torch.nn.utils.clip_grad_norm_([*list(m.parameters())[some], *o.parameters()], 0.1, order)
                    for m, o in ((model, beside[0]), (program, beside[1]))
                ]
                torch.testing.assert_close(*norms)
                for name, grad in program.full_grads().items():
                    torch.testing.assert_close(grad, model.get_parameter(name).grad)
