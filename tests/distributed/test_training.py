"""Training on real ranks follows one device, under every kind of plan."""

from __future__ import annotations

import pytest

from tests.distributed import training
from tests.distributed.launch import launch

NAMES = ("llama", "gpt2", "mixtral")


def test_training_on_two_ranks() -> None:
    cases = [("llama", "zero2"), ("llama", "cp2"), ("gpt2", "sp2"), ("gpt2", "zero2"), ("mixtral", "dp2")]
    launch(2, training.follows_one_device, cases)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_training_on_two_ranks_under_every_plan(name: str) -> None:
    launch(2, training.follows_one_device, [(name, plan) for plan in ("tp2", "sp2", "dp2", "zero2", "cp2")])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_training_on_four_ranks(name: str) -> None:
    plans = ("dp2_tp2", "zero2_tp2", "dp2_cp2", "zero2_cp2", "cp2_tp2", "zero2_sp2")
    launch(4, training.follows_one_device, [(name, plan) for plan in plans])


@pytest.mark.slow
def test_training_on_three_axes() -> None:
    launch(8, training.follows_one_device, [("llama", "dp2_cp2_tp2"), ("gpt2", "zero2_cp2_tp2")])
