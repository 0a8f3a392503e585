"""A training script as users write them: a checkpoint after every step, and a fault in the first run of rank 1.

torchrun --nproc-per-node 2 --max-restarts 1 script.py FOLDER kill|raise|none
"""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import fxshard

STEPS = 4


def main(folder: Path, fault: str) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    rank, run = dist.get_rank(), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), torch.randn(4, 8)
    program = fxshard.parallelize(model, fxshard.tensor_parallel(2), (x,))
    optimizer = torch.optim.SGD(program.parameters(), lr=0.1)
    checkpoint, first = folder / "checkpoint.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        first = saved["step"]
        for parameter, value in zip(program.parameters(), saved[f"rank {rank}"], strict=True):
            parameter.data.copy_(value)
    for step in range(first, STEPS):
        if rank == 1 and step == 2 and run == 0 and fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 1 and step == 2 and fault == "raise":
            raise ValueError("no such file: shard-2")
        optimizer.zero_grad()
        loss = program(x).square().mean()
        loss.backward()
        optimizer.step()
        parts: list[list[torch.Tensor] | None] = [None, None]
        dist.all_gather_object(parts, [p.detach() for p in program.parameters()])
        if rank == 0:
            torch.save({"step": step + 1, "rank 0": parts[0], "rank 1": parts[1]}, folder / "new.pt")
            (folder / "new.pt").rename(checkpoint)
            with open(folder / "losses.txt", "a") as file:
                file.write(f"run {run} step {step} loss {loss.item():.6f}\n")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
