"""Every architecture of the zoo under every plan, in two processes, and the page that tells what became of them."""

from __future__ import annotations

import contextlib
import io
import logging
import multiprocessing
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor

import torch

from tests.zoo import vision
from tests.zoo.check import PLANS, TRAINED, Row, Specimen, check
from tests.zoo.models import ZOO

PROCESSES = 2
SHORT = {"all_reduce": "ar", "all_gather": "ag", "reduce_scatter": "rs", "all_to_all": "a2a"}
"""How the table calls the collectives."""


def everything() -> list[str]:
    return [*ZOO, *(vision.VISION if vision.available() else ())]


def rows_of(name: str) -> list[Row]:
    """Evaluation under the four plans, training under two of them."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    vision.available()  # first: this process has the other's sys.path, and transformers would find half a torchvision
    entry = (ZOO | vision.VISION)[name]
    rows = []
    for training in (False, True):
        started = time.perf_counter()
        try:
            specimen = Specimen(entry, training)
        except Exception as error:
            rows.append(
                Row(
                    name,
                    entry.family,
                    "",
                    "train" if training else "eval",
                    error=f"the zoo's own fault: {type(error).__name__}: {error}",
                )
            )
            print(name, rows[-1].error, file=sys.stderr, flush=True)
            continue
        spent, first = time.perf_counter() - started, len(rows)
        for plan in TRAINED if training else PLANS:
            with contextlib.redirect_stderr(io.StringIO()):  # torch.export prints the graphs that it gives up
                rows.append(check(specimen, plan))
            if rows[-1].refused and not training:
                rows += [Row(name, entry.family, p, error=rows[-1].error, refused=True) for p in list(PLANS)[1:]]
                break
        print(f"{name}: {spent:.1f} s to build", *map(line, rows[first:]), sep="\n  ", file=sys.stderr, flush=True)
    return rows


def line(row: Row) -> str:
    share = "" if row.layer_share is None else f"{row.layer_share:.2f}"
    told = row.error or "; ".join(row.problems[:3])
    return f"{row.mode:5} {row.plan:3} {row.verdict:7} {row.share:.2f} {share:4} {row.seconds:5.1f} s  {told[:200]}"


def run(names: Iterable[str]) -> list[Row]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, mp_context=context) as pool:
        return [row for rows in pool.map(rows_of, names) for row in rows]


# --- the page --------------------------------------------------------------------------------------------------------


def page(rows: list[Row]) -> str:
    names = list(dict.fromkeys(row.name for row in rows))
    right = [name for name in names if all(r.verdict == "right" for r in rows if r.name == name and r.mode == "eval")]
    trained = [row for row in rows if row.mode == "train"]
    taught = [name for name in names if all(row.verdict == "right" for row in trained if row.name == name)]
    wrong = [row for row in rows if row.verdict in ("WRONG", "CRASH")]
    families = Counter({row.name: row.family for row in rows}.values())
    shares = [r.layer_share for r in rows if (r.mode, r.plan) == ("eval", "tp2") and r.layer_share is not None]
    parts = f"""# The zoo

{len(names)} architectures and variants of such, tiny and with random weights, run under four plans in simulation, and
once more in training mode, with dropout and layers that are dropped, under `tensor_parallel(2)` and
`sequence_parallel(2)`:
{", ".join(f"{n} {family}" for family, n in families.items())}.
Outputs, all gradients and buffers are compared with those of the original module on one device.
This page is generated: `python -m tests.zoo > docs/zoo.md`. `tests/zoo/test_zoo.py` tests the same.

- **{len(right)} of {len(names)} ({len(right) / len(names):.1%}) are right under all four plans.** In training:
  {len(taught)} ({len(taught) / len(names):.1%}) under both.
- **{len(wrong)} are wrong.** What cannot be captured [ends in an error](#refused).
- {sum(s >= 0.95 for s in shares)} of {len(shares)} have 95% or more of the bytes of their attention and MLP split by
  `tensor_parallel(2)`.

How to read the tables:

- *layers*: of the bytes of the matrices of attention and MLP, how much `tensor_parallel(2)` splits; *all*: the same of
  all parameters. *split under tp2*: how.
- *tp2*, *tp4*, *dp2*, *sp2*: the collectives of one step, forward / backward: *ar* all_reduce, *ag* all_gather, *rs*
  reduce_scatter, *a2a* all_to_all; then their payload in KiB.
- *training*: the same comparison in training mode.
- *no rule*: operators that run whole because the table has no rule for them.
- *s*: seconds for everything in the line, captures included.
""".splitlines()
    for family in families:
        parts += ["", f"## {family}", "", table_of(family, rows)]
    return "\n".join([*parts, "", *refusals(rows)])


def table_of(family: str, rows: list[Row]) -> str:
    lines = []
    for name in dict.fromkeys(row.name for row in rows if row.family == family):
        of_name = [r for r in rows if r.name == name]
        mine = {r.plan: r for r in of_name if r.mode == "eval"}
        verdict = {f"{r.plan} {r.verdict}": r for r in of_name if r.mode == "train" and r.verdict != "right"}
        training = " ".join(verdict) or "right"
        verdicts = " ".join(f"{plan} {row.verdict}" for plan, row in mine.items() if row.verdict != "right") or "right"
        tp = mine.get("tp2")
        if tp is None or tp.collectives is None:
            lines.append([f"`{name}`", verdicts, training])
            continue
        layers = "" if tp.layer_share is None else f"{tp.layer_share:.0%}"
        moved = [f"{traffic(mine[plan])}" if plan in mine else "" for plan in PLANS]
        seconds = f"{sum(row.seconds for row in of_name):.1f}"
        fallbacks = " ".join(dict.fromkeys(op for row in of_name for op in row.fallbacks))
        lines.append(
            [f"`{name}`", verdicts, training, layers, f"{tp.share:.0%}", split(tp), *moved, fallbacks, seconds]
        )
    header = ["model", "result", "training", "layers", "all", "split under tp2", *PLANS, "no rule", "s"]
    return table(header, lines)


def split(row: Row) -> str:
    """``q_proj k_proj: Shard(0); o_proj: Shard(1)``."""
    by_placement: dict[str, list[str]] = {}
    for kind, placed in (row.weights or {}).items():
        by_placement.setdefault(placed, []).append(kind)
    return "; ".join(f"{' '.join(kinds)}: {placed}" for placed, kinds in by_placement.items())


def traffic(row: Row) -> str:
    if row.collectives is None:
        return ""
    words = []
    for phase in ("forward", "backward"):
        mine = {k.split()[1]: n for k, n in row.collectives.items() if k.startswith(phase)}
        words.append(" ".join(f"{n} {SHORT[kind]}" for kind, n in sorted(mine.items())))
    return f"{words[0]} / {words[1]}, {row.num_bytes / 1024:.0f}"


def refusals(rows: list[Row]) -> list[str]:
    told = {(r.name, r.mode): r.error or r.problems[0] for r in rows if r.verdict != "right"}
    lines = [(f"`{name}`", mode, text.partition(" (unhinted")[0][:200]) for (name, mode), text in told.items()]
    return ["## Refused", "", table(["model", "mode", "what the error says"], lines)]


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Without padding, so that one long cell does not change every line."""
    every = [header, ["---"] * len(header), *([*line, *[""] * (len(header) - len(line))] for line in lines)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in every)
