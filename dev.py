#!/usr/bin/env python3
"""Sets up a virtual environment beside this file and runs things in it. Needs Python 3.11 or newer, and nothing else.

    python3 dev.py demo              the main job: a pretrained model, sharded over two processes
    python3 dev.py test              format, lint, types, tests
    python3 dev.py test --slow       ... and the slow tests
    python3 dev.py test -k mesh      ... what dev.py does not know goes to pytest
    python3 dev.py setup             only the environment

The environment (.venv) is made once, and again when pyproject.toml or constraints.txt change. Each step prints its
command first; the first one that fails ends the run, with its exit code.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
EXTRAS = ".[dev,examples]"
# Only tests/zoo/vision.py sees them, in a folder of their own: transformers imports torchvision wherever it is
# installed, and PyPI's does not load beside a CPU torch.
VISION = ("pillow", "timm", "torchvision")


def run(*command: str | Path, **env: str) -> None:
    """Prints the command, runs it in the checkout, and ends this program where it fails."""
    words = [str(word) for word in command]
    shown = [word.removeprefix(f"{ROOT}{os.sep}") for word in words]
    print(f"\n$ {shlex.join(shown)}", flush=True)
    started = time.monotonic()
    try:
        code = subprocess.run(words, cwd=ROOT, env={**os.environ, **env}, check=False).returncode
    except OSError as error:
        sys.exit(f"dev.py: cannot run {shown[0]}: {error}")
    if code:
        print(f"dev.py: failed with exit code {code}: {shlex.join(shown)}", file=sys.stderr, flush=True)
        sys.exit(code if code > 0 else 128 - code)
    print(f"# ok, {time.monotonic() - started:.1f} s", flush=True)


def fingerprint() -> str:
    """What the environment depends on: this Python, the pins, the metadata."""
    digest = hashlib.sha256(sys.version.encode())
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def setup(venv: Path) -> Path:
    """Makes the environment unless it is there and up to date; returns the folder of its programs."""
    programs = venv / "bin"
    stamp = venv / "fxshard-setup"
    if stamp.is_file() and stamp.read_text() == fingerprint():
        return programs
    if not (programs / "pip").exists():
        try:
            import ensurepip  # noqa: F401
        except ImportError:
            sys.exit("dev.py: this Python cannot make virtual environments; on Debian: apt-get install python3-venv")
        run(sys.executable, "-m", "venv", "--clear", venv)
    install = (programs / "python", "-m", "pip", "install", "--quiet", "-c", "constraints.txt")
    run(*install, "-e", EXTRAS)
    run(*install, "--no-deps", "--upgrade", "--target", venv / "vision", *VISION)
    stamp.write_text(fingerprint())
    return programs


def demo(programs: Path, arguments: list[str]) -> None:
    """Pretrained weights, real sentences, two ranks."""
    example = "examples/embed_sentences.py"
    run(
        programs / "torchrun",
        *("--standalone", "--nproc-per-node", "2", example, *arguments),
        HF_HUB_OFFLINE="1",
        OMP_NUM_THREADS="1",
    )


def test(programs: Path, slow: bool, workers: str, arguments: list[str]) -> None:
    """Format, lint, types, tests: what a change must pass."""
    run(programs / "ruff", "format", "--check", ".")
    run(programs / "ruff", "check", ".")
    run(programs / "mypy")
    selected = ["-m", ""] if slow else []
    parallel = [] if workers == "0" else ["-n", workers, "--dist", "worksteal"]
    profile = os.environ.get("HYPOTHESIS_PROFILE", "ci")
    run(programs / "python", "-m", "pytest", *parallel, *selected, *arguments, HYPOTHESIS_PROFILE=profile)


def main() -> None:
    """Reads the command line and does what it says."""
    if sys.version_info < (3, 11):
        sys.exit(f"dev.py: fxshard needs Python 3.11 or newer, this is {sys.version.split()[0]} ({sys.executable})")
    venv_help = "the environment to make or use (default: .venv here)"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help=venv_help)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("setup", help="make the environment")
    commands.add_parser("demo", help="run the main job; further arguments go to the example")
    tests = commands.add_parser("test", help="format, lint, types, tests; further arguments go to pytest")
    tests.add_argument("--slow", action="store_true", help="the slow tests too")
    tests.add_argument("-n", "--workers", default="2", help="pytest processes, 0 for none of its own (default: 2)")
    known, rest = parser.parse_known_args()
    if known.command == "setup" and rest:
        parser.error(f"unknown arguments: {shlex.join(rest)}")

    programs = setup(known.venv.absolute())
    if known.command == "demo":
        demo(programs, rest)
    elif known.command == "test":
        test(programs, known.slow, known.workers, rest)
    else:
        print(f"the environment is ready: . {shlex.quote(str(programs / 'activate'))}")


if __name__ == "__main__":
    main()
