"""Where edgeexport keeps what it may lose: the cache folder."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

CACHE_VARIABLE = "EDGEEXPORT_CACHE_DIR"
PARTIAL = ".partial-"
"""How the name of a file begins that is being written; a killed process leaves it, and the cache removes it."""


def cache_dir() -> Path:
    """The cache folder: $EDGEEXPORT_CACHE_DIR, or the user's cache folder of this platform. It may not exist yet."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    import platformdirs

    return platformdirs.user_cache_path("edgeexport")


def partial_of(path: Path) -> Path:
    """A name beside `path` that nobody else has, to be renamed to it."""
    return path.with_name(f"{PARTIAL}{secrets.token_hex(8)}")


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, its folder too where that is missing. Raises: OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
