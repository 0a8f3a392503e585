"""Batch norms between columns and rows, in training: their running statistics lie as the channels do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxshard import Shard
from tests.helpers import assert_equivalent
from tests.presets import preset


class Block(nn.Module):
    def __init__(self, affine: bool) -> None:
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, affine=affine)
        self.c2, self.b2 = nn.Conv2d(8, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4, affine=affine)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.b2(self.c2(self.b1(self.c1(x)).relu()))
        return out


@pytest.mark.parametrize("plan", ["tp2", "tp3", "dp2_tp2", "zero2_tp2"])
@pytest.mark.parametrize("affine", [True, False])
def test_a_batch_norm_within_a_pair(affine: bool, plan: str) -> None:
    torch.manual_seed(0)
    model, x = Block(affine).double(), torch.randn(4, 4, 5, 5, dtype=torch.float64)
    program = assert_equivalent(model, preset(plan), (x,))
    assert program.plan.params["b1.running_mean"]["tp"].is_shard(0)
    assert "b2.running_mean" not in program.plan.params
    if plan == "tp2":
        assert program.plan.params["c1.weight"]["tp"] == Shard(0)
        assert [(c.kind, c.phase) for c in program.collectives()].count(("all_reduce", "forward")) == 1
        assert not any(c.kind == "all_gather" for c in program.collectives())
    assert_equivalent(model.eval(), preset(plan), (x,))
