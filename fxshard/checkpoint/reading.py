"""Reading a checkpoint of ``torch.distributed.checkpoint``: nothing is run that stands in it, and damage is noticed.

Its metadata are a pickle, of which only the classes of metadata are made. What is no tensor is read as
``torch.load(weights_only=True)`` reads it. The tensors lie in the archives of ``torch.save``, which carry the CRC-32 of
each entry: it is held against what was read. The metadata's own stands in ``checksums.json``, which ``save_checkpoint``
writes beside them.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import IO, Any, ClassVar

import torch
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem

from fxshard.errors import CheckpointError
from fxshard.torch_internals import StorageInfo, StoragePrefix, set_element
from fxshard.weights.files import CHUNK_BYTES, checksums_of, written_by_others

CHECKSUMS = "checksums.json"
METADATA = ".metadata"
REPLACED = "it was damaged, or replaced since it was written; load another one, or this one with verify=False"
FOREIGN = (
    "copy it to a folder of your own, or take the permission away (chmod -R go-w); verify=False loads it all the same"
)


class Reader(FileSystemReader):
    """Reads a folder.

    Args:
        path: the folder.
        verify: whether to hold what is read against its checksums, and to refuse what other users could have written.
    """

    def __init__(self, path: Path, verify: bool) -> None:
        super().__init__(path)
        self.folder, self.verify = path, verify

    def problems(self) -> list[str]:
        """Why the folder is not to be read at all, a line each."""
        return written_by_others([self.folder, *sorted(self.folder.iterdir())]) if self.verify else []

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata: which tensors there are, and where they lie.

        Raises:
            CheckpointError: where they are damaged.
        """
        data = (self.folder / METADATA).read_bytes()
        if self.verify and (self.folder / CHECKSUMS).is_file():
            told = json.loads((self.folder / CHECKSUMS).read_text(encoding="utf-8"))
            if told[METADATA] != list(checksums_of(io.BytesIO(data))):
                raise CheckpointError(f"{self.folder / METADATA} is not as it was written", fix=REPLACED)
        found: Metadata = _OfMetadata(io.BytesIO(data)).load()
        found.storage_meta = found.storage_meta or metadata.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Any:
        """See ``FileSystemReader.read_data``; each item is held against its checksums first."""
        for item in plan.items if self.verify else ():
            info: StorageInfo = self.storage_data[item.storage_index]
            if info.transform_descriptors:  # compressed: another format, with checksums of its own
                continue
            with open(self.folder / info.relative_path, "rb") as stream:
                if not is_intact(io.BufferedReader(_Piece(stream, info.offset, info.length))):
                    what = f"{item.storage_index.fqn}, in {self.folder / info.relative_path}"
                    raise CheckpointError(f"{what}, is not as it was written", fix=REPLACED)
        return super().read_data(plan, planner)


class _Piece(io.RawIOBase):
    """A piece of a file, as a file."""

    def __init__(self, file: IO[bytes], offset: int, length: int) -> None:
        super().__init__()
        self.file, self.offset, self.length, self.at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.length}[whence]
        if self.at < 0:
            raise ValueError(f"there is nothing at {self.at}")
        return self.at

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.offset + self.at)
        data = self.file.read(max(0, min(len(buffer), self.length - self.at)))
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


def is_intact(archive: IO[bytes]) -> bool:
    """Whether every entry of an archive of ``torch.save`` is as it was written.

    >>> data = io.BytesIO()
    >>> torch.save(torch.zeros(9), data)
    >>> is_intact(data), is_intact(io.BytesIO(data.getvalue().replace(bytes(9), bytes(8) + b"a")))
    (True, False)
    """
    try:
        with zipfile.ZipFile(archive) as found:
            for entry in found.infolist():
                with found.open(entry) as file:
                    while file.read(CHUNK_BYTES):
                        pass
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, ValueError, zlib.error):
        return False
    return True


class _OfMetadata(pickle.Unpickler):
    """Makes what metadata are made of, and nothing else."""

    KNOWN: ClassVar[dict[tuple[str, str], Any]] = {
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): StorageInfo,
        ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"): StoragePrefix,
        ("torch", "Size"): torch.Size,
        ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
        ("collections", "OrderedDict"): dict,
        ("builtins", "set"): set,
        ("pathlib", "PosixPath"): PurePath,  # where the checkpoint lay when it was written
        ("pathlib", "WindowsPath"): PurePath,
        ("pathlib._local", "PosixPath"): PurePath,
        ("pathlib._local", "WindowsPath"): PurePath,
    }

    def find_class(self, module: str, name: str) -> Any:
        """What the metadata ask for by its name."""
        found = self.KNOWN.get((module, name))
        if found is None and module in ("torch", metadata.__name__):
            found = getattr(sys.modules[module], name, None)
            kinds = (torch.dtype, torch.layout) if module == "torch" else type
            found = found if isinstance(found, kinds) else None
        if found is None:
            raise CheckpointError(
                f"the metadata of the checkpoint ask for {module}.{name}, which is no part of metadata",
                fix="load only what save_checkpoint, or torch.distributed.checkpoint, has written",
            )
        return found


class Planner(DefaultLoadPlanner):
    """Takes what is no tensor without running what stands in it."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """See ``DefaultLoadPlanner.load_bytes``."""
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], loaded(value))


def loaded(stream: IO[bytes]) -> Any:
    """What ``torch.save`` wrote of plain data and tensors: nothing else is made.

    Raises:
        CheckpointError: where there is something else in it.
    """
    try:
        with plain_types():
            return torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"the checkpoint holds what is no plain data: {_first_line(error)}",
            fix="name the class in torch.serialization.add_safe_globals, if you trust it",
        ) from error


def stored(value: Any, what: str) -> bytes:
    """``torch.save`` of a value that ``loaded`` will take again.

    Raises:
        CheckpointError: where it would not.
    """
    stream = io.BytesIO()
    try:
        torch.save(value, stream)
        stream.seek(0)
        loaded(stream)
    except Exception as error:
        raise CheckpointError(
            f"{what} holds what could not be loaded without running it: {_first_line(error)}",
            fix="give plain data (numbers, strings, lists, dicts, tensors: a state_dict()), or name the class in "
            "torch.serialization.add_safe_globals, here and where it is loaded",
        ) from error
    return stream.getvalue()


@contextlib.contextmanager
def plain_types() -> Iterator[None]:
    """Within it, arrays of numpy are plain data too."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        yield
        return
    dtypes = [each for each in vars(numpy.dtypes).values() if isinstance(each, type)]
    multiarray = numpy._core.multiarray
    with torch.serialization.safe_globals(
        [numpy.ndarray, numpy.dtype, multiarray._reconstruct, multiarray.scalar, *dtypes]
    ):
        yield


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
