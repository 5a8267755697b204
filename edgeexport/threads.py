"""Threads that end when whoever waits for them no longer does: Ctrl-C is answered within a piece of work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any


@contextmanager
def pool(
    threads: int, initializer: Callable[..., object] | None = None, *arguments: Any
) -> Iterator[ThreadPoolExecutor]:
    """A thread pool that forgets what has not begun when the block ends by an exception."""
    with ThreadPoolExecutor(threads, initializer=initializer, initargs=arguments) as made:
        try:
            yield made
        except BaseException:
            made.shutdown(wait=False, cancel_futures=True)
            raise


class Stopped(Exception):
    """Nobody wants the result any more."""


class Stop:
    """Tells work in other threads, which asks now and then, that nobody wants its result any more."""

    def __init__(self) -> None:
        self._stopped = False

    def __enter__(self) -> Stop:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._stopped = True

    def check(self, *_: object) -> None:
        """Raises: `Stopped`. Takes what a progress is called with."""
        if self._stopped:
            raise Stopped
