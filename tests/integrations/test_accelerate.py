"""Loops over ``accelerate`` train programs as they train models on one device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

import fxshard
from fxshard.errors import DistributedError
from fxshard.integrations.accelerate import Accelerator
from tests.distributed.launch import launch
from tests.integrations import stepping


@pytest.mark.slow
def test_a_loop_on_two_ranks(tmp_path: Path) -> None:
    expected = stepping.on_one_device(tmp_path / "one")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert min(norm for steps in expected[0] for _, norm, _ in steps) > 0.1, "nothing is clipped"
    launch(2, stepping.follows_one_device, ["tp2", "zero2", "dp2"], tmp_path, expected)


@pytest.mark.slow
def test_models_are_saved_whole(tmp_path: Path) -> None:
    launch(2, stepping.saves_models, tmp_path)


@pytest.mark.slow
def test_what_cannot_be_right_is_refused(tmp_path: Path) -> None:
    launch(2, stepping.refuses, tmp_path)


def test_simulated_ranks_are_refused() -> None:
    model, x = torch.nn.Linear(4, 4), torch.randn(2, 4)
    program = fxshard.parallelize(model, fxshard.zero(2), (x,))
    with pytest.raises(DistributedError, match="for 2 ranks, and 1 run") as caught:
        Accelerator(cpu=True).prepare(program)
    assert "torchrun --nproc-per-node 2" in str(caught.value.fix)


def test_one_rank_is_a_mesh_too() -> None:
    model, x = torch.nn.Linear(4, 4), torch.randn(2, 4)
    accelerator = Accelerator(cpu=True)
    program = accelerator.prepare(fxshard.parallelize(model, fxshard.zero(1), (x,)))
    accelerator.backward(program(x).sum())
    norm = accelerator.clip_grad_norm_(program.parameters(), 1.0)
    torch.testing.assert_close(norm, torch.nn.utils.get_total_norm([torch.full((4,), 2.0), x.sum(0).expand(4, 4)]))
