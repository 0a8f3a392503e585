"""The examples run as they stand: exit code 0, the results that they promise, and nothing on stderr."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# `--standalone` takes a free port itself, so that examples may run beside each other.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def environment() -> dict[str, str]:
    """That of an example, on CPUs."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**inherited, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}


def run_example(name: str, *launcher: str, options: tuple[str, ...] = ()) -> str:
    """Runs an example in a process of its own; returns what it printed."""
    command = [*(launcher or [sys.executable]), f"examples/{name}", *options]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    assert not done.stderr.strip(), done.stderr
    return done.stdout


def count(kind: str, phase: str, module: str, printed: str) -> int:
    """How often the table of an example shows a collective."""
    (found,) = re.findall(rf"^{phase} +{kind} +{re.escape(module)} +(\d+) ", printed, re.MULTILINE)
    return int(found)


def check_embeddings(printed: str) -> None:
    assert "22.7 million parameters, 11.5 million on each rank" in printed
    assert count("all_reduce", "forward", "encoder.layer.*.attention.output.dense", printed) == 6
    assert count("all_reduce", "forward", "encoder.layer.*.output.dense", printed) == 6
    assert "all_gather" not in printed
    difference = re.search(r"largest difference +(\S+)", printed)
    assert difference is not None
    assert float(difference[1]) <= 1e-5
    assert printed.splitlines()[-1] == "  the same embeddings"
    nearest = re.search(r"^A cat is sleeping on the sofa\. +(.+?) {2,}0\.\d+$", printed, re.MULTILINE)
    assert nearest is not None
    assert nearest[1] == "A kitten naps on the couch."


def test_embed_sentences_on_two_processes() -> None:
    printed = run_example("embed_sentences.py", *TORCHRUN)
    assert "on 2 processes, gloo, cpu" in printed
    assert printed.count("all-MiniLM-L6-v2") == 1  # rank 0 alone prints
    check_embeddings(printed)


@pytest.mark.slow
def test_embed_sentences_without_a_launcher() -> None:
    printed = run_example("embed_sentences.py")
    assert "on 2 ranks, simulated" in printed
    check_embeddings(printed)


@pytest.mark.slow
def test_train_gpt2_on_two_processes() -> None:
    printed = run_example("train_gpt2.py", *TORCHRUN)
    rows = [line.split() for line in printed.splitlines() if re.match(r" +\d+ +\d", line)]
    assert [int(row[0]) for row in rows] == [0, 4, 8, 12, 16, 19]
    assert all(abs(float(one) - float(sharded)) <= 1e-4 for _, one, sharded, _ in rows)
    assert float(rows[-1][2]) < float(rows[0][2]) - 1.0  # it learns
    assert printed.splitlines()[-1] == "the same training"


@pytest.mark.slow
def test_train_gpt2_says_how_it_is_started() -> None:
    command = [sys.executable, "examples/train_gpt2.py"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 1
    assert "torchrun --standalone --nproc-per-node 2 examples/train_gpt2.py" in done.stderr


SMALL = ("--steps", "6", "--save-every", "3", "--batch", "4", "--length", "32", "--width", "64", "--layers", "2")


def losses_of(printed: str) -> dict[int, float]:
    """The losses by step that ``train.py`` printed."""
    return {int(step): float(loss) for step, loss in re.findall(r"^step +(\d+)  loss (\S+)", printed, re.MULTILINE)}


@pytest.mark.slow
def test_training_goes_on_under_another_plan(tmp_path: Path) -> None:
    single = losses_of(run_example("train.py", options=(*SMALL, "--folder", str(tmp_path / "one"))))
    assert list(single) == [1, 2, 3, 4, 5, 6]
    assert single[6] < single[1]
    options = (*SMALL, "--folder", str(tmp_path / "two"))
    first = losses_of(run_example("train.py", *TORCHRUN, options=(*options, "--plan", "tp2")))
    (tmp_path / "two" / "000002-step-6").rename(tmp_path / "last")
    again = losses_of(run_example("train.py", *TORCHRUN, options=(*options, "--plan", "zero2", "--checkpoint")))
    assert list(again) == [4, 5, 6]
    for found in (first, again):
        assert all(abs(loss - single[step]) < 1e-4 for step, loss in found.items()), (found, single)


@pytest.mark.slow
def test_torchrun_restarts_training_that_lost_a_rank(tmp_path: Path) -> None:
    options = ("--steps", "40", "--save-every", "5", *SMALL[4:], "--plan", "dp2", "--folder")
    single = losses_of(run_example("train.py", options=(*options[:-3], "--folder", str(tmp_path / "one"))))
    command = [*TORCHRUN, "--max-restarts", "3", "examples/train.py", *options, str(tmp_path / "two")]
    env = environment() | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        printed = ""
        for line in run.stdout:
            printed += line
            if line.startswith("step    12") and printed.count("step    12") == 1:
                workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text(encoding="ascii").split()
                os.kill(int(workers[-1]), signal.SIGKILL)
        assert run.wait(timeout=180) == 0
    losses = losses_of(printed)
    assert len(re.findall(r"^step +11 ", printed, re.MULTILINE)) == 2, "it went on behind the last checkpoint"
    assert all(abs(losses[step] - loss) < 1e-3 for step, loss in single.items())


@pytest.mark.slow
def test_the_trainer_of_transformers_on_two_processes(tmp_path: Path) -> None:
    single = run_example("hf_trainer.py", options=("--folder", str(tmp_path / "one")))
    printed = run_example("hf_trainer.py", *TORCHRUN, options=("--folder", str(tmp_path / "two"), "--plan", "zero2"))
    pattern = r"^step (\d) +loss (\S+) +norm (\S+)(?: +resumed (\S+))?$"
    rows, expected = (re.findall(pattern, text, re.MULTILINE) for text in (printed, single))
    assert [row[0] for row in rows] == list("12345678")
    for row, want in zip(rows, expected, strict=True):
        assert [float(each or 0) for each in row] == pytest.approx([float(each or 0) for each in want], abs=1e-4)
    assert all(row[3] == row[1] for row in rows[4:])
    assert "(one device)" in single
    assert "(zero2, 2 processes)" in printed


def test_quickstart() -> None:
    printed = run_example("quickstart.py")
    assert "ok: True" in printed
    assert "rank 1 of 2" in printed
    assert "forward: all_reduce over tp, all_reduce over tp, all_gather over dp" in printed
