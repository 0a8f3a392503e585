"""A backward pass can be differentiated again: penalties on gradients, score matching, meta learning."""

from __future__ import annotations

import pytest
import torch

import fxshard
from tests.distributed import twice
from tests.distributed.launch import launch
from tests.helpers import slow_but_for
from tests.presets import preset


@slow_but_for("plan", (*twice.PLANS, "tp3", "dp3", "dp2_tp2", "zero2_tp2"), "sp2", "zero2_tp2")
@pytest.mark.parametrize("name", twice.MODELS)
def test_penalties_on_gradients(name: str, plan: str) -> None:
    torch.manual_seed(0)
    model, x = twice.MODELS[name]().double(), twice.example()
    want = twice.on_one_device(model, x)
    run = fxshard.simulate(fxshard.parallelize(model, preset(plan), (x,)), x)
    found = iter(run.grad(twice.loss_of))
    x.grad = None
    run.backward(lambda out: twice.loss_of(out) + twice.penalty_of(next(found)))
    for each, value in want.items():
        got = x.grad if each == "input" else run.full_grads()[each]
        torch.testing.assert_close(got, value, msg=lambda t, each=each: f"{each}: {t}")


@pytest.mark.slow
def test_penalties_on_ranks() -> None:
    launch(2, twice.penalties, 2)


@pytest.mark.slow
def test_penalties_on_four_ranks() -> None:
    launch(4, twice.penalties, 4)
