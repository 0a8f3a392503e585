"""What the spawned processes of ``test_loading.py`` run."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

import fxshard

WIDE, NARROW, LAYERS = 4096, 2048, 6
MIB = 2**20
CONSTANT = 16 * MIB
"""What loading may take beside the weights: the piece that is read, libraries that are used for the first time."""


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(NARROW, WIDE), nn.Linear(WIDE, NARROW)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def build() -> nn.Module:
    return nn.Sequential(*(Layer() for _ in range(LAYERS)))


def memory(key: str) -> int:
    """A line of this process's status: VmRSS, what it has; VmHWM, the most it had; RssAnon, what is no file's."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) * 1024


def forget_the_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def load_and_measure(folder: str) -> None:
    with torch.device("meta"):
        model, x = build(), torch.zeros(2, NARROW)
    program = fxshard.parallelize(model, fxshard.tensor_parallel(2), args=(x,))
    parts = sum(p.numel() * p.itemsize for p in program.parameters())
    whole = sum(p.numel() * p.itemsize for p in model.parameters())
    assert parts < 0.51 * whole
    forget_the_peak()
    before = memory("VmRSS")
    fxshard.load_pretrained(program, folder)
    peak, now = memory("VmHWM") - before, memory("VmRSS") - before
    print(
        f"rank {program.rank}: the model has {whole / MIB:.0f} MiB, this rank {parts / MIB:.0f}; loading took "
        f"{peak / MIB:.0f} at the most ({peak / parts:.2f} of the parts), {now / MIB:.0f} in the end",
        flush=True,
    )
    assert peak <= 1.1 * parts + CONSTANT, f"{peak / MIB:.0f} MiB for {parts / MIB:.0f}"
    y = program(torch.ones(2, NARROW))
    assert torch.allclose(y, torch.load(Path(folder) / "expected.pt"), rtol=1e-4, atol=1e-4)
