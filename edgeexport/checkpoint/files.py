"""Reading the small files of a checkpoint: contained paths, bounded sizes, strict JSON."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeexport import errors, strict_json

CONFIG_LIMIT = 16 * 2**20
INDEX_LIMIT = 64 * 2**20
TOKENIZER_LIMIT = 128 * 2**20


def contained(folder: Path, name: str) -> Path:
    """The resolved path of the file `name` in `folder`; the file need not exist.

    Raises `path-escapes` when the name is not a plain file name, or when a symbolic link leads out of the folder.
    One link is followed: the Hugging Face cache keeps `snapshots/<revision>/<name> -> ../../blobs/<hash>`, and its
    blobs are as much part of the checkpoint as the snapshot is.
    """
    if not name or name in {".", ".."} or any(char in name for char in "/\\\0"):
        raise errors.path_escapes(folder, name, "it is not a plain file name")
    home = folder.resolve()
    try:
        path = (home / name).resolve()
    except (OSError, RuntimeError, ValueError) as problem:  # a loop of links, a name that is too long or not Unicode
        raise errors.file_unreadable(home / ascii(name), str(problem)) from problem
    if path.parent == home or path.is_relative_to(home):
        return path
    if home.parent.name == "snapshots" and path.parent == home.parent.parent / "blobs":
        return path
    raise errors.path_escapes(folder, name, f"it leads to {path}")


def find(folder: Path, name: str) -> Path | None:
    """The resolved path of the file `name` in `folder`, or None when there is none. Raises as `contained` does."""
    path = contained(folder, name)
    try:
        return path if path.exists() else None
    except OSError as problem:
        raise errors.file_unreadable(path, problem.strerror or str(problem)) from problem


def open_regular(path: Path) -> int:
    """A read-only descriptor of a regular file. Raises `file-unreadable` for anything else.

    O_NONBLOCK keeps a FIFO from stopping the build before its kind is known; it means nothing for regular files.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as problem:
        raise errors.file_unreadable(path, problem.strerror or str(problem)) from problem
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise errors.file_unreadable(path, "it is not a regular file")
    return descriptor


def pread_exactly(descriptor: int, size: int, offset: int, path: Path) -> bytes:
    """`size` bytes at `offset`, fewer at the end of the file. Raises `file-unreadable` when the disk does."""
    try:
        parts = [os.pread(descriptor, size, offset)]
        while parts[-1] and sum(map(len, parts)) < size:
            done = sum(map(len, parts))
            parts.append(os.pread(descriptor, size - done, offset + done))
    except OSError as problem:
        raise errors.file_unreadable(path, problem.strerror or str(problem)) from problem
    return parts[0] if len(parts) == 1 else b"".join(parts)


def read_small(path: Path, limit: int) -> bytes:
    """The whole file. Raises `file-too-large` before reading when it has more than `limit` bytes."""
    descriptor = open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        if size > limit:
            raise errors.file_too_large(path, size, limit)
        return pread_exactly(descriptor, size, 0, path)
    finally:
        os.close(descriptor)


def parse_object(data: bytes, path: Path) -> dict[str, Any]:
    """The JSON object in `data`, UTF-8. Raises `bad-json` for anything else, naming `path`."""
    try:
        value = strict_json.parse(data, unique=False)  # transformers lets the last of two equal keys win
    except ValueError as problem:
        raise errors.bad_json(path, str(problem)) from problem
    if not isinstance(value, dict):
        raise errors.bad_json(path, f"expected an object at the top, got {type(value).__name__}")
    return value


def read_object(path: Path, limit: int) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes."""
    return parse_object(read_small(path, limit), path)


def dump_object(value: Mapping[str, Any]) -> bytes:
    """JSON of a file we write: indented, UTF-8, keys in the given order, a newline at the end."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
