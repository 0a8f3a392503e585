"""Ranks in which something goes wrong, each in a process of its own, and what the others have to say about it.

A job is one rank's script. What it raises is written into a file, with the time since the fault, and ends the process.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fxshard
from fxshard import Plan, Shard, data_parallel, tensor_parallel
from fxshard.errors import DistributedError
from fxshard.weights.weights import Weights
from tests.distributed.launch import forked

TIMEOUT_S = 12
END_S = 60
"""After this long a rank hangs, by any measure."""


@dataclass
class Outcome:
    """How a rank ended.

    Attributes:
        error: ``Name: text`` of what it raised; empty where it raised nothing.
        time_s: how long after the fault it did.
        code: of the process; None where it was still there when all others had ended.
    """

    error: str
    time_s: float
    code: int | None


def outcomes(
    world: int, job: Callable[..., None], *args: Any, timeout_s: float = TIMEOUT_S, stuck: int = -1, tcp: bool = False
) -> list[Outcome]:
    """Runs ``job(rank, *args)`` on every rank; how each ended.

    Args:
        world: how many ranks.
        job: what each runs.
        args: the job's.
        timeout_s: the process group's.
        stuck: the rank that is not waited for.
        tcp: rank 0 keeps the store, not a file.
    """
    context = forked()
    with tempfile.TemporaryDirectory() as folder:
        where = f"tcp://127.0.0.1:{free_port()}" if tcp else f"file://{folder}/rendezvous"
        arguments = (world, folder, where, timeout_s, job, args)
        processes = [context.Process(target=_start, args=(rank, *arguments)) for rank in range(world)]
        for process in processes:
            process.start()
        deadline = time.monotonic() + END_S
        for rank, process in enumerate(processes):
            if rank != stuck:
                process.join(max(0.1, deadline - time.monotonic()))
        out = [_outcome(Path(folder), rank, process.exitcode) for rank, process in enumerate(processes)]
        for process in processes:
            process.kill()
            process.join()
    hanging = [rank for rank, o in enumerate(out) if o.code is None and rank != stuck]
    assert not hanging, f"ranks {hanging} hang"
    return out


def _outcome(folder: Path, rank: int, code: int | None) -> Outcome:
    file = folder / f"{rank}.json"
    if not file.exists():
        return Outcome("", 0, code)
    error, raised = json.loads(file.read_text())
    faults = [float(each.read_text()) for each in folder.glob("fault-*")]
    return Outcome(error, raised - min(faults, default=raised), code)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(
    rank: int, world: int, folder: str, where: str, timeout_s: float, job: Callable[..., None], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ["FAULTS"] = folder
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world, timeout=timeout)
    torch.manual_seed(0)
    try:
        job(rank, *args)
    except BaseException as error:
        said = f"{type(error).__name__}: {error}", time.time()
        Path(folder, f"{rank}.json").write_text(json.dumps(said))
        start = time.monotonic()
        dist.destroy_process_group()  # must not hang after a failure
        os._exit(1 if time.monotonic() - start < 2 else 2)


def fault() -> None:
    """Notes when the fault happened."""
    Path(os.environ["FAULTS"], f"fault-{os.getpid()}").write_text(str(time.time()))


def die() -> None:
    """As the kernel ends a process when memory runs out."""
    fault()
    os.kill(os.getpid(), signal.SIGKILL)


class MLP(nn.Module):
    """Two pairs: collectives forward and backward."""

    def __init__(self, activation: Callable[[torch.Tensor], torch.Tensor] = torch.relu) -> None:
        super().__init__()
        self.activation = activation
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.up2, self.down2 = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.down(self.activation(self.up(x)))
        return x + self.down2(self.activation(self.up2(x)))


def batch(rows: int = 4) -> torch.Tensor:
    """The same on every rank."""
    return torch.arange(8.0 * rows).view(rows, 8).cos()


def train(program: nn.Module, x: torch.Tensor, steps: int = 1) -> None:
    """Some steps, without an optimizer: no rank changes anything by itself."""
    for _ in range(steps):
        program(x).square().mean().backward()


def parallelize(model: nn.Module | None = None, plan: Any = None, **options: Any) -> fxshard.ParallelModule:
    """Tensor parallel on two ranks; with data parallel on four."""
    if plan is None:
        plan = tensor_parallel(2) if dist.get_world_size() == 2 else data_parallel(2) | tensor_parallel(2)
    return fxshard.parallelize(MLP() if model is None else model, plan, **options)


# --- ranks that differ -----------------------------------------------------------------------------------------------


def differing(rank: int) -> None:
    """One after the other, on two ranks: nothing may run, both must say what differs, and the next one starts anew."""
    other = rank == 1
    x, integers = batch(), torch.arange(8).view(2, 4)
    table = nn.Sequential(nn.Embedding(16, 8), MLP())
    partly = Plan({"tp": 2}, {"up.weight": Shard(0), "up.bias": Shard(0), "down.weight": Shard(1)})
    expect(parallelize(), batch(6 if other else 4), r"rank 0 was given x: f32\[4, 8\], rank 1 f32\[6, 8\]")
    expect(parallelize(), x.flip(0) if other else x, r"rank 0 was given values of x: \[1, 0.5403, .*, rank 1 \[0.4242,")
    expect(
        parallelize(table), integers.to(torch.int32) if other else integers, r"input: i64\[2, 4\], rank 1 i32\[2, 4\]"
    )
    expect(
        parallelize(plan=partly if other else None), x, r"the plan params up2.weight: tp: Shard\(0\), rank 1 nothing"
    )
    expect(
        parallelize(plan=Plan({"tp": 2} if other else {"dp": 2})), x, r"rank 0 has mesh: \{dp: 2\}, rank 1 \{tp: 2\}"
    )
    expect(parallelize(reduce_dtype=torch.float32 if other else None), x, r"reduce_dtype: None, rank 1 torch.float32")
    gelu = MLP(nn.functional.gelu) if other else MLP()
    expect(
        parallelize(gelu),
        x,
        r"rank 0 has aten.gelu.default: nothing, rank 1 2 times \(and 1 more|relu.default: 2 times",
    )
    program = parallelize()
    program.train(not other)
    expect(program, x, r"rank 0 has training: True, rank 1 False")
    expect(parallelize(), x, r"gradients: True, rank 1 False", grad=not other)

    double = torch.float64 if other else torch.float32
    expect(parallelize(MLP().to(double)), x.to(double), r"rank 0 has up.weight: f32\[16, 8\], rank 1 f64\[16, 8\]")
    torch.manual_seed(rank)
    expect(parallelize(), x, r"different weights: 8 tensors differ, first 'up.weight': rank 0 has up.weight: ")
    torch.manual_seed(0)

    program = parallelize(compare="metadata")  # each rank loads what it needs
    train(program, x.flip(0) if other else x)
    program = parallelize(compare="every_call")
    train(program, x, 2)
    expect(program, x.flip(0) if other else x, r"rank 0 was given values of x: ")
    train(program, x)


def expect(program: nn.Module, x: torch.Tensor, text: str, grad: bool = True) -> None:
    with torch.set_grad_enabled(grad), pytest.raises(DistributedError, match=text) as caught:
        program(x)
    assert caught.value.fix


def another_mesh(rank: int) -> None:
    train(parallelize(plan=tensor_parallel(4) if rank == 2 else None), batch())


def another_world(rank: int) -> None:
    """A rank's plan is for another number of ranks."""
    parallelize()
    time.sleep(0.5)  # time to find each other
    fault()
    train(parallelize(plan=tensor_parallel(4 if rank == 1 else 2)), batch())


