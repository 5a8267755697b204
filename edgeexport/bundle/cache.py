"""Results of finished steps by content: what a killed or repeated build need not do again.

An entry is a folder named by the hash of everything that shaped it. It appears by a rename, whole or not at all, under
a name that nobody else has meanwhile. Builds of one user or many, in one container or many, may share a cache:

- Whoever fills or uses an entry holds a lock (flock) on its `digests.json`, and what is locked is not removed. The
  system gives a lock back when its process ends, however it ends; process numbers mean nothing here. Locks hold
  between all processes of a machine, and between machines on NFS (version 4, or 3 with its lock service).
- Where the file system has no locks, nothing is removed before nobody has touched it for `KEPT_SECONDS`, and no work
  is gone on with that another process began.
- Locks keep work from being lost or done twice. That nothing wrong is used does not rest on them: an entry is used
  only while its files have the digests that it was filed with.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from edgeexport import errors
from edgeexport.bundle.files import sha256_of
from edgeexport.core import Finding
from edgeexport.paths import PARTIAL, cache_dir

LIMIT_BYTES = 40 << 30
"""Beyond this, the entries used longest ago are removed."""
DIGESTS = "digests.json"
FILING = "filing.lock"
"""Who begins an entry, gives it its name, or takes it away, is alone meanwhile."""
KEPT_SECONDS = 7 * 24 * 3600
"""After which unfinished work that nobody has gone on with is removed."""
_REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
"""What the system says of a cache that may be read alone."""
NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
"""What it says where a file system has no locks."""


def key(*parts: object) -> str:
    """The name of an entry: sha256 over the parts' JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class Cache:
    """Folders by (step, key) under the cache directory.

    An entry that was given out stays until `release`, or until this object is gone. A cache that may only be read is
    used as far as it goes: what it lacks is made in a temporary folder, and `remarks` says so.
    """

    def __init__(self, root: Path | None = None, *, check: Callable[[], None] = lambda: None) -> None:
        """`check` raises where what entries are made of is not what it was: it is asked before one is filed."""
        self._check = check
        self._home = root or cache_dir()
        self._root = self._home / "steps"
        self._unfinished = self._home / "unfinished"
        self.remarks: list[Finding] = []
        """That nothing could be filed, once."""
        self._instead: Path | None = None
        self._held: dict[Path, int] = {}
        self._closing = weakref.finalize(self, _release, self._held)

    def folder(self, step: str, key: str, fill: Callable[[Path], None]) -> tuple[Path, bool]:
        """The entry's folder, and whether it was there already; else `fill` writes it.

        An entry whose files no longer have the digests they were filed with is thrown away and filled again.
        Raises: ToolError `cache-not-writable`, and whatever `fill` and the cache's `check` raise.
        """
        place = self._root / step / key
        if self._take(place):
            return place, True
        found = _identity(place)
        try:
            partial, lock = self._begin(place)
        except OSError as problem:
            return self._unfiled(problem, step, key, fill), False
        filed = False
        try:
            with _writing(self._root):
                fill(partial)
                self._check()
                _write_digests(partial, lock)
                filed = self._file(partial, place, lock, found)
        finally:
            if filed:
                self._hold(place, lock)
            else:
                shutil.rmtree(partial, ignore_errors=True)
                os.close(lock)
        return place, False

    @contextmanager
    def workplace(self, step: str, key: str) -> Iterator[Path]:
        """A folder for work that goes on where a killed build left it, removed once it is done. Nobody else works there
        meanwhile; one who wants to waits. Raises: ToolError `cache-not-writable`."""
        folder = self._unfinished / step / key
        with ExitStack() as stack:
            try:
                stack.enter_context(_locked(folder))
            except OSError as problem:
                folder = self._elsewhere(problem) / f"{step}.{secrets.token_hex(8)}"
                folder.mkdir()
            with _named(folder):
                yield folder
            shutil.rmtree(folder, ignore_errors=True)

    def release(self) -> None:
        """Let go of what was given out: it may be removed from now on."""
        _release(self._held)

    def prune(self, limit: int = LIMIT_BYTES) -> None:
        """Remove the entries used longest ago until the rest is within `limit` bytes, unfinished work that nobody has
        gone on with for long, and what killed processes left. Nothing in use is removed."""
        entries = []
        for step in self._root.glob("*"):
            self._sweep(step)
            entries += [(_used(path), path) for path in _listed(step) if not path.name.startswith(".")]
        total = 0
        for _, entry in sorted(entries, reverse=True):
            total += sum(_size(path) for path in _files(entry))
            if total > limit:
                self._remove(entry)
        for folder in self._unfinished.glob("*/*"):
            with suppress(OSError):  # another build removes it, too
                if folder.is_dir() and _old(folder):
                    with _locked(folder, wait=False):
                        shutil.rmtree(folder, ignore_errors=True)
        for left in self._home.glob(f"*/{PARTIAL}*"):
            with suppress(OSError):
                if _old(left):
                    left.unlink()

    def _take(self, place: Path) -> bool:
        """Hold an entry that is there and intact."""
        try:
            lock = os.open(place / DIGESTS, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        _lock(lock, fcntl.LOCK_SH)  # whoever removes it, or gives it its name, has it for a moment
        if not _intact(place, lock):
            os.close(lock)
            return False
        self._hold(place, lock)
        with suppress(OSError):  # a cache that may only be read
            os.utime(place)
        return True

    def _hold(self, place: Path, lock: int) -> None:
        before = self._held.pop(place, None)
        self._held[place] = lock
        if before is not None:
            os.close(before)

    def _begin(self, place: Path) -> tuple[Path, int]:
        """A new folder for what is to be `place`, and the descriptor of its digests, which holds its lock."""
        place.parent.mkdir(parents=True, exist_ok=True)
        self._sweep(place.parent)
        partial = place.with_name(f".{place.name}.{secrets.token_hex(8)}")
        with _alone(self._home / FILING):  # nobody sweeps it before it is locked
            partial.mkdir()
            lock = os.open(partial / DIGESTS, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            _lock(lock, fcntl.LOCK_EX)
        return partial, lock

    def _file(self, partial: Path, place: Path, lock: int, found: tuple[int, ...] | None) -> bool:
        """Give a finished entry its name; False where another build filed the same meanwhile, which is held instead.

        What lies there and is not intact is moved away first. `found` is what that was before: only another one is
        judged anew, since it is judged by hashing it while others wait.
        """
        with _alone(self._home / FILING):
            if (now := _identity(place)) is not None and now != found and self._take(place):
                return False
            if os.path.lexists(place):
                place.rename(away := place.with_name(f".{place.name}.{secrets.token_hex(8)}"))
                shutil.rmtree(away, ignore_errors=True)
            partial.rename(place)
            _lock(lock, fcntl.LOCK_SH)  # from now on others may use it, too
        return True

    def _sweep(self, step: Path) -> None:
        """Remove what killed builds left: partial and half removed folders that nobody holds."""
        for path in _listed(step):
            if path.name.startswith("."):
                self._remove(path)

    def _remove(self, entry: Path) -> None:
        """Remove an entry unless somebody fills or uses it. It leaves its place at once, whole."""
        away = entry.with_name(f".{entry.name.strip('.')[:64]}.{secrets.token_hex(8)}")
        with suppress(OSError), _alone(self._home / FILING):  # another one removes it, too; or it may only be read
            with suppress(FileNotFoundError):  # without its digests it was begun, or half removed: nobody holds it
                lock = os.open(entry / DIGESTS, os.O_RDWR | os.O_CLOEXEC)
                try:
                    if not _lock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, otherwise=_old(entry)):
                        return
                finally:
                    os.close(lock)
            entry.rename(away)
        shutil.rmtree(away, ignore_errors=True)

    def _unfiled(self, problem: OSError, step: str, key: str, fill: Callable[[Path], None]) -> Path:
        """An entry that only this object knows, where the cache may not be written."""
        folder = self._elsewhere(problem) / f"{step}.{key}"
        if folder.is_dir():
            return folder
        partial = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}")
        with _writing(folder.parent):
            partial.mkdir()
            try:
                fill(partial)
                self._check()
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        return folder

    def _elsewhere(self, problem: OSError) -> Path:
        """A temporary folder in place of a cache that may only be read. Raises: ToolError `cache-not-writable`."""
        if problem.errno not in _REFUSED | NO_LOCKS:
            raise errors.cache_not_writable(self._home, problem.strerror or str(problem)) from problem
        if self._instead is None:
            try:
                self._instead = Path(tempfile.mkdtemp(prefix="edgeexport-"))
            except OSError as other:
                raise errors.cache_not_writable(self._home, f"{problem.strerror}; {other}") from other
            weakref.finalize(self, shutil.rmtree, self._instead, ignore_errors=True)
            self.remarks.append(errors.cache_read_only(self._home, problem.strerror or str(problem), self._instead))
        return self._instead


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Says what the system refuses about `folder`; of another place that is for whoever works there to say."""
    try:
        with _named(folder):
            yield
    except BrokenPipeError:  # narration's
        raise
    except OSError as problem:
        place = problem.filename
        if isinstance(place, (str, bytes)) and not Path(os.fsdecode(place)).is_relative_to(folder):
            raise
        raise errors.cache_not_writable(folder, problem.strerror or str(problem)) from problem


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Calls the cache what a writer who does not know where it writes calls the output."""
    try:
        yield
    except errors.UsageError as problem:
        finding = problem.findings[0]
        if finding.code != "output-not-writable" or not Path(finding.where).is_relative_to(folder):
            raise
        raise errors.cache_not_writable(folder, finding.why) from problem


