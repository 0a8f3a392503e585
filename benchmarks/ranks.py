"""Two gloo ranks, one thread each."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def launch(job: Callable[..., None], *args: Any) -> None:
    """Runs ``job(*args)`` on both ranks."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_start, (f"file://{folder}/rendezvous", job, args), nprocs=2, start_method="spawn")


def _start(rank: int, where: str, job: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
    try:
        job(*args)
    finally:
        dist.destroy_process_group()
