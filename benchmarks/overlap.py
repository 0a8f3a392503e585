"""Draws when a backward pass computes and when it communicates: ``python -m benchmarks.overlap docs/overlap.svg``.

Two gloo ranks under ``data_parallel(2)``; what is drawn is what torch's profiler saw on rank 0.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fxshard

WIDTH, LAYERS, BATCH = 768, 10, 256
BUCKET_BYTES = 6 * 2**20
SIZE = (760, 150)
Span = tuple[float, float]


def backward_spans() -> tuple[list[Span], list[Span]]:
    """When this rank computed, and when it summed a bucket, in ms since the backward pass began."""
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())))
    x = torch.randn(BATCH, WIDTH)
    program = fxshard.parallelize(model, fxshard.data_parallel(2), (x,), bucket_bytes=BUCKET_BYTES)
    for _ in range(3):
        program(x).square().mean().backward()
        program.zero_grad()
    loss = program(x).square().mean()
    dist.barrier()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        loss.backward()
    events: list[Any] = list(profiled.events() or [])
    start = min(event.time_range.start for event in events)

    def spans(*names: str) -> list[Span]:
        found = [event.time_range for event in events if event.name in names]
        return sorted(((span.start - start) / 1000, (span.end - start) / 1000) for span in found)

    return spans("aten::mm", "aten::addmm", "aten::threshold_backward", "aten::sum"), spans("gloo:all_reduce")


def draw(computing: list[Span], summing: list[Span]) -> str:
    """The two rows as a picture."""
    width, height = SIZE
    left, right, end = 150, 20, max(stop for _, stop in computing + summing)
    scale = (width - left - right) / end

    def bars(spans: list[Span], top: int, colour: str) -> list[str]:
        return [
            f'<rect x="{left + a * scale:.1f}" y="{top}" width="{max(0.5, (b - a) * scale):.1f}" height="26" '
            f'fill="{colour}" stroke="white" stroke-width="0.5"/>'
            for a, b in spans
        ]

    ticks = [
        f'<text x="{left + t * scale:.1f}" y="{height - 14}" text-anchor="middle">{t:.0f} ms</text>'
        for t in (end * i / 5 for i in range(6))
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
            'font-size="12">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            '<text x="10" y="37">backward pass</text>',
            *bars(computing, 20, "#4878a8"),
            '<text x="10" y="82">buckets, all-reduced</text>',
            *bars(summing, 65, "#d07030"),
            *ticks,
            "</svg>",
            "",
        ]
    )


def run(rank: int, where: str, path: str) -> None:
    """One rank's job."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
    computing, summing = backward_spans()
    if rank == 0:
        Path(path).write_text(draw(computing, summing), encoding="utf-8")
        hidden = sum(min(b, computing[-1][1]) - a for a, b in summing if a < computing[-1][1])
        total = sum(b - a for a, b in summing)
        print(
            f"{len(summing)} buckets, {total:.1f} ms in all, {hidden / total:.0%} of it while the backward pass went on"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, (f"file://{folder}/rendezvous", sys.argv[1]), nprocs=2)
