"""Folders of checkpoints, of which a killed save never takes one away.

A checkpoint is written into a folder whose name ends in ``.partial``, synced to disk, and renamed: what has its final
name is complete, and stays as it is. It is taken away in the same order: renamed first, then deleted. So whatever ends
in ``.partial`` is a leftover, which the next save deletes.

    run/000011-step-1100            complete
    run/000012-step-1200            complete, the newest: the number counts the saves
    run/000013-step-1300.partial    being written, or left behind
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from fxshard.weights.files import keep_from_others

COMPLETE = re.compile(r"(\d{6,})-step-(-?\d+)")
PARTIAL = ".partial"


def complete_folders(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, the oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := COMPLETE.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint that ``save_checkpoint`` wrote into ``folder``; None where there is none.

    >>> latest_checkpoint("/no/such/folder")
    """
    return next(reversed(complete_folders(Path(folder))), None)


def begin(folder: Path, step: int) -> Path:
    """Deletes leftovers, and makes the folder to write into."""
    if not folder.is_dir():
        folder.mkdir(parents=True)
        keep_from_others([folder])
    for path in folder.iterdir():
        if path.name.endswith(PARTIAL) and COMPLETE.fullmatch(path.name.removesuffix(PARTIAL)):
            shutil.rmtree(path)
    done = complete_folders(folder)
    number = int(done[-1].name.partition("-")[0]) + 1 if done else 1
    partial = folder / f"{number:06d}-step-{step}{PARTIAL}"
    partial.mkdir()
    return partial


def finish(partial: Path, keep: int | None) -> Path:
    """Makes what was written a checkpoint, and deletes all but the newest ``keep``."""
    final = partial.with_name(partial.name.removesuffix(PARTIAL))
    _sync(partial)
    partial.rename(final)
    _sync(final.parent)
    for old in complete_folders(final.parent)[: -keep if keep else 0]:
        doomed = old.with_name(old.name + PARTIAL)
        old.rename(doomed)
        shutil.rmtree(doomed)
    return final


def _sync(folder: Path) -> None:
    """Waits until the names in a folder are on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
