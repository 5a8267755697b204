"""Opening files that anyone may have put there: plain files alone, never a wait, and no link out of their folder."""

from __future__ import annotations

import errno
import os
import stat
from io import FileIO
from pathlib import Path


class NotPlain(OSError):
    """What was to be opened is no plain file, or a link that leads out of its folder; `problem` says which."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(errno.EINVAL, problem, str(path))
        self.problem = problem


def open_plain(path: Path, *, follow: bool = False) -> FileIO:
    """A regular file, open for reading. Never waits: a FIFO without a writer would keep a plain `open` for good.

    Without `follow` a link is refused. Raises NotPlain, OSError.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:  # some devices do something when they are opened: they are refused before
        kind = unsafe_kind((path.stat() if follow else path.lstat()).st_mode)
        descriptor = os.open(path, flags) if kind is None else -1
    except ValueError as problem:  # a NUL, or half of a surrogate pair, in the name
        raise NotPlain(path, str(problem)) from problem
    if kind is None:
        kind = unsafe_kind(os.fstat(descriptor).st_mode)
        if kind is None:
            return FileIO(descriptor, "rb")
        os.close(descriptor)
    raise NotPlain(path, kind)


def read_plain(path: Path, limit: int, *, follow: bool = False) -> bytes:
    """All of a regular file. Raises NotPlain, also for one of more than `limit` bytes; OSError."""
    with open_plain(path, follow=follow) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise NotPlain(path, f"it has {size} bytes, more than {limit}")
        return read_all(file)


def read_all(file: FileIO) -> bytes:
    """What is left of a file, whose size may be small for a file of another system's (/proc) but is right for ours."""
    pieces = []
    while piece := file.read(1 << 24):
        pieces.append(piece)
    return b"".join(pieces)


def located(folder: Path, name: str) -> Path:
    """Where the file `name` (POSIX, below `folder`) lies: `folder/name`, without a link on the way.

    One kind of link is followed: the Hugging Face cache keeps `snapshots/<revision>/<name> -> ../../blobs/<hash>`, and
    its blobs are as much part of a download as the snapshot is. Raises NotPlain for every other link.
    """
    link = linked_part(folder, name)
    if link is None:
        return folder / name
    path = folder / name
    try:
        found = path.resolve(strict=True)
    except (OSError, RuntimeError) as problem:
        raise NotPlain(path, "it is a symbolic link that leads nowhere") from problem
    if link != name or not in_hub_cache(folder, found):
        raise NotPlain(folder / link, "it is a symbolic link")
    return found


def in_hub_cache(folder: Path, path: Path) -> bool:
    """Whether a resolved path is a blob of the very download in the Hugging Face cache that `folder` belongs to."""
    home = folder.resolve()
    return any(
        each.parent.name == "snapshots" and path.parent == each.parent.parent / "blobs"
        for each in (home, *home.parents)
    )


def unsafe_kind(mode: int) -> str | None:
    """What an entry is when it is no plain file, or None."""
    if stat.S_ISREG(mode):
        return None
    return "it is a symbolic link" if stat.S_ISLNK(mode) else "it is not a plain file"


def linked_part(folder: Path, path: str) -> str | None:
    """The first part of `path` below `folder` that is a symbolic link, or None."""
    current = folder
    for part in path.split("/"):
        current /= part
        if current.is_symlink():
            return current.relative_to(folder).as_posix()
    return None
