"""Hashing files as a stream, walking a bundle's folder without following links, and what may lie beside a bundle."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path

BUFFER = 1 << 20
COMPANIONS = frozenset({".gitattributes", ".gitignore", ".DS_Store", "Thumbs.db", "desktop.ini"})
COMPANION_FOLDERS = frozenset({".git", ".cache"})
"""A clone's own, and what `hf download --local-dir` notes down (.cache/huggingface)."""
DOCUMENTS = frozenset({"README", "LICENSE", "LICENCE", "NOTICE", "MODEL_CARD", "USE_POLICY"})
""".md, .txt, or without an ending."""


def sha256_of(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """Hex sha256 of a file, read in pieces of 1 MiB; `on_bytes` is told the size of each. Raises OSError."""
    with path.open("rb", buffering=0) as file:
        return sha256_of_open(file, on_bytes)


def sha256_of_open(file: FileIO, on_bytes: Callable[[int], None] | None = None) -> str:
    """The same of an unbuffered file that is open, from where it stands. Raises OSError."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(BUFFER))
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


def is_companion(name: str) -> bool:
    """Whether a file is of those that hubs, git and desktops put beside what is shared: nothing of ours reads it."""
    top, _, below = name.partition("/")
    if below:
        return top in COMPANION_FOLDERS
    return top in COMPANIONS or top.split(".")[0].upper() in DOCUMENTS
