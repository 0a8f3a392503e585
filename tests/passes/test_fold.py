"""What depends on no input is computed once, where nobody can write to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxshard
from fxshard import data_parallel, tensor_parallel
from tests.helpers import assert_equivalent

X = torch.randn(2, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Masked(nn.Module):
    """Attention under a mask that is made anew in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        at = torch.arange(x.shape[1])
        mask = (at.unsqueeze(0) <= at.unsqueeze(1) + 1).expand(x.shape[0], 2, -1, -1)
        q = self.q(x).unflatten(-1, (2, 4)).transpose(1, 2)
        return self.o(F.scaled_dot_product_attention(q, q, q, mask).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("plan", [tensor_parallel(2), data_parallel(2), fxshard.sequence_parallel(2)])
def test_a_mask_is_made_once(plan: Any) -> None:
    program = assert_equivalent(Masked().double(), plan, (X,))
    assert not [n for n in program.graph_after("optimize").nodes if "arange" in str(n.target)]
    assert [n for n in program.graph_after("localize").nodes if "arange" in str(n.target)]
    assert "arange" not in program.code()
    assert not [name for name in program.state_dict() if "folded" in name]


class Small(nn.Module):
    def __init__(self, forward: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.compute = forward

    def forward(self, x: torch.Tensor) -> Any:
        return self.compute(x)


@pytest.mark.parametrize(
    ("forward", "folded"),
    [
        (lambda x: x * torch.arange(8), True),
        (lambda x: (x * torch.arange(8), torch.arange(8)), True),  # one of the two
        (lambda x: (x, torch.arange(8)), False),  # the caller may write to it
        (lambda x: (x, torch.broadcast_tensors(torch.arange(8), x)[0]), False),  # its schema does not say so
        (lambda x: x * torch.randint(9, (8,)), False),
        (lambda x: x * torch.linspace(0, 1, 8), False),
        (lambda x: x.sum() * torch.ones(2000, 1000, dtype=torch.int64), False),
    ],
)
def test_what_is_folded(forward: Callable[[torch.Tensor], Any], folded: bool) -> None:
    program = fxshard.parallelize(Small(forward), data_parallel(2), (X.float(),))
    found = [n for n in program.graph_after("optimize").nodes if "_folded_" in str(n.target)]
    assert bool(found) == folded


def test_what_is_returned_is_made_anew() -> None:
    program = fxshard.parallelize(Small(lambda x: (x, torch.arange(8))), data_parallel(1), (X.float(),))
    program(X.float())[1].zero_()
    assert program(X.float())[1].tolist() == list(range(8))


def test_sizes_that_change_are_not_constants() -> None:
    size = torch.export.Dim("size", min=2, max=64)
    model = Small(lambda x: x * torch.arange(x.shape[1]).unsqueeze(1))
    program = fxshard.parallelize(model, data_parallel(2), (X,), dynamic_shapes=({1: size},))
    for n in (6, 9):
        x = torch.ones(2, n, 8, dtype=torch.float64)
        assert torch.equal(fxshard.simulate(program, x).outputs[1], model(x))
