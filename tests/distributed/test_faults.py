"""Real processes in which a rank dies, hangs or differs: the others end soon, and say which rank, and in what."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fxshard.ranks.faults import guarded
from fxshard.ranks.session import Session
from fxshard.runtime.process_groups import checksum
from tests.distributed import faulty
from tests.distributed.faulty import TIMEOUT_S, Outcome, outcomes
from tests.helpers import slow_but_for
from tests.speed import slowness

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo"),
    pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="ranks are killed by signals of POSIX"),
]

SCRIPT = Path(__file__).with_name("script.py")
SOON_S = TIMEOUT_S / 3
"""When a rank has died, the others end long before the timeout."""


def says(outcome: Outcome, *texts: str, within_s: float = SOON_S) -> None:
    assert outcome.error.startswith("DistributedError: "), outcome
    for text in texts:
        assert text in outcome.error, outcome.error
    assert "  fix     " in outcome.error
    assert outcome.code == 1, "it hung while the process group was destroyed" if outcome.code == 2 else outcome
    assert outcome.time_s < within_s * slowness()


def died(rank: int) -> tuple[str, str]:
    return f"failed: rank {rank} died", f"rank {rank}  died (process "


@pytest.mark.parametrize(
    ("backward", "where"),
    [(False, "all_reduce 1 of call 3 over tp, f32[4, 8]"), (True, "all_reduce 3 of call 3 over tp, f32[4, 8]")],
)
def test_a_killed_rank(backward: bool, where: str) -> None:
    survivor, victim = outcomes(2, faulty.killed, 1, backward)
    assert victim.code == -signal.SIGKILL
    says(survivor, f"rank 0: {where}, ", *died(1), "gloo    ")


def test_a_killed_rank_of_four_is_named_by_ranks_that_never_talked_to_it() -> None:
    out = outcomes(4, faulty.killed, 2, False)
    assert out.pop(2).code == -signal.SIGKILL
    for survivor in out:
        says(survivor, *died(2))
    assert "all_reduce 1 of call 3 over tp, f32[2, 8], " in out[2].error
    assert "all_gather 3 of call 3 over dp, f32[2, 8], " in out[0].error


def test_a_rank_killed_before_its_first_call() -> None:
    survivor, _ = outcomes(2, faulty.killed_while_captured)
    says(survivor, "rank 0, call 1, with x: f32[4, 8]: all ranks compare what they run, but rank 1 died")


def test_the_rank_that_keeps_the_store_is_killed() -> None:
    victim, survivor = outcomes(2, faulty.killed, 0, True, tcp=True)
    assert victim.code == -signal.SIGKILL
    says(survivor, *died(0), "  store   ", "rank 0 keeps it")


def test_ranks_that_differ_say_in_what() -> None:
    for rank, out in enumerate(outcomes(2, faulty.differing)):
        assert out.code == 0, f"rank {rank}: {out.error}"


def test_another_mesh() -> None:
    for out in outcomes(4, faulty.another_mesh):
        says(out, "rank 2 has mesh: {tp: 4}, the others {dp: 2, tp: 2}")


def test_a_plan_for_another_number_of_ranks() -> None:
    survivor, wrong = outcomes(2, faulty.another_world)
    assert "MeshError: the mesh {tp: 4} has 4 ranks, but 2 processes run" in wrong.error
    says(survivor, "all ranks compare what they run, but rank 1 died")


def test_another_shape_in_a_later_step() -> None:
    others, wrong = outcomes(2, faulty.another_shape_later)
    says(wrong, "rank 1, call 3, with x: f32[6, 8]: ", "rank 0  is in all_reduce 1 of call 3 over tp, f32[4, 8]")
    says(others, "all_reduce 1 of call 3 over tp", "failed: rank 1 failed first", "call 3, with x: f32[6, 8]")


def test_a_call_that_fails_on_one_rank() -> None:
    others, wrong = outcomes(2, faulty.failing)
    assert wrong.error.startswith("InputError: ")
    says(others, "all_reduce 1 of call 2 over tp", "rank 1  failed first: InputError: the inputs do not fit what was")


def test_a_rank_that_hangs() -> None:
    survivor, _ = outcomes(2, faulty.hanging, False, timeout_s=3, stuck=1)
    line = "it runs faulty.py:"
    says(survivor, "all_reduce 1 of call 2", "failed: rank 1 has not come", line, "time.sleep(END_S)", within_s=4)
    assert survivor.time_s > 2.5


@pytest.mark.slow
def test_a_stopped_rank_does_not_answer() -> None:
    survivor, _ = outcomes(2, faulty.hanging, True, timeout_s=4, stuck=1)
    says(survivor, "failed: rank 1 does not answer", within_s=5)


@pytest.mark.slow
def test_a_rank_of_four_that_hangs() -> None:
    out = outcomes(4, faulty.hanging, False, timeout_s=4, stuck=1)
    for rank in (0, 2, 3):
        says(out[rank], "failed: rank 1 has not come", "time.sleep(END_S)", within_s=5)


@pytest.mark.slow
@pytest.mark.parametrize("tcp", [False, True])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("victim", [0, 3])
def test_any_killed_rank_of_four(victim: int, backward: bool, tcp: bool) -> None:
    out = outcomes(4, faulty.killed, victim, backward, tcp=tcp)
    out.pop(victim)
    for survivor in out:
        says(survivor, *died(victim))


@pytest.mark.slow
def test_a_collective_that_only_one_rank_calls() -> None:
    one, other = outcomes(2, faulty.alone, timeout_s=4)
    says(one, "all_gather 4 of call 1", "failed: rank 1 is in another one", "all_reduce 1 of call 2", within_s=5)
    says(other, "all_reduce 1 of call 2", "failed: rank 0 is in another one", "all_gather 4 of call 1", within_s=5)


@pytest.mark.slow
def test_shapes_that_both_were_captured_end_the_process_in_gloo() -> None:
    out = outcomes(2, faulty.another_known_shape)
    aborted = [rank for rank, each in enumerate(out) if each.code == -signal.SIGABRT]
    assert len(aborted) == 1
    says(out[1 - aborted[0]], *died(aborted[0]))


@slow_but_for(
    "what,how",
    [(what, how) for what in faulty.SAVES for how in ("killed", "stopped", "raises")],
    ("save_checkpoint", "stopped"),
    ("load_checkpoint", "killed"),
)
def test_a_rank_that_ends_while_others_save(tmp_path: Path, what: str, how: str) -> None:
    stuck = 1 if how == "stopped" else -1
    out = outcomes(3, faulty.ending_while_saving, what, how, str(tmp_path), timeout_s=5, stuck=stuck)
    said = {"killed": "rank 1 died", "stopped": "rank 1 does not answer", "raises": "rank 1 failed first"}[how]
    for rank in (0, 2):
        says(out[rank], said, within_s=7)


# --- whole scripts ---------------------------------------------------------------------------------------------------


def environment(**more: str) -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[2])
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **more}


@pytest.mark.slow
def test_torchrun_restarts_from_the_last_checkpoint(tmp_path: Path) -> None:
    """Without the variable, gloo itself may read the addresses of the ranks that died: pytorch/pytorch#135712."""
    options = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(SCRIPT), str(tmp_path)]
    done = subprocess.run(
        [*command, "kill"],
        env=environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "losses.txt").read_text().splitlines()
    assert [line.split(" loss")[0] for line in lines] == [
        "run 0 step 0",
        "run 0 step 1",
        "run 1 step 2",
        "run 1 step 3",
    ]
    losses = [float(line.split()[-1]) for line in lines]
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == 4


