"""Between the backward pass and the step, on real ranks: the norm of the gradient, clipping, loss scaling."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from tests.distributed import optimizers
from tests.distributed.launch import launch

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


def test_norm_and_clipping_on_two_ranks() -> None:
    launch(2, optimizers.norm_and_clipping, [("llama", "tp2"), ("gpt2", "sp2"), ("llama", "dp2")])


@pytest.mark.slow
def test_norm_and_clipping_on_four_ranks() -> None:
    launch(4, optimizers.norm_and_clipping, [("llama", "dp2_tp2"), ("gpt2", "dp2_sp2")])


@pytest.mark.parametrize("fused", [False, True])
def test_all_ranks_skip_the_same_steps(fused: bool) -> None:
    launch(2, optimizers.loss_scaling, fused)
