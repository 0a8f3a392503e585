"""What a step costs beside its communication: the collectives return at once, and one rank runs alone.

What is left is kernels and Python. Values are wrong then, and only times are taken. This is far less noisy than whole
steps are, and shows where a generated program spends more than hand-written code.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from tabulate import tabulate

from benchmarks.candidates import by_hand, example, generated
from benchmarks.cases import Case, step_of
from benchmarks.ranks import launch

COLLECTIVES = ("all_reduce", "all_gather_single", "reduce_scatter_single", "all_to_all_single")


def measure(cases: Sequence[Case], budget_s: float, device: str) -> None:
    """Prints a line a case: microseconds of each candidate, and how many times as long fxshard takes."""
    launch(_run, list(cases), budget_s, device)


def _run(cases: Sequence[Case], budget_s: float, device: str) -> None:
    logging.getLogger("fxshard").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_default_device(device)
    every = [_prepared(case) for case in cases]
    dist.barrier()
    if dist.get_rank() == 0:
        rows = []
        with silent():
            for case, steps in zip(cases, every, strict=True):
                times = fastest(steps, budget_s, torch.cuda.synchronize if device == "cuda" else int)
                rows.append((str(case), *(f"{1e6 * t:.1f}" for t in times), f"{times[0] / times[1]:.2f}"))
        print(tabulate(rows, ("case", "fxshard us", "by hand us", "ratio"), disable_numparse=True), flush=True)
    dist.barrier()


def _prepared(case: Case) -> list[Callable[[], None]]:
    """The steps of fxshard and of the hand-written code: others do not communicate by ``torch.distributed.*``."""
    x = example(case.model, case.dim, case.way, case.train)
    made = generated(case.model, case.dim, case.way, case.train), by_hand(case.model, case.dim, case.way)
    steps = [step_of(each, case, x) for each in made]
    for step in steps:
        step()
    return steps


class Done:
    """A collective that is over."""

    def wait(self) -> None:
        """Nothing to wait for."""


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Within it, collectives do nothing."""

    def nothing(*_: Any, **__: Any) -> Done:
        return Done()

    with contextlib.ExitStack() as stack:
        for name in COLLECTIVES:
            stack.enter_context(mock.patch.object(dist, name, nothing))
        yield


def fastest(steps: Sequence[Callable[[], None]], budget_s: float, finish: Callable[[], object]) -> list[float]:
    """Seconds of each step: the first tenth of many rounds in turns."""
    seconds: list[list[float]] = [[] for _ in steps]
    start = time.perf_counter()
    gc.disable()
    while time.perf_counter() - start < budget_s or len(seconds[0]) < 10:
        for step, mine in zip(steps, seconds, strict=True):
            before = time.perf_counter()
            for _ in range(5):
                step()
            finish()
            mine.append((time.perf_counter() - before) / 5)
    gc.enable()
    return [statistics.quantiles(mine, n=10)[0] for mine in seconds]
