"""A script whose ranks call a program for ever: what becomes of them when torchrun is killed."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import fxshard

if __name__ == "__main__":
    dist.init_process_group("gloo")
    x = torch.randn(4, 8)
    program = fxshard.parallelize(torch.nn.Linear(8, 8), fxshard.tensor_parallel(2), (x,))
    Path(sys.argv[1], f"{dist.get_rank()}.pid").write_text(str(os.getpid()))
    while True:
        program(x)
        time.sleep(0.1)
