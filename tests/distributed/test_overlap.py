"""Products beside collectives, on real ranks."""

from __future__ import annotations

import pytest

from tests.distributed import overlapping
from tests.distributed.launch import launch


def test_products_beside_collectives_give_the_same() -> None:
    launch(2, overlapping.functions, 120)


def test_programs_with_products_beside_collectives_equal_the_model() -> None:
    launch(2, overlapping.programs, [("llama", "tp2"), ("llama", "sp2")])


@pytest.mark.slow
def test_checkpointed_calls_communicate_no_more_than_they_say() -> None:
    launch(2, overlapping.programs, [("llama", "tp2"), ("llama", "sp2")], "model.layers.*")


@pytest.mark.slow
def test_products_beside_collectives_go_with_the_other_options() -> None:
    launch(2, overlapping.around)


@pytest.mark.slow
def test_products_beside_collectives_on_more_ranks() -> None:
    launch(3, overlapping.functions, 400)
    plans = ("dp2_tp2", "zero2_tp2", "dp2_sp2")
    launch(4, overlapping.programs, [(name, plan) for name in ("llama", "bert") for plan in plans])
