"""What is drawn for a tensor lies where it does on one device, in whatever order the tensor lies in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxshard
from fxshard import Plan, Shard
from fxshard.errors import CaptureError
from tests.helpers import slow_but_for
from tests.presets import preset

PLANS = {"rows": Plan({"a": 2}, params={"l.weight": Shard(0)}), "dp2": preset("dp2"), "whole": Plan({"a": 2})}

LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "plain": lambda h: h,
    "transposed": lambda h: h.t(),
    "a part, transposed": lambda h: h.t()[1:],
    "every other": lambda h: h[:, ::2],
    "every other, transposed": lambda h: h[:, ::2].t(),
    "expanded": lambda h: h[:, None].expand(-1, 3, -1).transpose(0, 2),
    "channels last": lambda h: h.view(h.shape[0], 2, 2, 2).contiguous(memory_format=torch.channels_last),
    "there and back": lambda h: h.t().cumsum(0).t(),
}

DRAWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "dropout": lambda h: F.dropout(h, 0.5),
    "dropout in place": lambda h: F.dropout(h.clone(), 0.5, inplace=True),
    "alpha dropout": lambda h: F.alpha_dropout(h, 0.5, training=True),
    "rrelu": lambda h: F.rrelu(h, training=True),
    "rand_like": lambda h: h + torch.rand_like(h),
    "randn_like": lambda h: h * torch.randn_like(h),
    "randn_like, contiguous": lambda h: h + torch.randn_like(h, memory_format=torch.contiguous_format),
    "randint_like": lambda h: h + torch.randint_like(h, 9),
    "bernoulli": lambda h: torch.bernoulli(h.sigmoid()),
    "normal": lambda h: torch.normal(h, 1.0),
    "poisson": lambda h: torch.poisson(h.exp()),
    "multinomial": lambda h: torch.multinomial(h.sigmoid().flatten(1), 2).double(),
    "gumbel": lambda h: F.gumbel_softmax(h),
    "empty_like": lambda h: torch.empty_like(h).uniform_() + h,
    "uniform_": lambda h: h.clone().uniform_(),
    "normal_": lambda h: h.clone().normal_(),
    "exponential_": lambda h: h.clone().exponential_(),
    "bernoulli_": lambda h: h.clone().bernoulli_(0.4),
    "bernoulli_ of chances": lambda h: h.clone().bernoulli_(h.sigmoid()),
    "random_": lambda h: h.clone().random_(7),
    "random_ from, to": lambda h: h.clone().random_(2, 7),
    "normal_ of a part": lambda h: h.clone()[:, ::2].normal_(),
    "bernoulli_ of a part": lambda h: h.clone()[:, ::2].bernoulli_(),
}

SHOWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as_strided": lambda h: h.as_strided((2, 2), (1, 3)),
    "as_strided of a column": lambda h: h.select(-1, 1).as_strided((2, 2), (1, 2)) * 2,
    "as_strided from": lambda h: h[1:].as_strided((2, 2), (3, 1), 2),
    "as_strided of a copy": lambda h: (h * 2).as_strided((h.numel(),), (1,)),
}


class Draws(nn.Module):
    def __init__(self, layout: str, draw: str) -> None:
        super().__init__()
        self.l, self.layout, self.draw = nn.Linear(8, 8), LAYOUTS[layout], (DRAWS | SHOWS)[draw]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.draw(self.layout(self.l(x)))


def check(model: nn.Module, program: fxshard.ParallelModule, x: torch.Tensor) -> None:
    """One device's outputs, and the random stream behind them."""
    torch.manual_seed(7)
    want, then = copy.deepcopy(model)(x), torch.rand(2)
    torch.manual_seed(7)
    outputs, now = fxshard.simulate(program, x).outputs, torch.rand(2)
    for out in outputs:
        torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    assert torch.equal(now, then)


@pytest.mark.thin(3)
@pytest.mark.in_turn(3)
@pytest.mark.parametrize("plan", PLANS)
@slow_but_for("layout", LAYOUTS, "transposed", "a part, transposed")
@pytest.mark.parametrize("draw", DRAWS | SHOWS)
def test_what_is_drawn_lies_where_it_does_on_one_device(draw: str, layout: str, plan: str) -> None:
    torch.manual_seed(0)
    model, x = Draws(layout, draw).double(), torch.randn(6, 8, dtype=torch.float64)
    check(model, fxshard.parallelize(model, PLANS[plan], (x,)), x)


@pytest.mark.parametrize("layout", ["plain", "transposed", "a part, transposed"])
@pytest.mark.parametrize("draw", ["dropout", "rand_like", "uniform_", "bernoulli_"])
def test_sizes_that_change(draw: str, layout: str) -> None:
    model, x = Draws(layout, draw).double(), torch.randn(6, 8, dtype=torch.float64)
    shapes = ({0: torch.export.Dim("n", min=2, max=64)},)
    program = fxshard.parallelize(model, preset("dp2"), (x,), dynamic_shapes=shapes)
    for rows in (6, 10):
        check(model, program, torch.randn(rows, 8, dtype=torch.float64))


def test_nothing_is_done_where_nothing_can_differ() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + F.dropout(self.down(F.gelu(self.up(x))), 0.1, self.training)

    program = fxshard.parallelize(Block(), preset("tp2"), (torch.randn(6, 8),))
    assert "in_order" not in program.code()


def test_a_range_without_an_end_is_refused() -> None:
    class Endless(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.clone().random_(2, None)

    with pytest.raises(CaptureError, match="a range without an end"):
        fxshard.parallelize(Endless(), preset("dp2"), (torch.randn(4, 2),))
