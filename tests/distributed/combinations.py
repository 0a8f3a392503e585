"""What ranks run to show that features work together."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxshard
from fxshard.errors import DistributedError
from tests.distributed.gradients import assert_grads, counted
from tests.helpers import weighted_loss
from tests.presets import preset

Case = tuple[Callable[[], tuple[nn.Module, tuple[Any, ...]]], str, dict[str, Any]]


def built(case: Case) -> tuple[nn.Module, tuple[Any, ...], fxshard.ParallelModule]:
    make, plan, options = case
    torch.manual_seed(0)
    model, args = make()
    return model, args, fxshard.parallelize(copy.deepcopy(model), preset(plan), args, **options)


def as_many_collectives_as_it_says(cases: list[Case]) -> None:
    """One step issues the collectives that ``collectives()`` lists, of as many bytes."""
    for case in cases:
        _, args, program = built(case)
        program(*args)  # the first call compares the ranks
        with counted() as calls:
            weighted_loss(program(*args)).backward()
        said = Counter((c.kind, c.num_bytes) for c in program.collectives())
        assert calls == said, f"{case}: {calls - said}; {said - calls}"


class TwoHeads(nn.Module):
    """The second head is of another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.first, self.second = nn.Linear(8, 8).double(), nn.Linear(8, 4).double(), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.trunk(x).tanh()
        return self.first(hidden), self.second(hidden.float())


def accumulation_over_several_sums() -> None:
    """The last backward pass sums all that waits: of dtypes, and of axes, to which it brings nothing itself."""
    model, x = TwoHeads(), torch.randn(4, 8, dtype=torch.float64)
    program = fxshard.parallelize(copy.deepcopy(model), preset("dp2"), (x,))
    for head in (1, 0):
        model(x)[head].sum().backward()
    program(x)
    with program.no_sync():
        program(x)[1].sum().backward()
    assert program.unsummed
    program(x)[0].sum().backward()
    assert_grads(program, model)


def accumulation_over_several_axes() -> None:
    """A call whose dims of size 1 are not split sums over fewer axes than the others."""
    for lengths in ((8, 1), (1, 8), (8, 8, 1)):
        model, x = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 4)), torch.arange(32).view(4, 8) % 16
        program = fxshard.parallelize(copy.deepcopy(model), preset("dp2_cp2"))
        for at, length in enumerate(lengths):
            model(x[:, :length]).square().sum().backward()
            with program.no_sync() if at < len(lengths) - 1 else contextlib.nullcontext():
                program(x[:, :length]).square().sum().backward()
        assert_grads(program, model)
    program.zero_grad()
    with program.no_sync():
        program(x).sum().backward()
        with pytest.raises(DistributedError, match="from a call that sums over other axes"):
            program(x[:, :1]).sum().backward()


def trains_as_one_device(cases: list[Case]) -> None:
    """Outputs and gradients of two steps, the second one in two parts."""
    for case in cases:
        model, args, program = built(case)
        for trained in (model, program):
            for parts in (1, 2):
                trained.zero_grad(set_to_none=True)
                sum(weighted_loss(trained(*args)) for _ in range(parts)).backward()
        torch.testing.assert_close(program(*args), model(*args))
        assert_grads(program, model)
