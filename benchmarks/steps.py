"""The table of step times."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tabulate import tabulate

from benchmarks.cases import Case, Found, run
from benchmarks.measure import ratio
from benchmarks.ranks import launch

HEADERS = ("candidate", "ms", "fastest", "fxshard is", "quartiles", "fastest", "cpu", "collectives", "bytes", "error")


def measure(cases: Sequence[Case], budget_s: float, out: Path | None) -> None:
    """Prints a table for each case, as it is done."""
    launch(_run, list(cases), budget_s, out)


def _run(cases: Iterable[Case], budget_s: float, out: Path | None) -> None:
    logging.getLogger("fxshard").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    records = []
    for case in cases:
        found = run(case, budget_s)
        if dist.get_rank() == 0:
            print(f"{case}\n{tabulate(list(_rows(found)), HEADERS, disable_numparse=True)}\n", flush=True)
            records += list(_records(case, found))
            if out is not None:
                out.write_text(json.dumps(records, indent=1))


def _rows(found: Sequence[Found]) -> Iterable[tuple[str, ...]]:
    first = found[0]
    for each in found:
        collectives, _, num_bytes = each.traffic.partition("; ")
        cells = ("", "", "", "")
        if each is not first:
            r = ratio(first.times, each.times)
            cells = (f"{r.median:.2f}", f"{r.low:.2f} to {r.high:.2f}", f"{r.fast:.2f}", f"{r.cpu:.2f}")
        times = (f"{1e3 * each.times.median_s:.3f}", f"{1e3 * each.times.fast_s:.3f}")
        yield each.name, *times, *cells, collectives, num_bytes.removesuffix(" bytes"), f"{each.error:.0e}"


def _records(case: Case, found: Sequence[Found]) -> Iterable[dict[str, Any]]:
    for each in found:
        about = {"name": each.name, "ms": 1e3 * each.times.median_s, "traffic": each.traffic, "error": each.error}
        yield asdict(case) | about | {"ratio": asdict(ratio(found[0].times, each.times))}
