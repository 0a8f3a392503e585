"""A model that returns its parameters and buffers as they are, its own and those of a module inside, or views."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fxshard import Plan, Shard
from tests.helpers import assert_equivalent
from tests.presets import preset


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.register_buffer("table", torch.randn(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x @ self.weight, self.table


class Returns(nn.Module):
    def __init__(self, what: Callable[[Returns, torch.Tensor, torch.Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.what = Inner(), what
        self.scale = nn.Parameter(torch.randn(()))
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> Any:
        y, table = self.inner(x)
        return self.what(self, y, table)


RETURNED: dict[str, Callable[[Returns, torch.Tensor, torch.Tensor], Any]] = {
    "a buffer": lambda m, y, table: (y, m.steps),
    "a parameter": lambda m, y, table: {"y": y, "scale": m.scale},
    "a parameter that is used": lambda m, y, table: (y * m.scale, m.scale),
    "of a module inside": lambda m, y, table: [y, table, m.inner.weight],
    "nothing else": lambda m, y, table: (m.weight,),
    "without an operator": lambda m, y, table: (m.weight, m.inner.table, m.inner.weight),
    "a view": lambda m, y, table: (m.weight.t(), m.inner.weight[1:]),
}
SPLIT = Plan({"a": 2}, params={"weight": Shard(0), "inner.weight": Shard(1)})


@pytest.mark.parametrize("plan", ["tp2", "dp2", "zero2", "split"])
@pytest.mark.parametrize("name", RETURNED)
def test_returned_weights(name: str, plan: str) -> None:
    torch.manual_seed(0)
    model = Returns(RETURNED[name]).double()
    assert_equivalent(model, SPLIT if plan == "split" else preset(plan), (torch.randn(4, 6, dtype=torch.float64),))
