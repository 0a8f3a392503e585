"""``python -m tests.mutants [WORD ...]``: breaks one line of fxshard after the other; the default tests should see it.

Each mutant is a copy of the checkout with one line changed, on which those of the default tests run that should fail.
The exit code is 1 where one passes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent


class Mutant(NamedTuple):
    """A line that is replaced, and the tests that should see it."""

    what: str
    file: str
    line: str
    by: str
    tests: str


MUTANTS = (
    Mutant("the last rank's part is one too long", "placement.py", "max(0, min(most, count - rank * most))",
           "max(0, min(most, count - rank * most + 1))", "tests/test_placement.py fxshard/placement.py"),
    Mutant("what is replicated counts on every rank", "gradients.py",
           "all(is_shard(p) or i == 0 for p, i in zip(placed, at, strict=True))", "True", "tests/test_grad_norm.py"),
    Mutant("an earlier call's capture serves whatever changed", "captures.py", "fits = conditions.still_hold() and",
           "fits =", "tests/kinds/test_reads.py"),
    Mutant("the other way of a branch is taken", "capture/branches.py",
           "yes, no = (x, other) if answer else (other, x)",
           "yes, no = (other, x) if answer else (x, other)", "tests/kinds/test_branches.py"),
    Mutant("a draw that nobody reads is dead", "rules/effects.py", "or bool(written(node)) or draws(node)",
           "or bool(written(node))", "tests/kinds/test_effects.py tests/kinds/test_draws.py"),
    Mutant("a row's bias is added by every rank", "passes/localize.py", '(arguments["bias"], 1 / ranks)',
           '(arguments["bias"], 1)', "tests/rules/test_prove.py -k addmm-or-linear-or-conv"),
    Mutant("any optimizer may step parts", "training/optimizers.py", "if known is not None and cls.step is known.step:",
           "if True:", "tests/runtime/test_optimizers.py"),
    Mutant("a tenth is equal", "ruler.py", "error <= max(allowed, floor))", "error <= max(1e6 * allowed, floor))",
           "tests/test_ruler.py"),
    Mutant("a flipped bit is loaded", "checkpoint/pretrained.py",
           'elif list(checksums_of(file, mine)) != [known["crc32"][i] for i in mine]:', "elif False:",
           "tests/checkpoint/test_integrity.py"),
    Mutant("a stale capture is taken from disk", "cache/__init__.py",
           'found if digest_of(found.reads.outside(model)) == about["reads"] else None', "found", "tests/cache"),
    Mutant("a part of an input is written to, not the input", "passes/annotate.py",
           "copy.update_arg(0, memory.get(node.args[0], copies[node.args[0]]))", "pass",
           "tests/kinds/test_serves.py tests/kinds/test_branches.py"),
    Mutant("quotes in names end them", "codegen/text.py",
           "return f'\"{text}\"' if '\"' not in text and \"\\\\\" not in repr(text) else repr(text)",
           "return f'\"{text}\"'", "tests/kinds/test_names.py tests/codegen"),
    Mutant("memory is what the schema says", "rules/effects.py",
           "next((operand for operand in node.all_input_nodes if shares_memory(node, operand)), None)", "None",
           "tests/kinds/test_memory.py"),
    Mutant("a gradient goes to all memory that is shown", "normal/strided.py", "if bool(inside.all()):", "if True:",
           "tests/kinds/test_memory.py"),
)  # fmt: skip


def killed(mutant: Mutant, folder: Path) -> bool:
    """Whether the tests fail with the mutant."""
    copy = folder / "checkout"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv", ".git", "__pycache__", ".*_cache"))
    path = copy / "fxshard" / mutant.file
    text = path.read_text(encoding="utf-8")
    assert text.count(mutant.line) == 1, f"{mutant.file} has {text.count(mutant.line)} times: {mutant.line}"
    path.write_text(text.replace(mutant.line, mutant.by), encoding="utf-8")
    words = [word.replace("-or-", " or ") for word in mutant.tests.split()]
    command = (sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *words)
    done = subprocess.run(
        command, cwd=copy, env={**os.environ, "PYTHONPATH": str(copy)}, capture_output=True, text=True, check=False
    )
    shutil.rmtree(copy)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    print(f"{'seen' if done.returncode == 1 else 'NOT SEEN'}: {mutant.what}", *failed[:1], sep="\n    ", flush=True)
    return done.returncode == 1


def main() -> int:
    """Tries all of them."""
    wanted = [mutant for mutant in MUTANTS if not sys.argv[1:] or any(word in mutant.what for word in sys.argv[1:])]
    with tempfile.TemporaryDirectory(prefix="fxshard-mutants-") as folder:
        seen = [killed(mutant, Path(folder)) for mutant in wanted]
    print(f"{sum(seen)} of {len(seen)} mutants are seen by the default tests")
    return 0 if all(seen) else 1


if __name__ == "__main__":
    sys.exit(main())
