"""The tables of docs/performance.md, of the files that ``steps --out`` wrote: a line a case, a column a candidate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate


def show(files: Sequence[Path]) -> None:
    """Prints the table, in Markdown: how many times as long fxshard takes, in the median of rounds and undisturbed."""
    records = [record for file in files for record in json.loads(file.read_text())]
    cases: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        cases.setdefault((record["dim"], record["model"], record["way"], record["train"]), []).append(record)
    others = list(dict.fromkeys(record["name"] for found in cases.values() for record in found[1:]))
    rows = []
    for (dim, model, way, train), (first, *rest) in cases.items():
        ratios = {each["name"]: f"{each['ratio']['median']:.2f}, {each['ratio']['fast']:.2f}" for each in rest}
        fewer = all(_count(first) <= _count(each) for each in rest if each["name"].startswith("by hand"))
        name = f"{model} {dim}, {way}, {'both' if train else 'forward'}"
        traffic = first["traffic"].removesuffix(" bytes") + ("" if fewer else " (more than by hand)")
        rows.append((name, f"{first['ms']:.2f}", *(ratios.get(other, "") for other in others), traffic))
    print(tabulate(rows, ("", "ms", *others, "collectives; bytes"), "github", disable_numparse=True))


def _count(record: dict[str, Any]) -> tuple[int, int]:
    """How many collectives, and their bytes."""
    kinds, _, num_bytes = record["traffic"].removesuffix(" bytes").partition("; ")
    return sum(int(kind.split()[0]) for kind in kinds.split(", ") if kind != "none"), int(num_bytes.replace(",", ""))
