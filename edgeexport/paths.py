"""Where edgeexport keeps what it may lose: the cache folder."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "EDGEEXPORT_CACHE_DIR"


def cache_dir() -> Path:
    """The cache folder: $EDGEEXPORT_CACHE_DIR, or the user's cache folder of this platform. It may not exist yet."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    import platformdirs

    return platformdirs.user_cache_path("edgeexport")
