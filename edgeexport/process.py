"""What a command line finds around it: three streams that may be closed or full, and signals that end it."""

from __future__ import annotations

import codecs
import io
import os
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from edgeexport.console import Console

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PIPE_CLOSED = 128 + signal.SIGPIPE
"""The exit code of a command whose reader has left, as of one that SIGPIPE ended."""


class StreamFailed(OSError):
    """Standard output takes no more: a full disk, or it was closed."""


class Ended(BaseException):
    """SIGTERM or SIGHUP: clean up and go. No handler of exceptions may take it for a failure of the work."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number


class _Out(io.FileIO):
    def write(self, data: object) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]
        except BrokenPipeError:
            raise
        except OSError as problem:
            raise StreamFailed(problem.errno, problem.strerror or str(problem)) from problem


class _Err(io.FileIO):
    """Narration that nobody can hear is dropped: it must not end the work."""

    def write(self, data: object) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]
        except BrokenPipeError:
            raise
        except OSError:
            return memoryview(data).nbytes  # type: ignore[arg-type]


def own_streams() -> None:
    """Put streams in place of the interpreter's that say what happens to them.

    A closed descriptor is opened on /dev/null first: the next file to be opened would get its number, and whatever a
    library prints would be written into it. What was closed then reads as ended, and what is written to it fails as
    it should: results do, narration is dropped. Bytes that are no text in a stream's encoding are replaced.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_WRONLY if descriptor == 2 else os.O_RDONLY), True)
    sys.stdout = _text(io.BufferedWriter(_Out(1, "w", closefd=False)), sys.stdout, "replace")
    sys.stderr = _text(io.BufferedWriter(_Err(2, "w", closefd=False)), sys.stderr, "backslashreplace")
    sys.stdin = _text(io.BufferedReader(io.FileIO(0, "r", closefd=False)), sys.stdin, "replace")


def _text(raw: io.BufferedWriter | io.BufferedReader, before: TextIO | None, on_error: str) -> TextIO:
    encoding = before.encoding if before is not None else "utf-8"
    if raw.readable() and codecs.lookup(encoding).name == "ascii":
        encoding = "utf-8"  # which ASCII is a part of
    return io.TextIOWrapper(raw, encoding=encoding, errors=on_error, line_buffering=raw.isatty())


def give_up(*descriptors: int) -> None:
    """What is left to be written to these goes nowhere, also when the interpreter flushes it at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in descriptors:
        os.dup2(nowhere, descriptor)


def listen(console: Console) -> None:
    """Answer Ctrl-C, SIGTERM and SIGHUP by an exception in the main thread, which `console` remembers: a library may
    swallow it, or turn it into one of its own. A signal that is ignored here stays ignored (nohup, `&` in scripts)."""

    def end(number: int, _: FrameType | None) -> None:
        console.stop = KeyboardInterrupt() if number == signal.SIGINT else Ended(number)
        raise console.stop

    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, end)


def listen_no_more() -> None:
    """When all is done, a signal ends the process as if it had never listened."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def exit_code(stop: BaseException) -> int:
    """The exit code of a process that a signal ended."""
    return stop.exit_code if isinstance(stop, Ended) else 128 + signal.SIGINT
