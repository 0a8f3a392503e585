"""Gradients on real ranks: buckets, accumulation, what the program says that it communicates."""

from __future__ import annotations

import pytest

from tests.distributed import gradients
from tests.distributed.launch import launch
from tests.helpers import slow_but_for


@slow_but_for("name", ("llama", "gpt2"), "llama")
def test_a_step_communicates_what_the_program_says(name: str) -> None:
    cases = [(name, plan) for plan in ("tp2", "sp2", "dp2", "zero2")]
    launch(2, gradients.as_many_collectives_as_it_says, cases)


@pytest.mark.slow
def test_a_step_on_two_axes_communicates_what_the_program_says() -> None:
    cases = [(name, plan) for name in ("llama", "gpt2") for plan in ("dp2_tp2", "zero2_tp2", "dp2_sp2", "tp2_zero2")]
    launch(4, gradients.as_many_collectives_as_it_says, cases)


def test_gradients_are_summed_in_buckets() -> None:
    launch(2, gradients.buckets)


def test_gradients_that_somebody_keeps_are_not_overwritten() -> None:
    launch(2, gradients.memory_of_gradients)


def test_gradients_wait_within_no_sync() -> None:
    launch(2, gradients.accumulation)


def test_gradients_from_outside_are_not_summed() -> None:
    launch(2, gradients.penalties)


def test_gathered_weights_are_gathered_again() -> None:
    launch(2, gradients.regathering)


def test_gathered_weights_are_gathered_again_whatever_python_frees() -> None:
    launch(2, gradients.gathering_again_whatever_python_frees)
