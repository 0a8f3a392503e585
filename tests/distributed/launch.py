"""Real ranks for tests: processes that live for the whole run, and take one job after the other.

A job is a function that every rank runs, with a process group of its own. The processes, what they have imported and
the models that they have built stay, which is most of the time that a test of real ranks takes. A job that leaves
something behind which others would notice (memory that is measured, processes that die) asks for fresh ones.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PRELOADED = [
    "torch.distributed.tensor",
    "torch.distributed.device_mesh",
    "torch.export",
    "sympy",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "fxshard",
    "pytest",
]
"""What the server imports from which ranks are forked: imported anew, it would take most of a rank's time."""

SOON_S = 3.0
"""How long the other ranks may take to fail, too, when one did: then they are ended."""

Job = Callable[..., None]


def launch(world: int, job: Job, *args: Any, backend: str = "gloo", fresh: bool = False) -> None:
    """Runs ``job(*args)`` in ``world`` ranks; fails with what the ranks raised.

    Args:
        world: how many ranks.
        job: what each runs; it fails by an exception.
        args: the job's.
        backend: of the process group.
        fresh: in processes that ran nothing else, and end with it.
    """
    pool = _Ranks(world) if fresh else _kept(world)
    failed = pool.run(backend, job, args)
    if fresh or failed:
        pool.end()
    if failed:
        raise AssertionError("\n".join(f"rank {rank} of {world}:\n{text}" for rank, text in sorted(failed.items())))


def forked() -> multiprocessing.context.ForkServerContext:
    """How ranks are started."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


class _Ranks:
    """Some processes that wait for jobs."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.connections: list[Connection] = []
        self.processes = []
        for rank in range(world):
            mine, theirs = multiprocessing.Pipe()
            process = forked().Process(target=_serve, args=(rank, world, theirs), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(mine)
            self.processes.append(process)

    def run(self, backend: str, job: Job, args: tuple[Any, ...]) -> dict[int, str]:
        """Runs a job on every rank; what went wrong, by rank."""
        with tempfile.TemporaryDirectory() as folder:  # no port that another test could want, too
            for connection in self.connections:
                connection.send((f"file://{folder}/rendezvous", backend, job, args))
            failed: dict[int, str] = {}
            waiting = {connection: rank for rank, connection in enumerate(self.connections)}
            while waiting:
                ready = wait(list(waiting), SOON_S if failed else None)
                for connection in ready:
                    rank = waiting.pop(connection)  # type: ignore[call-overload]
                    try:
                        text = connection.recv()  # type: ignore[union-attr]
                    except EOFError:
                        self.processes[rank].join(SOON_S)
                        text = f"its process ended with {self.processes[rank].exitcode}"
                    if text:
                        failed[rank] = text
                if not ready:  # they wait for the rank that failed
                    break
        return failed

    def end(self) -> None:
        """Ends the processes."""
        if _pools.get(self.world) is self:
            del _pools[self.world]
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


_pools: dict[int, _Ranks] = {}


def _kept(world: int) -> _Ranks:
    if world not in _pools:
        _pools[world] = _Ranks(world)
    return _pools[world]


@atexit.register
def _end() -> None:
    for pool in list(_pools.values()):
        pool.end()


# --- in a rank -------------------------------------------------------------------------------------------------------


def _serve(rank: int, world: int, jobs: Connection) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    while True:
        try:
            where, backend, job, args = jobs.recv()
        except EOFError:  # the tests are over
            return
        try:
            _run(rank, world, where, backend, job, args)
        except BaseException:
            jobs.send(traceback.format_exc())
        else:
            jobs.send("")


def _run(rank: int, world: int, where: str, backend: str, job: Job, args: tuple[Any, ...]) -> None:
    """One job, as if the process had run nothing before."""
    if backend == "nccl":
        torch.cuda.set_device(rank)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    dist.init_process_group(backend, init_method=where, rank=rank, world_size=world, timeout=timedelta(seconds=120))
    torch.manual_seed(0)
    before = dict(os.environ), Path.cwd()
    try:
        job(*args)
    finally:
        os.environ.clear()
        os.environ.update(before[0])
        os.chdir(before[1])
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
        with contextlib.suppress(Exception):
            if dist.is_initialized():
                dist.destroy_process_group()
