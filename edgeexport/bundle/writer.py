"""Writes a bundle beside its place and moves it there at once: either the whole bundle or nothing."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from edgeexport import errors
from edgeexport.bundle import manifest as manifests
from edgeexport.bundle.bundle import open_bundle
from edgeexport.bundle.cache import NO_LOCKS
from edgeexport.bundle.files import sha256_of
from edgeexport.bundle.manifest import DIGEST_FILE, FILE, FileEntry, Manifest

_NOT_WRITABLE = frozenset({
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO,
    errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP,
})  # fmt: skip
FICLONE = 0x40049409
"""The request of Linux that makes one file of another's blocks, which are copied when either changes."""
PIECE = 1 << 22
"""Bytes that are hashed and written at a time."""


class BundleWriter:
    """Collects the files of one bundle; a context manager.

        with BundleWriter(destination) as writer:
            writer.add_bytes("tokenizer/tokenizer.json", data)
            writer.add_file("decoder.onnx", source)
            writer.commit(Manifest(files=writer.files, ...))

    Files go into `.<name>.partial-<random>` beside the destination. Leaving the block without `commit`, by an
    exception or Ctrl-C too, removes them. What a killed process left behind is removed by the next writer of the same
    destination; a lock file, which the system releases with its process, keeps two of them apart.
    Raises output-exists, output-not-writable, build-running.
    """

    def __init__(self, destination: Path, *, force: bool = False) -> None:
        self.destination = destination
        self.force = force
        self.folder = destination.with_name(f".{destination.name}.partial-{secrets.token_hex(8)}")
        self.files: dict[str, FileEntry] = {}
        self._lock = -1

    def __enter__(self) -> BundleWriter:
        refuse_existing(self.destination, force=self.force)
        with _writing(self.destination):
            self.destination.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(_lock_path(self.destination), self.destination)
        try:
            with _writing(self.destination):
                _clean_up(self.destination)
                self.folder.mkdir()
        except BaseException:
            self._unlock()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self.folder.exists():
                shutil.rmtree(self.folder)
        finally:
            self._unlock()

    def add_bytes(self, path: str, data: bytes) -> None:
        """Write a small file of the bundle at its POSIX path."""
        place = self._place(path)
        with _writing(self.destination):
            _write(place, data)
            self.files[path] = FileEntry(len(data), sha256_of(place))

    def add_file(self, path: str, source: Path) -> None:
        """Take a copy of a file into the bundle at its POSIX path, and hash it.

        Where the file system can do that, both share their blocks until one of them changes.
        """
        place = self._place(path)
        with _writing(self.destination):
            digest = _copy(source, place)
            _sync(place)
            self.files[path] = FileEntry(place.stat().st_size, digest)

    def commit(self, manifest: Manifest) -> Path:
        """Write the manifest, read it back, sync everything to disk and move the bundle to its place, which is
        returned.

        `manifest.files` must be this writer's `files`. With `force` what was there before is replaced. Raises:
        BundleError where what was written could not be opened.
        """
        if manifest.files != self.files:
            raise ValueError("the manifest lists other files than were added")
        data = manifests.to_json(manifest)
        with _writing(self.destination):
            _write(self.folder / FILE, data)
            _write(self.folder / DIGEST_FILE, f"{sha256_of(self.folder / FILE)}\n".encode("ascii"))
            for folder in [*sorted(path for path in self.folder.rglob("*") if path.is_dir()), self.folder]:
                _sync(folder)
        open_bundle(self.folder)
        refuse_existing(self.destination, force=self.force)
        with _writing(self.destination):
            self._move()
            _sync(self.destination.parent)
        return self.destination

    def _place(self, path: str) -> Path:
        problem = manifests.path_problem(path)
        if problem is not None or path in {FILE, DIGEST_FILE} or path in self.files:
            raise ValueError(f"the path {path!r} {problem or 'is taken'}")
        place = self.folder / path
        with _writing(self.destination):
            place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def _move(self) -> None:
        """Two renames at most; if the second fails, the first is undone."""
        if not os.path.lexists(self.destination):
            self.folder.rename(self.destination)
            return
        old = _old_path(self.destination)
        self.destination.rename(old)
        try:
            self.folder.rename(self.destination)
        except BaseException:
            old.rename(self.destination)
            raise
        _remove(old)

    def _unlock(self) -> None:
        if self._lock >= 0:
            # while the lock is held, so that whoever gets it afterwards sees that its file is gone
            _lock_path(self.destination).unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = -1


def refuse_existing(destination: Path, *, force: bool) -> None:
    """Raises output-exists when something is at the destination and `force` is not given."""
    if force or not os.path.lexists(destination):
        return
    holds = "it is a bundle" if (destination / FILE).is_file() else "it has no manifest.json"
    raise errors.output_exists(destination, f"{holds}, and nothing is replaced without being asked")


def _lock_path(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}.lock")


def _old_path(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}.old")


def _locked(path: Path, destination: Path) -> int:
    """A file descriptor that holds the lock. Raises build-running when another process holds it, OSError."""
    import fcntl

    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the holder before us may have removed the file between our open and our lock
            current = path.stat()
            if os.path.samestat(current, os.fstat(descriptor)):
                return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise errors.build_running(destination) from error
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno in NO_LOCKS:  # nothing keeps two builds to one place apart here but their random names
                return descriptor
            os.close(descriptor)
            raise
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _clean_up(destination: Path) -> None:
    """Under the lock: bring back a bundle that was moved aside for one that never came, remove dead processes' rest."""
    old = _old_path(destination)
    if os.path.lexists(old):
        if os.path.lexists(destination):
            _remove(old)
        else:
            old.rename(destination)
    prefix = f".{destination.name}.partial-"
    for entry in destination.parent.iterdir():
        if entry.name.startswith(prefix):
            _remove(entry)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextmanager
def _writing(destination: Path) -> Iterator[None]:
    """Turns what the system says about the output into output-not-writable."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise
        raise errors.output_not_writable(destination, error.strerror or str(error)) from error


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _copy(source: Path, place: Path) -> str:
    """Copy a file and give its sha256. A piece is hashed on one core while it is written on the other."""
    digest = hashlib.sha256()
    with source.open("rb", buffering=0) as reader, place.open("xb", buffering=0) as writer:
        shared = _reflinked(reader.fileno(), writer.fileno())
        buffer = memoryview(bytearray(PIECE))
        with ThreadPoolExecutor(1) as pool:
            while count := reader.readinto(buffer):
                piece = buffer[:count]
                hashed = pool.submit(digest.update, piece)
                while not shared and piece:
                    piece = piece[writer.write(piece) :]
                hashed.result()
    return digest.hexdigest()


def _reflinked(source: int, place: int) -> bool:
    """Whether the file system gave `place` the blocks of `source`."""
    import fcntl

    try:
        fcntl.ioctl(place, FICLONE, source)
    except OSError:  # this file system has no such thing, or the two are on different ones
        return False
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
