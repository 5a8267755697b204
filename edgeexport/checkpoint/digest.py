"""SHA-256 of checkpoint files, remembered for as long as a file stays what it was."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgeexport import errors, threads
from edgeexport.checkpoint.files import open_regular
from edgeexport.core import Checkpoint, Progress, TensorRef, no_progress
from edgeexport.paths import cache_dir, write_whole
from edgeexport.threads import Stop

CHUNK = 2**24
"""Bytes hashed at a time. After each, a thread waits for its turn at Python's lock, up to 5 ms while another thread
traces the model: with chunks of 1 MB that would be most of the time."""

THREADS = 2


def content_digest(checkpoint: Checkpoint, progress: Progress = no_progress) -> str:
    """SHA-256 over configuration, tensor index and every byte of the weight files, as hex.

    The same in any folder: no path enters it. `progress` counts bytes over all files, of which `THREADS` are read at
    a time; a file whose digest is remembered counts at once, and what it raises ends
    the work within a piece of a file. Raises `checkpoint-changed` and `file-unreadable`. The
    tokenizer is not covered, so that a changed chat template does not mean new weights.
    """
    total = sum(_size(path) for path in checkpoint.files)
    hashed = dict.fromkeys(checkpoint.files, 0)
    lock, stop = threading.Lock(), Stop()

    def digest_of(path: Path) -> str:
        def count(done: int, _: int) -> None:
            stop.check()
            with lock:
                hashed[path] = done
                progress(sum(hashed.values()), total)

        return file_sha256(path, count)

    # From the last to the first: what the system then still holds of files larger than its memory is what is read next.
    # A file may be of 40 GB: who presses Ctrl-C waits for a piece of it.
    with threads.pool(THREADS) as pool, stop:
        digests = list(pool.map(digest_of, reversed(checkpoint.files)))[::-1]
    return _sha256_of([checkpoint.header_digest, digests])


def header_digest(
    config: Mapping[str, Any], generation: Mapping[str, Any], tensors: Mapping[str, TensorRef], files: tuple[Path, ...]
) -> str:
    """SHA-256 over configuration and tensor index, as hex. Files count by their position, not their path."""
    number = {path: index for index, path in enumerate(files)}
    return _sha256_of([config, generation, [_row(name, ref, number) for name, ref in sorted(tensors.items())]])


def _row(name: str, ref: TensorRef, number: Mapping[Path, int]) -> list[Any]:
    """One tensor of the index, of a matrix that comes quantised with its parts."""
    row = [name, number[ref.file], ref.offset, ref.nbytes, ref.encoding, ref.shape, repr(ref.transform)]
    if ref.packing is None:
        return row
    how = ref.packing
    settings = [how.layout, how.bits, how.group, how.tall, how.float8, how.one_less, how.centred, how.zeros is not None]
    return [*row, settings, [_row(part.name, part, number) for part in how.parts]]


def file_sha256(path: Path, progress: Progress = no_progress) -> str:
    """SHA-256 of a file as hex, read with a fixed buffer, or remembered from the last time.

    It is remembered under everything that changes when the file does: resolved path, inode, size, and the times of
    change. The inode's own time (ctime) is among them because mtime can be set back.
    """
    descriptor = open_regular(path)
    try:
        status = os.fstat(descriptor)
        identity = _identity(path, status)
        memo = _memo(identity)
        digest = _recall(memo)
        if digest is None:
            digest = _hash(descriptor, path, status.st_size, progress)
            if _identity(path, os.fstat(descriptor)) != identity:
                raise errors.checkpoint_changed(path)
            _remember(memo, digest)
        progress(status.st_size, status.st_size)
        return digest
    finally:
        os.close(descriptor)


def identities(files: Sequence[Path]) -> tuple[tuple[str | int, ...], ...]:
    """Path, inode, size and times of change of each file. Raises: CheckpointError `file-unreadable`."""
    return tuple(tuple(_identity(path, _status(path))) for path in files)


def refuse_changed(checkpoint: Checkpoint) -> None:
    """Raises: CheckpointError `checkpoint-changed` where a weight file is not the one that was opened: what is made of
    it would go by another's digest."""
    for path, before, now in zip(checkpoint.files, checkpoint.identities, identities(checkpoint.files), strict=False):
        if before != now:
            raise errors.checkpoint_changed(path)


def _memo(identity: list[str | int]) -> Path:
    return cache_dir() / "digests" / _sha256_of(identity)


def _identity(path: Path, status: os.stat_result) -> list[str | int]:
    return [str(path.resolve()), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _size(path: Path) -> int:
    return _status(path).st_size


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as problem:
        raise errors.file_unreadable(path, problem.strerror or str(problem)) from problem


def _hash(descriptor: int, path: Path, size: int, progress: Progress) -> str:
    buffer = memoryview(bytearray(min(CHUNK, size)))
    digest, done = hashlib.sha256(), 0
    try:
        # Up to the size at the start, and no further: a file that grows would never end.
        while count := os.preadv(descriptor, [buffer[: min(CHUNK, size - done)]], done):
            digest.update(buffer[:count])
            done += count
            progress(done, size)
    except OSError as problem:
        raise errors.file_unreadable(path, problem.strerror or str(problem)) from problem
    return digest.hexdigest()


def _recall(memo: Path) -> str | None:
    """The remembered digest; None when there is none, or the cache is damaged and the file is to be read anew."""
    try:
        digest, _, seal = memo.read_text("ascii").partition(" ")
    except (OSError, UnicodeDecodeError):
        return None
    return digest if seal == _seal(memo, digest) else None


def _seal(memo: Path, digest: str) -> str:
    """What a damaged memo does not have."""
    return hashlib.sha256(f"{memo.name} {digest}".encode()).hexdigest()


def _remember(memo: Path, digest: str) -> None:
    """Write the digest whole or not at all. A cache that cannot be written costs time, not the build."""
    with suppress(OSError):
        write_whole(memo, f"{digest} {_seal(memo, digest)}".encode("ascii"))


def _sha256_of(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()
