"""What a rank holds under ``zero``: its share of parameters and optimizer states, and a layer's weights at a time."""

from __future__ import annotations

import multiprocessing

import pytest

from tests.distributed import letting_go, memory
from tests.distributed.launch import launch


@pytest.mark.slow
def test_a_rank_holds_its_share_of_parameters_and_optimizer_states() -> None:
    context = multiprocessing.get_context("forkserver")
    with context.Manager() as manager:
        results = manager.Queue()
        with context.Pool(1) as pool:
            single, single_grown = pool.apply(memory.of_one_device)
        launch(4, memory.under_zero, results, fresh=True)
        ranks = results.get()
    for rank, (held, gathered, grown) in enumerate(ranks):
        print(
            f"rank {rank}: parameters and optimizer states {held / single:.3f} of one device's "
            f"({gathered / memory.MIB:.1f} MiB gathered at the most), memory of the process grew by "
            f"{grown / memory.MIB:.0f} MiB, {grown / single_grown:.3f} of {single_grown / memory.MIB:.0f} MiB"
        )
        assert held < 1.15 / 4 * single
        assert grown < 1.15 / 4 * single_grown  # activations, gradients and the buffers of the backend are in it


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["tp2", "zero2"])
def test_a_rank_lets_the_model_go(plan: str) -> None:
    launch(2, letting_go.a_rank_lets_the_model_go, plan, fresh=True)
    launch(2, letting_go.what_the_user_keeps_stays, plan)
    launch(2, letting_go.autocast_after_the_model_is_gone, plan)
