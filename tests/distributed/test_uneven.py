"""Sizes that do not divide by the ranks, over gloo: parts are padded, some are empty, and nothing hangs."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.distributed import ranks
from tests.distributed.launch import launch
from tests.models.uneven import build_case

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")

FOUR = ("tp4", "sp4", "dp4", "dp2_tp2", "tp2_dp2", "dp2_sp2")


@pytest.mark.slow
def test_a_llama_that_nothing_divides() -> None:
    cases = [("llama", "tp4"), ("llama", "sp4"), ("llama", "dp4"), ("llama_2_heads", "tp4")]
    launch(4, ranks.equal_the_original, cases, torch.float64, False, build_case)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "llama_2_key_heads", "llama_1_head", "llama_few_rows", "gpt2_3_heads", "t5"])
def test_four_ranks(name: str) -> None:
    launch(4, ranks.equal_the_original, [(name, plan) for plan in FOUR], torch.float64, False, build_case)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["dp2_tp3", "dp2_sp3"])
def test_six_ranks(plan: str) -> None:
    cases = [(name, plan) for name in ("llama", "llama_1_key_head", "llama_one_row")]
    launch(6, ranks.equal_the_original, cases, torch.float64, False, build_case)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_dropout(name: str) -> None:
    launch(4, ranks.equal_the_original, [(name, plan) for plan in FOUR], torch.float64, True, build_case)