@pytest.mark.slow
def test_an_error_of_the_script_is_told_to_the_others(tmp_path: Path) -> None:
    start = time.monotonic()
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(faulty.free_port()), "WORLD_SIZE": "2"}
    command = [sys.executable, str(SCRIPT), str(tmp_path), "raise"]
    ranks = [
        subprocess.Popen(command, env=environment(RANK=str(rank), **where), stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1], said
    assert "rank 0: all_reduce 1 of call 3 over tp, f32[4, 8], failed: rank 1 failed first" in said[0]
    assert "rank 1  failed first: ValueError: no such file: shard-2" in said[0]
    assert time.monotonic() - start < 30 * slowness()


# --- in this process -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "expected"), [(KeyboardInterrupt(), KeyboardInterrupt), (ValueError("a"), ValueError)]
)
def test_what_is_not_of_the_backend_passes(error: BaseException, expected: type[BaseException]) -> None:
    with pytest.raises(expected), guarded(None, "all_reduce", torch.ones(2)):
        raise error


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float16, torch.int64, torch.complex64])
def test_a_checksum_sees_every_element_and_its_place(dtype: torch.dtype) -> None:
    values = (torch.arange(600_000) % 7 == 0).to(dtype)
    whole = checksum(values)
    assert whole == checksum(values.clone())
    changed: list[Callable[[torch.Tensor], torch.Tensor]] = [lambda x: x.roll(1), lambda x: x.index_fill(0, LAST, 1)]
    for change in changed:
        assert checksum(change(values)) != whole


LAST = torch.tensor([599_999])


def test_a_session_reads_nothing_of_an_earlier_start() -> None:
    store = dist.HashStore()
    old = [Session(store, rank, 2) for rank in range(2)]
    old[0].join()
    old[1].join()
    assert old[1].joined.is_set()
    old[0].set("trouble/0", "of the first start")
    late = Session(store, 1, 2)  # rank 0 has not started again yet
    late.join()
    assert not late.joined.is_set()
    first = Session(store, 0, 2)
    for session in (late, first, late):
        session.join()
    assert late.joined.is_set()
    assert late.first is not None
    assert first.is_complete
    assert late.get("trouble/0") is None
    first.set("trouble/0", "of the second")
    assert late.get("trouble/0") == "of the second"


def test_a_store_that_does_not_answer_is_given_up() -> None:
    session = Session(dist.HashStore(), 0, 2)
    with pytest.raises(TimeoutError, match="did not answer"):
        session.bounded(lambda: time.sleep(2), 0.05)
    assert session.bounded(lambda: session.get("nothing"), 5) is None


@pytest.mark.slow
def test_ranks_end_when_their_launcher_has_died(tmp_path: Path) -> None:
    script = Path(__file__).with_name("orphan.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    launcher = subprocess.Popen([*command, str(tmp_path)], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20 * TIMEOUT_S
        while len(list(tmp_path.glob("*.pid"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        pids = [int(path.read_text()) for path in tmp_path.glob("*.pid")]
        assert len(pids) == 2
    finally:
        launcher.kill()
        launcher.wait()
    deadline = time.monotonic() + 2 * TIMEOUT_S
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(map(is_running, pids))


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()
