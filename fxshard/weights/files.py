"""Files that are read back: whether another user could have written them, and whether they are as they were written.

A file that another user can write may hold what that user likes. So a cache or a checkpoint is taken only from files
that this user (or root) owns and nobody else may write, in folders of which the same holds. Damage is another matter:
what is read is held against checksums that were made when it was written.
"""

from __future__ import annotations

import contextlib
import functools
import os
import stat
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

with contextlib.suppress(ImportError):  # of POSIX
    import grp
    import pwd

CHUNK_BYTES = 2**20
"""How much of a file is checked at once: one checksum each."""


def written_by_others(paths: Iterable[Path]) -> list[str]:
    """Why these files, or the folders that they lie in, may hold what another user wrote: a line each.

    >>> written_by_others([Path("/dev/null")])
    ['/dev/null may be written by everybody']
    """
    if not hasattr(os, "getuid"):  # there are no such permissions here
        return []
    folders = dict.fromkeys(folder for path in paths for folder in (path, path.parent))
    return [problem for path in folders if (problem := _problem(path))]


def _problem(path: Path) -> str:
    try:
        about = path.stat()
    except OSError:  # whoever opens it will say so
        return ""
    if about.st_uid not in (os.getuid(), 0):
        return f"{path} belongs to user {about.st_uid}"
    shared = stat.S_ISDIR(about.st_mode) and about.st_mode & stat.S_ISVTX  # as /tmp: nobody may replace what is ours
    if shared:
        return ""
    if about.st_mode & stat.S_IWOTH:
        return f"{path} may be written by everybody"
    if about.st_mode & stat.S_IWGRP and not _is_mine_alone(about.st_gid):
        return f"{path} may be written by group {about.st_gid}"
    return ""


@functools.cache
def _is_mine_alone(group: int) -> bool:
    """Whether a group is this user's own, as most systems give each user one."""
    try:
        found, me = grp.getgrgid(group), pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return False
    return found.gr_name == me and set(found.gr_mem) <= {me}


def keep_from_others(paths: Iterable[Path]) -> None:
    """Takes the permission to write from everybody but the owner."""
    for path in paths:
        mode = path.stat().st_mode
        if mode & (stat.S_IWGRP | stat.S_IWOTH):
            path.chmod(stat.S_IMODE(mode) & ~(stat.S_IWGRP | stat.S_IWOTH))


def checksums_of(file: IO[bytes], indices: Iterable[int] | None = None) -> Iterator[int]:
    """The CRC-32 of each megabyte of a file, or of those with these indices.

    >>> import io
    >>> list(checksums_of(io.BytesIO(b"a" * CHUNK_BYTES + b"b"))) == [zlib.crc32(b"a" * CHUNK_BYTES), zlib.crc32(b"b")]
    True
    """
    if indices is None:
        while data := file.read(CHUNK_BYTES):
            yield zlib.crc32(data)
        return
    for index in indices:
        file.seek(index * CHUNK_BYTES)
        yield zlib.crc32(file.read(CHUNK_BYTES))
