"""A capture that is not the model is refused before anything is built on it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxshard
from fxshard.errors import CaptureError

X = torch.ones(4, 8)


class Undecided(nn.Module):
    """Takes another path while it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        y = self.down(self.up(x).relu())
        return y * 2 if torch.compiler.is_compiling() else y


def test_another_path_while_traced_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"something else than the model: output 0 differs by") as caught:
        fxshard.parallelize(Undecided(), fxshard.tensor_parallel(2), (X,))
    assert "is_compiling" in str(caught.value)


def test_nothing_is_left_behind() -> None:
    """Buffers and random state are as they were; dropout and batch_norm compare equal."""

    class Noisy(Undecided):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.down(nn.functional.dropout(self.up(x), 0.5))

    model = Noisy()
    state = torch.get_rng_state()
    fxshard.parallelize(model, fxshard.tensor_parallel(2), (X,))
    assert model.calls == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_a_meta_model_is_taken_at_its_word() -> None:
    with torch.device("meta"):
        model = Undecided()
    program = fxshard.parallelize(model, fxshard.tensor_parallel(2), (X.to("meta"),))
    assert program.collectives()