def _release(held: dict[Path, int]) -> None:
    while held:
        with suppress(KeyError):
            os.close(held.popitem()[1])


def _lock(descriptor: int, how: int, *, otherwise: bool = True) -> bool:
    """Whether the lock was got; `otherwise` where this file system has none."""
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        return False
    except OSError as problem:
        if problem.errno not in NO_LOCKS:
            raise
        return otherwise
    return True


def _write_digests(partial: Path, descriptor: int) -> None:
    """The digest of every file, through the descriptor that holds the entry's lock."""
    digests = {path.relative_to(partial).as_posix(): sha256_of(path) for path in _files(partial)}
    digests.pop(DIGESTS, None)
    data = memoryview(json.dumps(digests).encode())
    while data:
        data = data[os.write(descriptor, data) :]


def _intact(place: Path, lock: int) -> bool:
    """Whether the entry whose digests are open here is the one in its place, as it was filed."""
    try:
        if not os.path.samestat(os.fstat(lock), (place / DIGESTS).stat()):
            return False  # it was removed between opening and locking
        with open(lock, "rb", closefd=False) as file:
            digests = json.loads(file.read())
        listed = {place / name for name in digests} | {place / DIGESTS}
        return listed == set(_files(place)) and all(
            sha256_of(place / name) == digest for name, digest in digests.items()
        )
    except (OSError, ValueError, AttributeError):
        return False


