"""A buffer that forward assigns is a buffer that it writes: one device's afterwards, and what later calls read."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxshard
from tests.helpers import slow_but_for
from tests.presets import preset

PLANS = ("tp2", "dp2", "dp3", "zero2", "sp2", "dp2_tp2")


class Statistics(nn.Module):
    """What the others have in common: buffers, which forward assigns in training."""

    a: torch.Tensor
    b: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("a", torch.linspace(-1, 1, 8))
        self.register_buffer("b", torch.linspace(2, 1, 8), persistent=False)


class Running(Statistics):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.a = 0.9 * self.a + 0.1 * x.mean((0, 1)).detach()
        return x - self.a


class WithGradient(Statistics):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean((0, 1))
        self.a = mean.detach()
        return x * mean


class Swapped(Statistics):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.a, self.b = self.b, self.a + x.amax((0, 1)).detach()
        return x * self.a + self.b


class Twice(Statistics):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.a = self.a.flip(0)
        y = x * self.a
        self.a = self.a + 1
        self.a += y.mean((0, 1)).detach()
        return y


class Before(Statistics):
    """Returns what was there before, and a view of it."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        before = self.a
        self.a = before + 1
        return x * self.a, before, before[2:], self.a


class View(Statistics):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.a = self.a.view(2, 4).flip(0).flatten()
        self.b = self.b.view(8)
        return x + self.a + self.b


class Codebook(nn.Module):
    """Vector quantisation whose codes follow the means of what they stand for."""

    codes: torch.Tensor
    counts: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.linspace(-1, 1, 32).reshape(4, 8))
        self.register_buffer("counts", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.detach().reshape(-1, 8)
        nearest = F.one_hot(torch.cdist(flat, self.codes).argmin(-1), 4).to(x.dtype)
        picked = (nearest @ self.codes).view_as(x)
        if self.training:
            self.counts = 0.9 * self.counts + 0.1 * nearest.sum(0)
            self.codes = 0.9 * self.codes + 0.1 * (nearest.T @ flat) / self.counts[:, None]
        return x + (picked - x).detach()


KINDS: tuple[Callable[[], nn.Module], ...] = (Running, WithGradient, Swapped, Twice, Before, View, Codebook)


class Inside(nn.Module):
    """In a module of the model, or the model itself."""

    def __init__(self, kind: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.up, self.kind, self.down = nn.Linear(8, 16), kind(), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> object:
        return self.kind(x + self.down(torch.tanh(self.up(x))))


@pytest.mark.thin(2)
@slow_but_for("plan", PLANS, "tp2", "dp3")
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_an_assigned_buffer(kind: Callable[[], nn.Module], inside: bool, plan: str) -> None:
    torch.manual_seed(0)
    model = (Inside(kind) if inside else kind()).double()
    inputs = [torch.randn(6, 4, 8, dtype=torch.float64) for _ in range(4)]
    program = fxshard.parallelize(copy.deepcopy(model), preset(plan), (inputs[0],))
    for step, x in enumerate(inputs):
        model.train(step < 2)
        program.train(step < 2)
        want = model(x)
        run = fxshard.simulate(program, x)
        for got in run.outputs:
            torch.testing.assert_close(got, want)
        if inside:
            model.zero_grad()
            run.backward(_loss)
            _loss(want).backward()
            for name, grad in run.full_grads().items():
                torch.testing.assert_close(grad, model.get_parameter(name).grad)
            program.zero_grad()
        whole, one = program.full_state_dict(), model.state_dict()
        assert whole.keys() == one.keys()
        torch.testing.assert_close(dict(whole), dict(one))
        torch.testing.assert_close(dict(program.named_buffers()), dict(model.named_buffers()))


def _loss(out: object) -> torch.Tensor:
    first: torch.Tensor = out[0] if isinstance(out, tuple) else out  # type: ignore[assignment]
    return first.pow(2).sum()
