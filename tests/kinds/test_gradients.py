"""Gradients of kinds that few models have: of sparse tables, of complex parts that are written, behind odd draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxshard
from fxshard import Plan, Shard
from tests.helpers import slow_but_for
from tests.presets import preset

PLANS = {name: preset(name) for name in ("tp2", "dp2", "zero2", "sp2", "dp2_tp2")}
PLANS["rows"] = Plan({"a": 2}, params={"l.weight": Shard(0)})


class Told(nn.Module):
    """A linear layer, a table, and what a function makes of them."""

    def __init__(self, how: Callable[[Told, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.how, self.l, self.e = how, nn.Linear(8, 8), nn.Embedding(12, 8, sparse=True)
        self.bag = nn.EmbeddingBag(12, 8, sparse=True, mode="sum")
        self.f8 = nn.Parameter(torch.randn(8, 8).to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.how(self, x)


IDS = torch.tensor([[0, 3, 3, 11], [1, 2, 3, 4], [7, 7, 7, 7], [0, 0, 5, 6]])


def written_slice(m: Told, x: torch.Tensor) -> torch.Tensor:
    y = m.l(x)
    z = torch.zeros(4, 8, dtype=torch.complex128)
    z[:, :8] = torch.complex(y, y * 2)
    z[:, 2:4] = z[:, 4:6] * (1 + 2j)
    return torch.view_as_real(z)


def written_row(m: Told, x: torch.Tensor) -> torch.Tensor:
    z = torch.complex(m.l(x), x)
    z[..., -1] = z[..., 0].conj() * 1j
    z[1] = z[2]
    return z.abs()


def written_diagonal(m: Told, x: torch.Tensor) -> torch.Tensor:
    z = torch.complex(m.l(x), x).t() @ torch.complex(x, m.l(x))
    z.diagonal().mul_(2j)
    return z.real + z.imag


MODELS: dict[str, Callable[[Told, torch.Tensor], torch.Tensor]] = {
    "sparse table": lambda m, x: m.l(m.e(IDS)) + x[:, None],
    "sparse bag": lambda m, x: m.l(m.bag(IDS)) + x,
    "complex slice": written_slice,
    "complex row": written_row,
    "complex diagonal": written_diagonal,
    "randint_like": lambda m, x: m.l(x) * torch.randint_like(m.l(x), 2, 5),
    "float8": lambda m, x: m.l(x @ m.f8.to(x.dtype)),
}


@slow_but_for("plan", PLANS, "tp2", "zero2")
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_one_device(name: str, plan: str) -> None:
    torch.manual_seed(0)
    model, x = Told(MODELS[name]).double(), torch.randn(4, 8, dtype=torch.float64)
    model.f8.data = torch.randn(8, 8).to(torch.float8_e4m3fn)
    program = fxshard.parallelize(model, PLANS[plan], (x,))
    torch.manual_seed(1)
    want = model(x)
    torch.manual_seed(1)
    run = fxshard.simulate(program, x)
    for out in run.outputs:
        torch.testing.assert_close(out, want)
    want.pow(2).sum().backward()
    run.backward(lambda out: out.pow(2).sum())
    grads = run.full_grads()
    for key, parameter in model.named_parameters():
        if parameter.grad is None:
            assert key not in grads
        else:
            dense = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
            torch.testing.assert_close(grads[key], dense)


class Cubed(torch.autograd.Function):
    """Treats every element alone, and has a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.factor = factor
        return x.pow(3) * factor

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (x,) = ctx.saved_tensors
        return grad * x.abs() * 2 * ctx.factor, None


class Meaned(Cubed):
    """Scales by how many elements there are."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.factor = factor / x.numel()
        return x.pow(3) * ctx.factor


class Summed(Cubed):
    """Sums in its gradient alone."""

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (x,) = ctx.saved_tensors
        return grad * x.sum(-1, keepdim=True), None


@slow_but_for("plan", PLANS, "tp2", "zero2")
@pytest.mark.parametrize("function", [Cubed, Meaned, Summed])
def test_functions_of_elements_are_split_and_no_others(function: type[Cubed], plan: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), Applied(function), nn.Linear(16, 8)).double()
    x = torch.randn(4, 8, dtype=torch.float64)
    program = fxshard.parallelize(model, preset(plan) if plan != "rows" else preset("tp2"), (x,))
    run = fxshard.simulate(program, x)
    want = model(x)
    torch.testing.assert_close(run.outputs[1], want)
    want.pow(2).sum().backward()
    run.backward(lambda out: out.pow(2).sum())
    for key, grad in run.full_grads().items():
        torch.testing.assert_close(grad, model.get_parameter(key).grad)
    if plan == "tp2":
        assert bool(program.fallbacks()) == (function is not Cubed)


class Applied(nn.Module):
    def __init__(self, function: type[Cubed]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.function.apply(x, 0.5)  # type: ignore[no-untyped-call]
        return out
