"""Where the runtime's packed weights lie while a `.tflite` is open: beside the process or, for a bundle, kept.

XNNPACK packs every weight anew for each signature, in memory, unless it is given a file: on SmolLM2-135M in float32
1.9 GB and 10 s become 0.3 GB and 2.7 s, and 0.06 GB and 0.3 s when the file is there already. It takes any file whose
weights have the same shapes, and computes with another model's numbers without a word. So a kept file is named by the
sha256 of the model file itself, whatever a manifest says of it, and is used only where it has the digest that it was
kept with. Both digests are remembered for as long as a file stays what it was.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from edgeexport import errors
from edgeexport.checkpoint.digest import file_sha256
from edgeexport.paths import cache_dir, partial_of, write_whole

LIMIT_BYTES = 8 << 30
"""Beyond this, the files used longest ago are removed."""


@contextmanager
def weight_cache(model: Path) -> Iterator[Path]:
    """The path to give to the runtime as it opens `model`, within.

    Of a model in a bundle the file is kept; of another one, and where the cache folder cannot be written, its name is
    gone when this ends, and its bytes when the runtime has closed it.
    """
    kept = _kept(model)
    if kept is not None and _intact(kept):
        with suppress(OSError):
            os.utime(_digest_of(kept))  # not its own time: its digest is remembered by that
        yield kept
        return
    if kept is None or not _made(kept.parent):
        with TemporaryDirectory() as folder:
            yield Path(folder) / "weights"
        return
    partial = partial_of(kept)
    try:
        yield partial
        with suppress(OSError, errors.CheckpointError):  # nothing was packed
            _keep(partial, kept)
            _prune(kept.parent)
    finally:
        partial.unlink(missing_ok=True)


def _kept(model: Path) -> Path | None:
    """Where the packed weights of a bundle's model are kept; None for a model without a manifest."""
    if not (model.parent / "manifest.json").is_file():
        return None
    try:
        parts = (file_sha256(model), version("ai-edge-litert"))
    except errors.CheckpointError:  # it cannot be read, which the runtime will say
        return None
    return cache_dir() / "xnnpack" / hashlib.sha256(repr(parts).encode()).hexdigest()


def _keep(partial: Path, kept: Path) -> None:
    """Give what was packed its lasting name. Without its digest beside it, it is as good as not there."""
    digest = file_sha256(partial)
    _digest_of(kept).unlink(missing_ok=True)
    partial.replace(kept)
    write_whole(_digest_of(kept), digest.encode("ascii"))


def _intact(kept: Path) -> bool:
    """Whether these are the bytes that were kept."""
    try:
        return file_sha256(kept) == _digest_of(kept).read_text("ascii")
    except (OSError, UnicodeDecodeError, errors.CheckpointError):
        return False


def _digest_of(kept: Path) -> Path:
    return kept.with_name(f"{kept.name}.sha256")


def _made(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def _prune(folder: Path) -> None:
    """Remove the files used longest ago until the rest is within the limit."""
    digests = sorted(folder.glob("*.sha256"), key=lambda path: path.stat().st_mtime, reverse=True)
    total = 0
    for path in digests:
        kept = path.with_suffix("")
        total += kept.stat().st_size
        if total > LIMIT_BYTES:
            path.unlink(missing_ok=True)
            kept.unlink(missing_ok=True)
