"""Step times of several candidates, taken in turns: what slows the machine down slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

BLOCK_S = 0.002
"""How long a measurement lasts, about: several short steps are one."""


@dataclass(frozen=True)
class Times:
    """The time of a step of one candidate, round by round.

    Attributes:
        wall_s: what the slower rank took.
        cpu_s: the processor time of both ranks, all threads: what others do on the machine hardly changes it.
    """

    wall_s: list[float]
    cpu_s: list[float]

    @property
    def median_s(self) -> float:
        """Of all rounds."""
        return statistics.median(self.wall_s)

    @property
    def fast_s(self) -> float:
        """The tenth of the rounds that nothing disturbed took less than this."""
        return statistics.quantiles(self.wall_s, n=10)[0]


@dataclass(frozen=True)
class Ratio:
    """How many times as long one candidate takes as another.

    Attributes:
        median: of the ratios of each round.
        low: their lower quartile.
        high: their upper quartile.
        fast: of the fastest tenths.
        cpu: of the medians of the processor times.
    """

    median: float
    low: float
    high: float
    fast: float
    cpu: float


def ratio(one: Times, other: Times) -> Ratio:
    """``one`` to ``other``."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(one.wall_s, other.wall_s, strict=True)], n=4)
    cpu = statistics.median(one.cpu_s) / statistics.median(other.cpu_s)
    return Ratio(middle, low, high, one.fast_s / other.fast_s, cpu)


def timed(steps: Sequence[Callable[[], None]], budget_s: float, warm_up: int = 5) -> list[Times]:
    """Runs all ``steps`` in turns for about ``budget_s`` seconds; collective. What comes first changes every round."""
    lasts = []
    for step in steps:
        for _ in range(warm_up):
            step()
        lasts.append(min(_once(step, 1)[0] for _ in range(5)))
    shared = torch.tensor(lasts, dtype=torch.float64)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)  # all ranks go by the same numbers
    repeats = [max(1, round(BLOCK_S / each)) for each in shared.tolist()]
    wall, cpu = [], []
    start, going = time.perf_counter(), torch.ones(())
    while going:
        order = [(i + len(wall)) % len(steps) for i in range(len(steps))]
        found = {which: _once(steps[which], repeats[which]) for which in order}
        wall.append([found[i][0] for i in range(len(steps))])
        cpu.append([found[i][1] for i in range(len(steps))])
        going.fill_(time.perf_counter() - start < budget_s or len(wall) < 10)
        dist.broadcast(going, 0)
    slower, both = torch.tensor(wall, dtype=torch.float64), torch.tensor(cpu, dtype=torch.float64)
    dist.all_reduce(slower, op=dist.ReduceOp.MAX)
    dist.all_reduce(both)
    return [Times(slower[:, i].tolist(), both[:, i].tolist()) for i in range(len(steps))]


def _once(step: Callable[[], None], repeats: int) -> tuple[float, float]:
    """Wall and processor time of a step."""
    dist.barrier()
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start) / repeats, (time.process_time() - cpu) / repeats
