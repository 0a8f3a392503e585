"""Sizes that values decide: what export notes of them does not tell which dims there are behind a reshape."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import fxshard
from fxshard import Plan, Shard
from tests.presets import preset

PLANS = {"dp2": preset("dp2"), "split": Plan({"a": 2}, params={"p": Shard(0), "l.weight": Shard(0)})}

ONE = {
    "reshape to none": lambda p: p.reshape([]),
    "reshape to two": lambda p: p.reshape([1, 1]),
    "reshape to any": lambda p: p.reshape(-1),
    "view to none": lambda p: p.view(()),
    "reshape as a scalar": lambda p: p.reshape_as(torch.ones(())),
    "squeeze": lambda p: p.squeeze(),
    "squeeze a dim": lambda p: p.squeeze(0),
    "squeeze dims": lambda p: p[None].squeeze((0, 1)),
    "flatten": lambda p: p.flatten(),
    "expand": lambda p: p.expand(1, 1),
    "unflatten": lambda p: p.unflatten(0, (1, 1)),
}
SOURCES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "combinations": lambda p: torch.combinations(p, r=1, with_replacement=True).flatten()[:1],
    "masked_select": lambda p: torch.masked_select(p, p == p)[:1],
    "nonzero": lambda p: p[(p == p).nonzero().flatten()][:1],
}


class Picks(nn.Module):
    def __init__(self, source: str, shape: str) -> None:
        super().__init__()
        self.p, self.l = nn.Parameter(torch.randn(8)), nn.Linear(8, 8)
        self.source, self.shape = source, shape

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        picked = ONE[self.shape](SOURCES[self.source](self.p))
        return picked * 2, self.l(x)


@pytest.mark.thin(2)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("shape", ONE)
@pytest.mark.parametrize("source", SOURCES)
def test_the_dims_are_those_of_one_device(source: str, shape: str, plan: str) -> None:
    torch.manual_seed(0)
    model, x = Picks(source, shape).double(), torch.randn(4, 8, dtype=torch.float64)
    want = model(x)
    for got in fxshard.simulate(fxshard.parallelize(model, PLANS[plan], (x,)), x).outputs:
        torch.testing.assert_close(got, want)
