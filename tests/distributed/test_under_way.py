"""Collectives under way, on real ranks."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import beginning
from tests.distributed.launch import launch

ONE_KEY_HEAD = {"num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 64, "attention_dropout": 0.0}


def test_collectives_under_way_give_the_same() -> None:
    launch(2, beginning.functions, [torch.float32])


def test_second_derivatives() -> None:
    launch(2, beginning.second_derivatives)


def test_programs_equal_the_model() -> None:
    launch(2, beginning.programs, [("llama", "tp2", ONE_KEY_HEAD), ("llama", "cp2", {"attention_dropout": 0.0})])


@pytest.mark.slow
def test_more_ranks() -> None:
    launch(3, beginning.functions, [torch.float32, torch.float64, torch.bfloat16])
    plans = ("dp2_tp2", "zero2_tp2", "dp2_sp2", "zero2_cp2", "cp2_tp2")
    launch(4, beginning.programs, [("llama", plan, ONE_KEY_HEAD) for plan in plans])
