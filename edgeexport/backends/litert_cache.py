"""Where the runtime's packed weights lie while a `.tflite` is open: beside the process or, for a bundle, kept.

XNNPACK packs every weight anew for each signature, in memory, unless it is given a file: on SmolLM2-135M in float32
1.9 GB and 10 s become 0.3 GB and 2.7 s, and 0.06 GB and 0.3 s when the file is there already. It takes any file whose
weights have the same shapes, and computes with another model's numbers without a word. So a kept file is named by the
sha256 that the bundle's manifest gives for the model, and by the model file's own size and time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from edgeexport.paths import cache_dir

LIMIT_BYTES = 8 << 30
"""Beyond this, the files used longest ago are removed."""


@contextmanager
def weight_cache(model: Path) -> Iterator[Path]:
    """The path to give to the runtime as it opens `model`, within.

    Of a model in a bundle the file is kept; of another one, and where the cache folder cannot be written, its name is
    gone when this ends, and its bytes when the runtime has closed it.
    """
    kept = _kept(model)
    if kept is not None and kept.exists():
        with suppress(OSError):
            os.utime(kept)
        yield kept
        return
    if kept is None or not _made(kept.parent):
        with TemporaryDirectory() as folder:
            yield Path(folder) / "weights"
        return
    partial = kept.with_name(f".{kept.name}.{os.getpid()}")
    partial.unlink(missing_ok=True)  # a killed process's, whose number is ours now
    try:
        yield partial
        with suppress(OSError):  # nothing was packed, or another process was first
            partial.replace(kept)
            _prune(kept.parent)
    finally:
        partial.unlink(missing_ok=True)


def _kept(model: Path) -> Path | None:
    """Where the packed weights of a bundle's model are kept; None for a model without a manifest."""
    try:
        manifest = json.loads((model.parent / "manifest.json").read_bytes())
        digest = str(manifest["files"][model.name]["sha256"])
        stat = model.stat()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    parts = (digest, stat.st_size, stat.st_mtime_ns, version("ai-edge-litert"))
    return cache_dir() / "xnnpack" / hashlib.sha256(repr(parts).encode()).hexdigest()


def _made(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def _prune(folder: Path) -> None:
    """Remove the files used longest ago until the rest is within the limit."""
    files = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    total = 0
    for path in files:
        total += path.stat().st_size
        if total > LIMIT_BYTES:
            path.unlink(missing_ok=True)
