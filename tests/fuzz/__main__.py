"""``python -m tests.fuzz --minutes 10 --seed 1``: random programs against one device; see ``--help``."""

from __future__ import annotations

import argparse
import logging
import sys
import time

from tests.fuzz.program import doubles
from tests.fuzz.programs import make
from tests.fuzz.run import Summary, chosen, run, shrink, with_plan

EVERY_S = 120.0
"""How often a run says how far it is."""


def main() -> int:
    """Runs programs of a seed, or shows one of them. The exit code is 1 where one was wrong, crashed or hung."""
    parser = argparse.ArgumentParser(description=main.__doc__, prog="python -m tests.fuzz")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="how long (default: 1, where --programs is not given)")
    parser.add_argument("--programs", type=int, help="how many")
    parser.add_argument("--start", type=int, default=0, help="the first index")
    parser.add_argument("--only", type=int, metavar="I", help="print program I of the seed, and what differs")
    parser.add_argument("--refusals", type=int, default=12, help="how many kinds of refusals to list")
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    if given.only is not None:
        return show(given.seed, given.only)
    minutes = given.minutes if given.minutes or given.programs else 1.0
    summary, said = Summary(), time.monotonic()
    try:
        for index, verdicts in run(given.seed, given.programs, minutes, start=given.start):
            for line in summary.add(index, verdicts):
                print(line, flush=True)
            if time.monotonic() - said > EVERY_S:
                said = time.monotonic()
                print(f"at {index}: {summary.figures()}", flush=True)
    except KeyboardInterrupt:
        pass
    print(summary.text(given.refusals))
    return 1 if summary.bad else 0


def show(seed: int, index: int) -> int:
    """Prints one program, its verdicts, and of a bad one the smallest program that shows the same."""
    program, bad = make(seed, index), False
    print(program.source())
    with doubles():
        plans = chosen(program, seed, index)
    for plan in plans:
        verdict = with_plan(program, plan)
        print(f"# {plan}\n# {verdict.kind} {verdict.call}")
        print("".join(f"#   {line}\n" for detail in verdict.details for line in detail.splitlines()), end="")
        if verdict.kind not in ("right", "invalid"):
            bad |= verdict.bad
            print("# smaller:\n" + shrink(program, plan, verdict.kind).source())
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
