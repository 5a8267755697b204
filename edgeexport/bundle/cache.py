"""Results of finished steps by content: what a killed or repeated build need not do again.

An entry is a folder named by the hash of everything that shaped it. It appears by a rename, whole or not at all.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgeexport import errors
from edgeexport.bundle.files import sha256_of
from edgeexport.paths import cache_dir

LIMIT_BYTES = 40 << 30
"""Beyond this, the entries used longest ago are removed."""
DIGESTS = "digests.json"
KEPT_SECONDS = 7 * 24 * 3600
"""After which unfinished work that nobody has gone on with is removed."""


def key(*parts: object) -> str:
    """The name of an entry: sha256 over the parts' JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class Cache:
    """Folders by (step, key) under the cache directory."""

    def __init__(self, root: Path | None = None, *, check: Callable[[], None] = lambda: None) -> None:
        """`check` raises where what entries are made of is not what it was: it is asked before one is filed."""
        self._check = check
        self._root = (root or cache_dir()) / "steps"
        self._unfinished = self._root.with_name("unfinished")

    def folder(self, step: str, key: str, fill: Callable[[Path], None], *, force: bool = False) -> tuple[Path, bool]:
        """The entry's folder, and whether it was there already; else `fill` writes it.

        An entry whose files no longer have the digests they were filed with is thrown away and filled again.
        Raises: UsageError `output-not-writable`, and whatever `fill` and the cache's `check` raise.
        """
        place = self._root / step / key
        if not force and self._intact(place):
            os.utime(place)
            return place, True
        partial = place.with_name(f".{key}.{os.getpid()}")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            self._sweep(place.parent)
            partial.mkdir()
        except OSError as problem:
            raise errors.output_not_writable(self._root, str(problem)) from problem
        try:
            fill(partial)
            self._check()
            digests = {path.relative_to(partial).as_posix(): sha256_of(path) for path in _files(partial)}
            (partial / DIGESTS).write_text(json.dumps(digests))
            # What is there is removed as late as can be: another build may have filed the same entry meanwhile.
            if place.exists() and (force or not self._intact(place)):
                shutil.rmtree(place, ignore_errors=True)
            try:
                partial.rename(place)
            except OSError:
                if not self._intact(place):
                    raise
        except OSError as problem:
            raise errors.output_not_writable(self._root, str(problem)) from problem
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return place, False

    @contextmanager
    def workplace(self, step: str, key: str) -> Iterator[Path]:
        """A folder for work that goes on where a killed build left it, removed once it is done. Nobody else works there
        meanwhile; one who wants to waits. Raises: UsageError `output-not-writable`."""
        folder = self._unfinished / step / key
        with owned(folder):
            yield folder
            shutil.rmtree(folder, ignore_errors=True)

    def prune(self, limit: int = LIMIT_BYTES) -> None:
        """Remove the entries used longest ago until the rest is within `limit` bytes, and unfinished work that nobody
        has gone on with for long."""
        entries = [path for step in self._root.glob("*") for path in step.iterdir() if not path.name.startswith(".")]
        entries.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        total = 0
        for entry in entries:
            total += sum(path.stat().st_size for path in _files(entry))
            if total > limit:
                shutil.rmtree(entry, ignore_errors=True)
        for folder in self._unfinished.glob("*/*"):
            with suppress(OSError):  # another build removes it, too
                if folder.is_dir() and time.time() - _changed(folder) > KEPT_SECONDS:
                    shutil.rmtree(folder, ignore_errors=True)

    def _intact(self, place: Path) -> bool:
        try:
            digests = json.loads((place / DIGESTS).read_text())
            listed = {place / name for name in digests} | {place / DIGESTS}
            return listed == set(_files(place)) and all(
                sha256_of(place / name) == digest for name, digest in digests.items()
            )
        except (OSError, ValueError, AttributeError):
            return False

    def _sweep(self, step: Path) -> None:
        """Remove what killed builds left: partial folders whose process is gone."""
        for path in step.glob(".*"):
            pid = path.name.rpartition(".")[2]
            if pid.isdigit() and not Path(f"/proc/{pid}").exists():
                shutil.rmtree(path, ignore_errors=True)


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """The folder, made where it is missing, is nobody else's meanwhile; one who wants it waits. Raises: UsageError
    `output-not-writable`."""
    path = folder.with_name(f"{folder.name}.lock")
    while True:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = path.open("w")
        except OSError as problem:
            raise errors.output_not_writable(folder, str(problem)) from problem
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _inode(path) != os.fstat(lock.fileno()).st_ino:
                continue  # whoever had it has removed it: a third one may hold a new one
            try:  # within the lock alone: who has it removes the folder when its work is done
                folder.mkdir(exist_ok=True)
            except OSError as problem:
                raise errors.output_not_writable(folder, str(problem)) from problem
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return -1


def _changed(folder: Path) -> float:
    """When something in a folder changed last."""
    return max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))


def _files(entry: Path) -> list[Path]:
    """All files of an entry; an ML package is a folder of some."""
    return sorted(path for path in entry.rglob("*") if path.is_file())