def _identity(place: Path) -> tuple[int, ...] | None:
    """What tells one filing of an entry from the next; None where there is none."""
    try:
        found = (place / DIGESTS).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time is within; the file stays. Where there are no locks, several are."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _lock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """The folder, made where it is missing, is nobody else's meanwhile; one who wants it waits. Raises: ToolError
    `cache-not-writable`."""
    with ExitStack() as stack:
        try:
            stack.enter_context(_locked(folder))
        except OSError as problem:
            raise errors.cache_not_writable(folder, problem.strerror or str(problem)) from problem
        yield


@contextmanager
def _locked(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """What `owned` promises. Raises: OSError, also where somebody has it and `wait` is not given."""
    path = folder.with_name(f"{folder.name}.lock")
    while True:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _inode(path) != os.fstat(lock.fileno()).st_ino:
                continue  # whoever had it has removed it: a third one may hold a new one
            folder.mkdir(exist_ok=True)  # within the lock alone: who has it removes the folder when its work is done
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


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _used(entry: Path) -> float:
    try:
        return entry.stat().st_mtime
    except OSError:
        return 0.0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # removed meanwhile
        return 0


def _old(folder: Path) -> bool:
    """Whether nothing in a folder has changed for long."""
    last = 0.0
    for path in (folder, *_files(folder)):
        with suppress(FileNotFoundError):
            last = max(last, path.stat().st_mtime)
    return time.time() - last > KEPT_SECONDS


def _files(entry: Path) -> list[Path]:
    """All files of an entry, as far as nobody removes it meanwhile; an ML package is a folder of some."""
    return sorted(
        path for parent, _, names in os.walk(entry) for name in names if (path := Path(parent, name)).is_file()
    )
