"""What a call does beside its result happens though nobody reads that: running statistics, random draws, in order."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxshard
from fxshard import Plan
from tests.helpers import assert_equivalent
from tests.presets import preset

PLANS = {name: preset(name) for name in ("dp2", "dp3", "zero2", "tp2", "sp2", "dp2_tp2")}
PLANS["nothing split"] = Plan({"tp": 2})


class Aside(nn.Module):
    """A module whose result is dropped, and a dropout behind it."""

    def __init__(self, aside: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.l, self.aside, self.drop = nn.Linear(8, 8), aside(), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.l(x)
        self.aside(y)
        return self.drop(y)


class Draws(nn.Module):
    def __init__(self, draw: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: torch.Tensor) -> object:
        return self.draw(x)


class Images(nn.Module):
    """A norm over images, of what a linear layer gave."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm(x.unflatten(1, (2, 2, 2)))
        return out


ASIDES: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm1d(8),
    "batch norm, no affine": lambda: nn.BatchNorm1d(8, affine=False, momentum=0.3),
    "batch norm of images": lambda: Images(nn.BatchNorm2d(2)),
    "instance norm": lambda: Images(nn.InstanceNorm2d(2, track_running_stats=True, affine=True)),
    "two in a row": lambda: nn.Sequential(nn.BatchNorm1d(8), nn.GELU(), nn.BatchNorm1d(8)),
    "dropout": lambda: nn.Dropout(0.3),
    "feature dropout": lambda: nn.Sequential(nn.Unflatten(1, (4, 2)), nn.Dropout1d(0.3)),
    "rrelu": lambda: nn.RReLU(),
    "rand": lambda: Draws(lambda x: torch.rand(3)),
    "rand_like": lambda: Draws(torch.rand_like),
    "randint": lambda: Draws(lambda x: torch.randint(0, 9, (5,))),
    "randperm": lambda: Draws(lambda x: torch.randperm(7)),
    "bernoulli": lambda: Draws(lambda x: torch.bernoulli(x.sigmoid())),
    "normal": lambda: Draws(lambda x: torch.empty(3).normal_()),
    "multinomial": lambda: Draws(lambda x: torch.multinomial(x.sigmoid(), 2)),
    "gumbel": lambda: Draws(lambda x: F.gumbel_softmax(x)),
    "attention": lambda: Draws(lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.4)),
    "lstm": lambda: nn.LSTM(8, 4, num_layers=2, dropout=0.4),
}


@pytest.mark.thin(3)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("aside", ASIDES)
def test_what_nobody_reads_happens(aside: str, plan: str) -> None:
    model, x = Aside(ASIDES[aside]).double(), torch.randn(6, 8, dtype=torch.float64)
    one = copy.deepcopy(model)
    program = fxshard.parallelize(model, PLANS[plan], (x,))
    torch.manual_seed(3)
    want, then = one(x), torch.rand(2)
    torch.manual_seed(3)
    outputs, now = fxshard.simulate(program, x).outputs, torch.rand(2)
    for out in outputs:
        torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    assert torch.equal(now, then), "the random stream is another one afterwards"
    whole = program.full_state_dict()
    for name, value in one.state_dict().items():
        torch.testing.assert_close(whole[name], value, rtol=1e-10, atol=1e-12, msg=lambda t, name=name: f"{name}: {t}")


def test_what_does_nothing_goes() -> None:
    """An attention without dropout, and a norm in evaluation, are not computed for nobody."""
    for aside in ("attention", "batch norm"):
        model = Aside(ASIDES[aside])
        if aside == "attention":
            model.aside = Draws(lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]))
        program = fxshard.parallelize(model.eval(), Plan({"tp": 2}), (torch.randn(6, 8),))
        assert [str(n.target) for n in program.graph_after("optimize").nodes if n.op == "call_function"] == [
            "aten.linear.default"
        ]


OVERWRITES: dict[str, Callable[[torch.Tensor], object]] = {
    "zero_": torch.Tensor.zero_,
    "fill_": lambda y: y.fill_(0.5),
    "bernoulli_": lambda y: y.bernoulli_(0.4),
    "normal_": torch.Tensor.normal_,
    "uniform_": torch.Tensor.uniform_,
    "exponential_": torch.Tensor.exponential_,
    "random_": lambda y: y.random_(5),
    "copy_": lambda y: y.copy_(torch.ones_like(y)),
}


@pytest.mark.thin(2)
@pytest.mark.parametrize("plan", ["dp2", "tp2", "zero2"])
@pytest.mark.parametrize("write", OVERWRITES)
def test_what_is_overwritten_has_a_gradient_of_zero(write: str, plan: str) -> None:
    """And the backward pass of what is beside it runs."""

    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l, self.m = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.l(x)
            OVERWRITES[write](y)
            return y, self.m(x)

    model, x = Overwrites().double(), torch.randn(6, 8, dtype=torch.float64)
    program = assert_equivalent(model, PLANS[plan], (x,))
    for output in fxshard.simulate(program, x).outputs:
        assert all(each.requires_grad for each in output)
    run = fxshard.simulate(program, x)
    run.backward(lambda out: out[0].sum())
    assert not run.full_grads()["l.weight"].any()


@pytest.mark.parametrize("plan", PLANS)
def test_statistics_that_nobody_keeps(plan: str) -> None:
    """A norm in training updates what it is given, be it computed for it alone."""

    class Norms(nn.Module):
        mean: torch.Tensor
        scale: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(8, 8)
            self.register_buffer("mean", torch.zeros(8))
            self.register_buffer("scale", torch.ones(8))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            variance = self.scale.abs() + 1
            return F.batch_norm(self.l(x), self.mean, variance, training=True), variance

    model, x = Norms().double(), torch.randn(6, 8, dtype=torch.float64)
    assert_equivalent(model, PLANS[plan], (x,))
    program = fxshard.parallelize(model, PLANS[plan], (x,))
    fxshard.simulate(program, x)
    model(x)
    torch.testing.assert_close(program.full_state_dict()["mean"], model.mean)


@pytest.mark.parametrize("plan", ["tp2", "nothing split"])
def test_an_input_that_is_written_behind_autograd(plan: str) -> None:
    """It may be a leaf that requires a gradient."""

    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.detach().add_(1)
            return self.l(x)

    model, x = Adds().double(), torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    program = fxshard.parallelize(model, PLANS[plan], (x,))
    mine, theirs = (x.detach().clone().requires_grad_() for _ in range(2))
    want, run = model(theirs), fxshard.simulate(program, mine)
    torch.testing.assert_close(run.outputs[0], want)
    torch.testing.assert_close(mine, theirs)
    want.sum().backward()
    run.backward(torch.sum)
    torch.testing.assert_close(mine.grad, theirs.grad)
