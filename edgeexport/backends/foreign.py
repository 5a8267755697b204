"""Reading files that anyone may have written with libraries that trust them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from edgeexport import errors


@contextmanager
def foreign(failed: Callable[[str], errors.EdgeExportError]) -> Iterator[None]:
    """Within, a foreign file is read: whatever exception that ends in, `failed` makes ours out of its text. Readers of
    protobuf, flatbuffers and JSON, and what walks through their result, run into every kind of it. Our own errors
    pass, and a missing package does."""
    try:
        yield
    except (errors.EdgeExportError, ImportError):
        raise
    except Exception as problem:
        raise failed(described(problem)) from problem


def described(problem: Exception) -> str:
    """An exception in a line, also one without words."""
    return f"{type(problem).__name__}: {problem}"[:400]
