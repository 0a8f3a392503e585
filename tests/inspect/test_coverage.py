"""What of the weights is split, and why the rest is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxshard
from fxshard.errors import PlanError
from fxshard.inspect.coverage import Coverage
from tests.presets import preset


class Mixed(nn.Module):
    """Weights of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(32, 16), nn.Embedding(8, 16)
        self.up, self.down, self.norm = nn.Linear(16, 64), nn.Linear(64, 16), nn.LayerNorm(16)
        self.odd, self.tiny, self.unread = nn.Linear(16, 16), nn.Linear(16, 1), nn.Linear(16, 16)
        self.mixing = nn.Parameter(torch.ones(8, 16))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids) + self.places(torch.arange(8)) * self.mixing
        x = self.norm(x + self.down(self.up(x).relu()))
        return self.tiny(x + torch.linalg.matrix_exp(self.odd.weight)[0])  # type: ignore[no-any-return]


IDS = torch.randint(0, 32, (2, 8))


def coverage(plan: str) -> Coverage:
    return fxshard.parallelize(Mixed(), preset(plan), (IDS,)).coverage()


def test_every_whole_matrix_has_its_reason() -> None:
    found = coverage("tp2")
    reasons = {each.name: each.reason for each in found.weights}
    assert {name for name, reason in reasons.items() if not reason} >= {"up.weight", "down.weight", "words.weight"}
    assert "positions" in reasons["places.weight"]
    assert "does not read" in reasons["unread.weight"]
    assert "no product takes it" in reasons["odd.weight"]
    assert "small" in reasons["tiny.weight"]
    assert "aten.mul" in reasons["mixing"]
    assert "vector" in reasons["norm.weight"]
    whole = sum(each.num_bytes for each in found.whole)
    total = sum(each.num_bytes for each in found.matrices)
    assert found.share == pytest.approx(1 - whole / total)
    assert str(found).startswith(f"{found.share:.1%} of the bytes of matrices are split")
    assert all(each.name in str(found) for each in found.whole)


def test_plans_that_split_no_weights_say_so() -> None:
    assert all("no weights" in each.reason for each in coverage("dp2").whole if each.name != "unread.weight")
    assert all("one rank" in each.reason for each in coverage("tp1").whole)
    assert coverage("zero2").share > 0.9


def test_of_a_plan_alone() -> None:
    assert preset("tp2").coverage(Mixed(), (IDS,)) == coverage("tp2")
    with pytest.raises(PlanError, match="example inputs"):
        preset("tp2").coverage(Mixed())
