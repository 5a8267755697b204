"""Results of finished steps by content: what a killed or repeated build need not do again.

An entry is a folder named by the hash of everything that shaped it. It appears by a rename, whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from edgeexport import errors
from edgeexport.bundle.files import sha256_of
from edgeexport.paths import cache_dir

LIMIT_BYTES = 40 << 30
"""Beyond this, the entries used longest ago are removed."""
DIGESTS = "digests.json"


def key(*parts: object) -> str:
    """The name of an entry: sha256 over the parts' JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class Cache:
    """Folders by (step, key) under the cache directory."""

    def __init__(self, root: Path | None = None) -> None:
        self._root = (root or cache_dir()) / "steps"

    def folder(self, step: str, key: str, fill: Callable[[Path], None], *, force: bool = False) -> tuple[Path, bool]:
        """The entry's folder, and whether it was there already; else `fill` writes it.

        An entry whose files no longer have the digests they were filed with is thrown away and filled again.
        Raises: UsageError `output-not-writable`, and whatever `fill` raises.
        """
        place = self._root / step / key
        if not force and self._intact(place):
            os.utime(place)
            return place, True
        partial = place.with_name(f".{key}.{os.getpid()}")
        try:
            shutil.rmtree(place, ignore_errors=True)
            place.parent.mkdir(parents=True, exist_ok=True)
            self._sweep(place.parent)
            partial.mkdir()
        except OSError as problem:
            raise errors.output_not_writable(self._root, str(problem)) from problem
        try:
            fill(partial)
            digests = {path.relative_to(partial).as_posix(): sha256_of(path) for path in _files(partial)}
            (partial / DIGESTS).write_text(json.dumps(digests))
            try:
                partial.rename(place)
            except OSError:
                if not self._intact(place):  # another build filed the same entry first
                    raise
        except OSError as problem:
            raise errors.output_not_writable(self._root, str(problem)) from problem
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return place, False

    def workplace(self, step: str, key: str) -> Path:
        """A folder for work that goes on where a killed build left it; whoever finishes it takes the files away."""
        return self._root.parent / "unfinished" / step / key

    def prune(self, limit: int = LIMIT_BYTES) -> None:
        """Remove the entries used longest ago until the rest is within `limit` bytes."""
        entries = [path for step in self._root.glob("*") for path in step.iterdir() if not path.name.startswith(".")]
        entries.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        total = 0
        for entry in entries:
            total += sum(path.stat().st_size for path in _files(entry))
            if total > limit:
                shutil.rmtree(entry, ignore_errors=True)

    def _intact(self, place: Path) -> bool:
        try:
            digests = json.loads((place / DIGESTS).read_text())
            return all(sha256_of(place / name) == digest for name, digest in digests.items())
        except (OSError, ValueError, AttributeError):
            return False

    def _sweep(self, step: Path) -> None:
        """Remove what killed builds left: partial folders whose process is gone."""
        for path in step.glob(".*"):
            pid = path.name.rpartition(".")[2]
            if pid.isdigit() and not Path(f"/proc/{pid}").exists():
                shutil.rmtree(path, ignore_errors=True)


def _files(entry: Path) -> list[Path]:
    """All files of an entry; an ML package is a folder of some."""
    return sorted(path for path in entry.rglob("*") if path.is_file())
