"""Checkpoints over gloo: saved on one mesh, resumed on every other, and on one device."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import fxshard
from tests.distributed import killed, saving, state_dicts
from tests.distributed.launch import forked, launch
from tests.distributed.saving import AFTER, BEFORE, Run
from tests.helpers import slow_but_for
from tests.presets import presets

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


def matrix(run: Run, folder: Path, *names: str) -> None:
    plans = presets(*names)
    model = run.model()
    torch.manual_seed(7)
    optimizer, scheduler = saving.optimizer_of(model)
    expected = saving.train(run, model, optimizer, scheduler, 0, BEFORE + AFTER)
    model = run.model()
    assert saving.start_and_save(run, model, folder / "one") == expected[:BEFORE]
    launch(4, saving.resume_on_every_mesh, run, plans, str(folder), expected)
    for saved in ("one", *plans):
        losses = saving.load_and_go_on(run, model, folder / saved)
        torch.testing.assert_close(losses, expected[BEFORE:], rtol=1e-9, atol=0, msg=f"saved on {saved}: {losses}")


def test_a_run_goes_on_on_other_meshes(tmp_path: Path) -> None:
    matrix(saving.GPT2, tmp_path, "dp2_tp2", "tp4")


@pytest.mark.slow
@pytest.mark.parametrize("run", [saving.GPT2, saving.LLAMA], ids=lambda run: run.name)
def test_a_run_goes_on_on_every_mesh(run: Run, tmp_path: Path) -> None:
    matrix(run, tmp_path, "dp2_tp2", "tp2_dp2", "tp4", "dp4", "dp2_sp2", "zero4", "zero2_tp2", "cp2_tp2")


@pytest.mark.slow
@pytest.mark.parametrize("run", [saving.UNEVEN, saving.UNEVEN_LLAMA], ids=lambda run: run.name)
def test_sizes_that_nothing_divides(run: Run, tmp_path: Path) -> None:
    matrix(run, tmp_path, "tp2_dp2", "tp4", "dp4", "zero4")


@pytest.mark.slow
def test_state_dicts_and_optimizers_of_four_ranks(tmp_path: Path) -> None:
    launch(4, state_dicts.every_kind, str(tmp_path))


def test_pretrained_weights_of_two_ranks(tmp_path: Path) -> None:
    launch(2, state_dicts.pretrained, str(tmp_path))


@slow_but_for("times", (3, 20), 3)
def test_killed_while_saving(tmp_path: Path, times: int) -> None:
    """Two ranks save for ever; killed at a random moment, they lose nothing that was complete, and go on with it."""
    draw, done = random.Random(times), tmp_path / "done"
    context = forked()
    before, interrupted = 0, 0
    for attempt in range(times):
        arguments = (f"file://{tmp_path}/rendezvous{attempt}", str(tmp_path))
        processes = [context.Process(target=killed.save_for_ever, args=(rank, *arguments)) for rank in range(2)]
        for process in processes:
            process.start()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (done.exists() and int(done.read_text() or 0) > before):
            time.sleep(0.01)
        time.sleep(draw.random() / 10)
        for process in draw.sample(processes, 2):
            process.kill()
            process.join()
        last = int(done.read_text() or 0)
        assert last > before
        model = killed.model_of(0)
        optimizer = torch.optim.SGD(model.parameters(), 1.0, momentum=0.9)
        step = fxshard.load_checkpoint(tmp_path, model, optimizer).step
        assert step in (last, last + 1)
        for parameter in model.parameters():
            assert (parameter == step).all()
            assert (optimizer.state[parameter]["momentum_buffer"] == step).all()
        before = step
        leftovers = len(list(tmp_path.glob("*-step-*.partial")))
        assert leftovers <= 1
        interrupted += leftovers
    assert interrupted or times < 20
