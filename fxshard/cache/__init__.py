"""Captures kept on disk, so that the next start of a program need not capture again.

A capture is found by what it depends on (``key``), is taken only while the files that Python had loaded for it are as
they were, and is run once against the model, as a new one is, before it is used. So what is stale is captured anew.
The folder holds pickles: whoever may write to it may run code in the processes that read it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxshard.cache.key import digest_of, files_as_they_were, files_loaded, key_of
from fxshard.cache.stored import NotStorable, dump, restore
from fxshard.capture.captured import Captured
from fxshard.errors import CaptureError
from fxshard.weights.files import keep_from_others, written_by_others

__all__ = ["cached"]

logger = logging.getLogger("fxshard")


def cached(
    folder: Path | None,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    device: torch.device,
    make: Callable[[], Captured],
    check: Callable[[Captured, bool], bool],
) -> tuple[Captured, float]:
    """A capture from the folder, else a new one, which is put there; and the seconds that it took, without the check.

    Args:
        folder: where captures are kept; None keeps none.
        model: what is captured.
        args: its inputs.
        kwargs: likewise, by name.
        device: where the program will run.
        make: captures it.
        check: raises ``CaptureError`` where a capture computes something else than the model; False where that cannot
            be told, and nothing is taken from the folder. It is told whether the capture comes from there.
    """
    start = time.perf_counter()
    key = ""
    if folder is not None:
        try:
            key = key_of(model, args, kwargs, device)
        except NotStorable as error:
            _tell(model, folder, error)
    found = find(folder, key, model) if folder is not None and key else None
    if found is not None:
        seconds = time.perf_counter() - start
        try:
            if check(found, True):
                return found, seconds
            logger.info("the capture in %s cannot be held against a model without values, and is made anew", folder)
        except CaptureError as error:
            logger.warning("the capture in %s is stale, and made anew: %s", folder, error.what)
    captured = make()
    seconds = time.perf_counter() - start
    check(captured, False)
    if folder is not None and key:
        try:
            keep(folder, key, captured, model)
        except (NotStorable, OSError) as error:
            _tell(model, folder, error)
    return captured, seconds


def _tell(model: nn.Module, folder: Path, error: Exception) -> None:
    logger.info("the capture of %s is not kept in %s: %s", type(model).__name__, folder, error)


def find(folder: Path, key: str, model: nn.Module) -> Captured | None:
    """The capture of that key, if there is one, and no file changed that it may depend on."""
    try:
        path = _path(folder, key)
        if problems := written_by_others([path]) if path.exists() else []:
            logger.warning("nothing is taken from the cache %s: %s", folder, problems[0])
            return None
        header, _, data = path.read_bytes().partition(b"\n")
        about = json.loads(header)
        if about["sha256"] != hashlib.sha256(data).hexdigest() or not files_as_they_were(about["files"]):
            return None
        found = restore(data, model)
        return found if digest_of(found.reads.outside(model)) == about["reads"] else None
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever is wrong with a file, the model can be captured
        logger.warning("the cache %s holds a capture that cannot be read, which is made anew: %s", folder, error)
        return None


def keep(folder: Path, key: str, captured: Captured, model: nn.Module) -> None:
    """Writes a capture; of several processes that do so at once, one is the last.

    Raises:
        NotStorable: where it cannot be written, or depends on what cannot be told again in another process.
    """
    reads = digest_of(captured.reads.outside(model))
    data = dump(captured, model)
    header = json.dumps({"sha256": hashlib.sha256(data).hexdigest(), "files": files_loaded(), "reads": reads})
    if not folder.exists():
        folder.mkdir(parents=True)
        keep_from_others([folder])
    handle, name = tempfile.mkstemp(dir=folder)
    with os.fdopen(handle, "wb") as file:
        file.write(header.encode() + b"\n" + data)
    os.replace(name, _path(folder, key))


def _path(folder: Path, key: str) -> Path:
    return folder / f"{key}.capture"
