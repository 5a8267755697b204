"""Whether results can be put where they are to go: asked before the work, not after hours of it."""

from __future__ import annotations

import os
from pathlib import Path

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
