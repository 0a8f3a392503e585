"""Activation checkpointing on real ranks: the same gradients, less memory, the collectives that the program lists."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from tests.distributed import recomputing
from tests.distributed.launch import launch

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


def test_gradients_are_those_without() -> None:
    launch(2, recomputing.transformers_models, ["tp2", "sp2", "dp2"], "llama", 2.0, (False,))


@pytest.mark.slow
def test_ranks_that_hold_nothing_take_part() -> None:
    launch(4, recomputing.ranks_that_hold_nothing, [("llama_3_heads", "tp4")])


@pytest.mark.slow
def test_a_rank_that_keeps_nothing_takes_part() -> None:
    launch(4, recomputing.narrow_layers)


def test_verify_runs_it() -> None:
    launch(2, recomputing.checked_and_trained)


@pytest.mark.slow
def test_dropout_draws_the_same_again() -> None:
    launch(2, recomputing.transformers_models, ["tp2", "sp2", "dp2"], "llama", 2.0, (True,))
    launch(2, recomputing.transformers_models, ["tp2", "sp2", "dp2"], "gpt2", 1.5)
    launch(2, recomputing.independent_masks, ["tp2", "sp2", "dp2"])


@pytest.mark.slow
def test_on_four_ranks() -> None:
    launch(4, recomputing.transformers_models, ["dp2_tp2", "dp2_sp2"])
    cases = [("llama_2_heads", "sp4"), ("llama_few_rows", "dp4"), ("llama_1_head", "tp4"), ("llama_odd_mlp", "sp4")]
    launch(4, recomputing.ranks_that_hold_nothing, cases)
