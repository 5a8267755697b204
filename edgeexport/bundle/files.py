"""Hashing files as a stream, and walking a bundle's folder without following links."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

BUFFER = 1 << 20


def sha256_of(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """Hex sha256 of a file, read in pieces of 1 MiB; `on_bytes` is told the size of each. Raises OSError."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(BUFFER))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            if on_bytes is not None:
                on_bytes(count)
    return digest.hexdigest()


def walk(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Every entry below `folder` but plain folders: (POSIX path, lstat). Links are not followed. Raises OSError."""
    waiting = [folder]
    while waiting:
        for entry in sorted(waiting.pop().iterdir()):
            found = entry.lstat()
            if stat.S_ISDIR(found.st_mode):
                waiting.append(entry)
            else:
                yield entry.relative_to(folder).as_posix(), found


def unsafe_kind(mode: int) -> str | None:
    """What an entry is when it is no plain file, or None."""
    if stat.S_ISREG(mode):
        return None
    return "it is a symbolic link" if stat.S_ISLNK(mode) else "it is neither a file nor a folder"


def linked_part(folder: Path, path: str) -> str | None:
    """The first part of `path` below `folder` that is a symbolic link, or None."""
    current = folder
    for part in path.split("/"):
        current /= part
        if current.is_symlink():
            return current.relative_to(folder).as_posix()
    return None
