"""What ranks run to show that features work together."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fxshard
from tests.distributed.gradients import counted
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


def trains_as_one_device(cases: list[Case]) -> None:
    """Outputs and gradients of two steps, the second one in two parts."""
    for case in cases:
        model, args, program = built(case)
        for trained in (model, program):
            for parts in (1, 2):
                trained.zero_grad(set_to_none=True)
                sum(weighted_loss(trained(*args)) for _ in range(parts)).backward()
        torch.testing.assert_close(program(*args), model(*args))
        grads = program.full_grads()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(grads[name], parameter.grad, msg=lambda text, name=name: f"{name}: {text}")
