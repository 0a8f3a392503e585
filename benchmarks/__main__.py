"""See ``benchmarks``."""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

from benchmarks import dispatch, steps, table
from benchmarks.cases import Case


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    measured = argparse.ArgumentParser(add_help=False)
    measured.add_argument("--models", nargs="+", default=["mlp", "swiglu", "block", "llama"])
    measured.add_argument("--dims", nargs="+", type=int, default=[64, 512])
    measured.add_argument("--ways", nargs="+", default=["tp", "sp", "dp", "zero"])
    measured.add_argument("--passes", nargs="+", default=["forward", "backward"])
    measured.add_argument("--seconds", type=float, default=6.0, help="how long a case is timed")
    whole = commands.add_parser("steps", parents=[measured], help="step times, ratios, collectives and bytes")
    whole.add_argument("--out", type=Path, help="also write the rows here, as JSON")
    whole.add_argument("--compiled", action="store_true", help="fxshard under torch.compile, beside it as it is")
    whole.add_argument("--overlap", nargs="+", type=int, default=[], help="fxshard beside itself with so many pieces")
    alone = commands.add_parser("dispatch", parents=[measured], help="what steps cost beside their communication")
    alone.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="one GPU will do")
    tabled = commands.add_parser("table", help="what steps --out wrote, as the table of docs/performance.md")
    tabled.add_argument("files", nargs="+", type=Path)
    given = parser.parse_args()
    if given.command == "table":
        table.show(given.files)
        return
    every = product(given.dims, given.models, given.ways, given.passes)
    options = (given.compiled, tuple(given.overlap)) if given.command == "steps" else ()
    cases = [Case(model, dim, way, p == "backward", *options) for dim, model, way, p in every]
    cases = [c for c in cases if c.train or c.way in ("tp", "sp")]
    if given.command == "steps":
        steps.measure(cases, given.seconds, given.out)
    else:
        dispatch.measure([c for c in cases if c.way in ("tp", "sp")], given.seconds, given.device)


if __name__ == "__main__":
    main()
