"""Whether results can be put where they are to go: asked before the work, not after hours of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from edgeexport import errors


def refuse_folder(folder: Path) -> None:
    """Raises: UsageError `output-not-writable` where this folder, which need not exist, can be neither made nor
    written."""
    for place in (folder.absolute(), *folder.absolute().parents):
        try:
            place.lstat()
        except FileNotFoundError:
            continue
        except OSError as problem:  # NotADirectoryError: a file is among its parents
            raise errors.output_not_writable(folder, problem.strerror or str(problem)) from problem
        if not place.is_dir():
            raise errors.output_not_writable(folder, f"{place} is no folder")
        if not os.access(place, os.W_OK | os.X_OK):
            raise errors.output_not_writable(folder, f"you may not write to {place}")
        return


def refuse_file(file: Path) -> None:
    """Raises: UsageError `output-not-writable` where this file, which need not exist, cannot be written."""
    if file.is_dir():
        raise errors.output_not_writable(file, "it is a folder, and a file is to be written")
    if not file.parent.is_dir():
        raise errors.output_not_writable(file, f"{file.parent} is no folder")
    refuse_folder(file.parent)
    if file.exists() and not os.access(file, os.W_OK):
        raise errors.output_not_writable(file, "you may not write to it")


@contextmanager
def gathered(folder: Path) -> Iterator[Path]:
    """A folder whose files come to be in `folder` when all have been written, and are gone when that fails.

    Raises: UsageError `output-not-writable`, which names `folder` whatever a writer within knows of it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix=".partial-") as place:
            yield Path(place)
            for file in sorted(Path(place).iterdir()):
                file.replace(folder / file.name)
    except BrokenPipeError:  # narration's
        raise
    except OSError as problem:
        raise errors.output_not_writable(folder, problem.strerror or str(problem)) from problem
    except errors.UsageError as problem:
        finding = problem.findings[0]
        if finding.code != "output-not-writable":
            raise
        raise errors.output_not_writable(folder, finding.why) from problem
