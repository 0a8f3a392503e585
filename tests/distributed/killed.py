"""What the spawned processes of the kill test run: two ranks that save for ever, until they are killed."""

from __future__ import annotations

import itertools
import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import fxshard


def model_of(value: float) -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def save_for_ever(rank: int, where: str, folder: str) -> None:
    """Loads what is there, and saves weights that all equal the step, a step after the other."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=2, timeout=timedelta(seconds=30))
    program = fxshard.parallelize(model_of(0), fxshard.tensor_parallel(2), (torch.ones(2, 8),))
    optimizer = torch.optim.SGD(program.parameters(), 1.0, momentum=0.9)
    first = 0
    if fxshard.latest_checkpoint(folder):
        first = fxshard.load_checkpoint(folder, program, optimizer).step
        assert all((p == first).all() for p in program.parameters())
    for step in itertools.count(first + 1):
        with torch.no_grad():
            for parameter in program.parameters():
                parameter.fill_(step)
                optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, step)
        fxshard.save_checkpoint(folder, program, optimizer, step=step)
        if rank == 0:
            Path(folder, "now").write_text(str(step))
            Path(folder, "now").replace(Path(folder, "done"))
