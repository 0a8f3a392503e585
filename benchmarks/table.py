"""The pages' table, of the files that ``steps --out`` wrote: a line a case, how many times as long fxshard takes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HEAD = ("model", "hidden", "way", "step", "ms", "beside", "wall (quartiles)", "fastest tenth", "cpu", "collectives")


def show(files: Sequence[Path]) -> None:
    """Prints the table, in Markdown."""
    records = [record for file in files for record in json.loads(file.read_text())]
    print("| " + " | ".join(HEAD) + " |")
    print("|" + "---|" * len(HEAD))
    first: dict[str, Any] = {}
    for record in records:
        if record["name"] == "fxshard":
            first = record
            continue
        ratio = record["ratio"]
        case = (record["model"], str(record["dim"]), record["way"], "both" if record["train"] else "forward")
        wall = f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
        same = "same" if first["traffic"] == record["traffic"] else f"{_count(first)} : {_count(record)}"
        cells = (*case, f"{first['ms']:.2f}", record["name"], wall, f"{ratio['fast']:.2f}", f"{ratio['cpu']:.2f}", same)
        print("| " + " | ".join(cells) + " |")


def _count(record: dict[str, Any]) -> str:
    """How many collectives, and their bytes."""
    kinds, _, num_bytes = record["traffic"].partition("; ")
    return f"{sum(int(kind.split()[0]) for kind in kinds.split(', '))} ({num_bytes.removesuffix(' bytes')} B)"