def another_shape_later(rank: int) -> None:
    program = parallelize()
    train(program, batch(), 2)
    fault()
    train(program, batch(6 if rank == 1 else 4))


def another_known_shape(rank: int) -> None:
    """Both were captured before: nobody compares."""
    program = parallelize()
    train(program, batch(4))
    train(program, batch(6))
    fault()
    train(program, batch(6 if rank == 1 else 4))


# --- ranks that die, fail, or hang -----------------------------------------------------------------------------------


def killed(rank: int, victim: int, backward: bool) -> None:
    """A rank is killed in its third step."""
    program = parallelize()
    train(program, batch(), 2)
    if rank == victim and not backward:
        die()
    out = program(batch())
    if rank == victim:
        out.register_hook(lambda grad: die())
    out.square().mean().backward()


def killed_while_captured(rank: int) -> None:
    """A rank dies before its first call; the others wait to compare."""
    program = parallelize()
    time.sleep(0.5)  # time to find each other
    if rank == 1:
        die()
    train(program, batch())


def failing(rank: int) -> None:
    """A call fails on one rank only."""
    program = fxshard.parallelize(MLP(), tensor_parallel(2), (batch(),))
    train(program, batch())
    fault()
    train(program, batch(6 if rank == 1 else 4))  # captured for four rows


def hanging(rank: int, stopped: bool) -> None:
    """A rank sleeps, or its process is stopped."""
    program = parallelize()
    train(program, batch())
    fault()
    if rank == 1 and stopped:
        os.kill(os.getpid(), signal.SIGSTOP)
    elif rank == 1:
        time.sleep(END_S)
    train(program, batch())


def alone(rank: int) -> None:
    """Only one rank asks for the whole weights."""
    program = parallelize()
    train(program, batch())
    fault()
    if rank == 0:
        program.full_state_dict()
    else:
        train(program, batch())


# --- while saving and loading ----------------------------------------------------------------------------------------

SAVES: dict[str, Callable[[fxshard.ParallelModule, str], Any]] = {
    "save_checkpoint": lambda program, folder: fxshard.save_checkpoint(folder, program),
    "load_checkpoint": lambda program, folder: fxshard.load_checkpoint(folder, program),
    "save_pretrained": lambda program, folder: fxshard.save_pretrained(program, folder),
    "load_pretrained": lambda program, folder: fxshard.load_pretrained(program, folder),
    "full_state_dict": lambda program, folder: program.full_state_dict(),
}


def ending_while_saving(rank: int, what: str, how: str, folder: str) -> None:
    """A rank is killed, stopped, or fails by an error of its own, when it begins to save or to load."""
    program = parallelize(plan=tensor_parallel(dist.get_world_size()))
    train(program, batch())
    fxshard.save_checkpoint(folder, program)
    fxshard.save_pretrained(program, folder)
    fault()
    if rank == 1 and how == "killed":
        die()
    elif rank == 1 and how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif rank == 1:
        Weights.names.func = lambda weights: 1 // 0  # type: ignore[attr-defined]
    SAVES[what](program, folder)
