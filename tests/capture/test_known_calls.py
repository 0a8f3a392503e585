"""Calls that were seen before take the short way, and come out as they did the long way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxshard
from fxshard import tensor_parallel
from fxshard.capture import capture
from fxshard.errors import InputError


class Two(nn.Module):
    """Takes two tensors and a number that the graph holds."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, a: torch.Tensor, b: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
        return self.down(self.up(a)) + scale * b


A, B, C = (torch.randn(3, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))


@pytest.fixture
def long_ways(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the calls that go the long way."""
    seen: list[int] = []
    flatten = capture.Captured.flatten_inputs

    def counted(self: Any, args: Any, kwargs: Any) -> Any:
        seen.append(1)
        return flatten(self, args, kwargs)

    monkeypatch.setattr(capture.Captured, "flatten_inputs", counted)
    return seen


def equals(program: fxshard.ParallelModule, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    for output in fxshard.simulate(program, *args, **kwargs).outputs:
        torch.testing.assert_close(output, model(*args, **kwargs), rtol=1e-5, atol=1e-5)


def test_a_known_call_goes_the_short_way(long_ways: list[int]) -> None:
    model = Two()
    program = fxshard.parallelize(model, tensor_parallel(2), (A, B))
    for _ in range(3):
        equals(program, model, A, B)
        equals(program, model, B, A)
    before = len(long_ways)
    for _ in range(3):
        equals(program, model, C, A)
    assert len(long_ways) == before
    equals(program, model, b=A, a=C)
    assert len(long_ways) == before + 1
    equals(program, model, b=B, a=A)
    assert len(long_ways) == before + 1


def test_one_tensor_given_twice_says_nothing_of_the_next_call() -> None:
    model = Two()
    program = fxshard.parallelize(model, tensor_parallel(2), (A, B))
    equals(program, model, A, A)
    equals(program, model, A, B)


def test_what_does_not_fit_is_refused_after_calls_that_fit() -> None:
    program = fxshard.parallelize(Two(), tensor_parallel(2), (A, B, 2.0))
    for _ in range(2):
        fxshard.simulate(program, A, B, 2.0)
        with pytest.raises(InputError, match=r"was 2\.0 at capture"):
            fxshard.simulate(program, A, B, 3.0)
        with pytest.raises(InputError, match="expected float32"):
            fxshard.simulate(program, A, torch.ones(3, 5), 2.0)
        with pytest.raises(InputError, match="expected float32"):
            fxshard.simulate(program, A, B.double(), 2.0)


def test_the_mode_is_part_of_a_call() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(1.0), nn.Linear(8, 4)).eval()
    program = fxshard.parallelize(model, tensor_parallel(2), (A,))
    equals(program, model, A)
    dropped = fxshard.simulate(program.train(), A).outputs[0]
    assert torch.equal(dropped, model[2].bias.expand(3, 4))
    model.eval()
    program.eval()
    equals(program, model, A)
