"""Safetensors, in and out: what a model hub has, and what it takes.

Out: rank 0 gets the whole weights, a tensor after the other, and writes them: a model of ``transformers`` with its own
``save_pretrained``, which knows its configuration, its tied weights and in which form its weights are kept; any other
module as one ``model.safetensors``. In: each rank opens the files and reads what its own parts need, no more, a few
megabytes at a time: a file's pages count as memory of the process for as long as it is open.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from fxshard.capture.writes import unchanged
from fxshard.checkpoint.checkpoint import WRITABLE, weights_of
from fxshard.checkpoint.reading import CHECKSUMS, REPLACED
from fxshard.errors import CheckpointError
from fxshard.program import ParallelModule
from fxshard.ranks.agreement import is_spread, on_every_rank, on_first_rank, refuse
from fxshard.ranks.faults import told_to_others
from fxshard.weights.checkpoint_parts import same
from fxshard.weights.files import CHUNK_BYTES, checksums_of
from fxshard.weights.layout import Box, fill
from fxshard.weights.staging import Staging
from fxshard.weights.weights import Weights

logger = logging.getLogger("fxshard")

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@told_to_others
def save_pretrained(program: nn.Module, folder: str | os.PathLike[str], **options: Any) -> None:
    """Writes the whole weights as safetensors; every rank must call it, rank 0 writes.

    A model that has a ``save_pretrained(folder, state_dict=...)``, as those of ``transformers`` have, writes itself:
    the folder opens with its ``from_pretrained``. Of any other, ``model.safetensors`` holds all tensors of the state
    dict, a tied one once; ``load_pretrained`` and ``safetensors.torch.load_model`` read it. Beside the files stands
    ``checksums.json``, by which ``load_pretrained`` sees whether they are as they were written.

    Args:
        program: what ``parallelize`` returned, or a plain module.
        folder: where to.
        options: for the model's own ``save_pretrained``.

    Raises:
        CheckpointError: on all ranks, where the state dict holds what safetensors cannot, or rank 0 could not write.
    """
    weights = weights_of(program)
    state = weights.stream_state_dict()

    def write() -> None:
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        (target / CHECKSUMS).unlink(missing_ok=True)
        _write(weights, state, target, options)
        _write_checksums(target)

    on_first_rank(write, f"cannot write into {folder}", WRITABLE)


def _write_checksums(folder: Path) -> None:
    """Writes the checksums of all safetensors in a folder: of each file its size, and one a megabyte."""
    files = {}
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            size, header = path.stat().st_size, _header(file)
            files[path.name] = {"bytes": size, "header": header, "crc32": list(checksums_of(file))}
    partial = folder / f"{CHECKSUMS}.partial"
    partial.write_text(json.dumps({"chunk_bytes": CHUNK_BYTES, "files": files}), encoding="utf-8")
    partial.replace(folder / CHECKSUMS)


def _header(file: IO[bytes]) -> int:
    """The CRC-32 of what says which tensors a file holds; the file is left at its beginning."""
    file.seek(0)
    size = file.read(8)
    found = zlib.crc32(size + file.read(min(int.from_bytes(size, "little"), LARGEST_HEADER)))
    file.seek(0)
    return found


LARGEST_HEADER = 100 * 2**20
"""No header of safetensors is larger."""


def _damage(source: Path) -> list[str]:
    """The files that are not as they were written, of those with checksums; each rank looks at its share of them."""
    folder = source if source.is_dir() else source.parent
    if not (folder / CHECKSUMS).is_file():
        return []
    rank, world = (dist.get_rank(), dist.get_world_size()) if is_spread() else (0, 1)
    told = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
    problems = []
    for path in _files(source):
        known = told["files"].get(path.name)
        if known is None or told["chunk_bytes"] != CHUNK_BYTES:
            continue
        mine = range(rank, len(known["crc32"]), world)
        with open(path, "rb") as file:
            size, same_header = path.stat().st_size, _header(file) == known["header"]
            if size != known["bytes"] and not same_header:
                logger.info("%s is another file than the one that %s speaks of", path, CHECKSUMS)
            elif size != known["bytes"]:
                problems.append(f"{path} has {size} bytes, and was written with {known['bytes']}")
            elif list(checksums_of(file, mine)) != [known["crc32"][i] for i in mine]:
                problems.append(f"{path} is not as it was written")
    return problems


def _write(weights: Weights, state: dict[str, Any], folder: Path, options: Mapping[str, Any]) -> None:
    own = getattr(weights.model, "save_pretrained", None)
    if callable(own) and "state_dict" in inspect.signature(own).parameters:
        with unchanged(weights.model):  # saving writes to the configuration, on one rank
            own(folder, state_dict=state, **options)
        return
    strange = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if strange or options:
        raise CheckpointError(
            f"safetensors holds tensors only, and {strange[0]} is a {type(state[strange[0]]).__name__}"
            if strange
            else f"{type(weights.model).__name__} has no save_pretrained that could take {', '.join(options)}",
            fix="use save_checkpoint" if strange else "leave them out",
        )
    once = {name: value for name, value in state.items() if weights.first_names[name] == name}
    tied = {name: weights.first_names[name] for name in state if name not in once}  # as safetensors.torch.save_model
    partial = folder / f"{FILE}.partial"
    save_file({k: v.contiguous() for k, v in once.items()}, partial, metadata={**tied, "format": "pt"})
    partial.replace(folder / FILE)


@told_to_others
def load_pretrained(
    program: nn.Module, source: str | os.PathLike[str], *, strict: bool = True, verify: bool = True
) -> None:
    """Loads safetensors into the weights, in place; every rank must call it, and reads its own parts only.

    It reads them beside the present ones, which change when all ranks have read theirs, and not where one fails. Parts
    on the meta device get memory: a model larger than a machine's memory is made on the meta device, parallelized with
    example inputs, and loaded. Of tied weights one name is enough.

    Args:
        program: what ``parallelize`` returned, or a plain module.
        source: a file, or a folder with ``model.safetensors``, or with several files and their index,
            ``model.safetensors.index.json``.
        strict: whether names that are missing or not in the model are errors. Names of which the model itself says that
            they may be there (``_keys_to_ignore_on_load_unexpected`` of ``transformers``) never are.
        verify: whether to hold the files against the checksums that ``save_pretrained`` wrote beside them, if it did.
            The ranks share this work: together they read each file once more.

    Raises:
        CheckpointError: on all ranks, where a file is damaged, or not one of this model; everything that does not fit
            is listed. The weights are then as they were.
    """
    weights = weights_of(program)
    files = _stored_in(Path(source))
    if verify:
        damage = on_every_rank(lambda: _damage(Path(source)), f"cannot read {source}:", REPLACED)
        refuse(damage, f"{source} is damaged:", REPLACED)
    given = {name: file for name, file in files.items() if name in weights.names}
    sources = {weights.first_names[name]: name for name in reversed(list(given))}  # a tensor under its first name
    problems = _problems(weights, given)
    if strict:
        problems += [f"{n} is missing" for n in weights.names if weights.first_names[n] not in sources]
        ignored = getattr(weights.model, "_keys_to_ignore_on_load_unexpected", None) or ()
        problems += [
            f"{name} is not in the model"
            for name in files
            if name not in weights.names and not any(re.search(pattern, name) for pattern in ignored)
        ]
    refuse(
        problems,
        f"{source} does not fit {type(weights.model).__name__}:",
        "read it with the model's own from_pretrained, which knows how names and forms of weights changed, and "
        "parallelize what that returns",
    )
    staging = Staging(weights, list(given))

    def read() -> None:
        for first, name in sources.items():
            for rank in weights.modules:
                boxes = list(given[name].pieces(weights.layout(first, rank).boxes))
                fill(staging.of(first, rank), boxes, given[name].read)

    on_every_rank(read, f"cannot read {source}:", "load again; if it fails again, look at the disk")
    staging.install()
    if isinstance(program, ParallelModule):
        program.note_loaded([name for name in weights.names if weights.first_names[name] in sources])


PIECE_BYTES = 8 * 2**20
"""How much of a file is looked at at once. What has been looked at stays in memory until the file is closed."""


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file of safetensors."""

    path: Path
    name: str
    shape: tuple[int, ...]
    version: tuple[int, ...]

    def read(self, box: Box) -> torch.Tensor:
        """A box of it. The file is opened for that and closed again, so that no more stays in memory.

        Raises:
            CheckpointError: when the file is not the one any more that it was.
        """
        with safe_open(self.path, framework="pt", device="cpu") as file:
            if _version(self.path) != self.version:
                raise CheckpointError(
                    f"{self.path} was written to while it was read", fix="load again, when it is complete"
                )
            found: torch.Tensor = file.get_slice(self.name)[box.of_whole]
            return found

    def pieces(self, boxes: Iterable[Box]) -> Iterator[Box]:
        """The boxes, cut along their first dim so that the rows of each lie in a few megabytes of the file."""
        row = max(1, math.prod(self.shape[1:])) * 8  # as if of the largest dtype
        count = max(1, PIECE_BYTES // row)
        for box in boxes:
            if not box.sizes:
                yield box
                continue
            (start, *starts), (size, *sizes), (local, *locals_) = box
            for at in range(0, size, count):
                length = min(count, size - at)
                yield Box((start + at, *starts), (length, *sizes), (local + at, *locals_))


def _problems(weights: Weights, given: Mapping[str, _Stored]) -> list[str]:
    """Why tensors of the files cannot be those of the model, a line each."""
    problems = []
    for name, stored in given.items():
        shape, wanted = stored.shape, weights.layout(name).shape
        if shape != wanted:
            problems.append(f"{name} has shape {list(shape)}, and must have {list(wanted)}")
        first = weights.first_names[name]
        if first != name and first in given and not problems:
            problems += _untied(weights, first, name, given)
    return problems


def _untied(weights: Weights, first: str, name: str, given: Mapping[str, _Stored]) -> list[str]:
    """Whether two names of one tensor have two values, of what this rank reads."""
    for rank in weights.modules:
        for box in given[name].pieces(weights.layout(name, rank).boxes):
            if not same(given[first].read(box), given[name].read(box)):
                return [f"{first} and {name} are one tensor of the model, and differ"]
    return []


def _stored_in(source: Path) -> dict[str, _Stored]:
    """The tensors of a file, or of the files of a folder, by their names."""

    def look() -> dict[str, _Stored]:
        found: dict[str, _Stored] = {}
        for path in _files(source):
            version = _version(path)
            with safe_open(path, framework="pt", device="cpu") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            found |= {name: _Stored(path, name, shape, version) for name, shape in shapes.items()}
        return found

    return on_every_rank(look, f"cannot read {source}:", f"give a file, or a folder with {FILE} or {INDEX}")


def _version(path: Path) -> tuple[int, ...]:
    """What changes with a file: another one under its name, or another content."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _files(source: Path) -> list[Path]:
    if not source.is_dir():
        return [source]
    if (source / INDEX).is_file():
        index = json.loads((source / INDEX).read_text(encoding="utf-8"))
        return [source / name for name in sorted(set(index["weight_map"].values()))]
    return [source / FILE]
