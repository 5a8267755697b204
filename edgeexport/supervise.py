"""Work on files that anyone may have written, in a child process: a runtime that dies of them takes nobody with it.

`edgeexport run`, `verify`, `parity` and `bench` hand artifacts to runtimes of others, which trust them: one flipped
byte may be a SIGSEGV, an abort, or a loop without end. The command line forks before it has imported anything heavy,
the child does the whole command (it has the terminal, the pipes and the exit code as if there were no parent), and the
parent waits, passes signals on, and says `artifact-crashed` where the child died.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
ASKED = frozenset({*PASSED_ON, signal.SIGPIPE, signal.SIGALRM})
"""A child that ends by one of these was told to: it did not crash."""
TWICE_SECONDS = 0.3
"""A terminal tells every process of a command of Ctrl-C, and the parent tells the child again: that is one Ctrl-C."""
OPEN_SECONDS, OPEN_BYTES_PER_SECOND = 120.0, 4e6
CALL_SECONDS, CALL_BYTES_PER_SECOND = 120.0, 1e8
"""How long opening an artifact may take, and a call for each of its tokens: many times what a slow computer needs, so
that what takes longer is a loop without end."""

LEAVE_SECONDS = 30.0
"""And how long the interpreter may take to leave, once all is done."""

_marks = -1
"""In the child: the pipe to the parent."""


Handler = Callable[[int, FrameType | None], object]


class Died(Exception):
    """The child died: `signal` is the signal's name, or "" for one that was ended because it did not answer."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.signal = name


def in_child() -> int | None:
    """Fork. In the child: None, and it goes on with the command. In the parent: the exit code, once the child has
    ended; where that ended by a signal that it was sent, so does the parent.

    Raises Died in the parent.
    """
    reading, writing = os.pipe()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # one may be closed
            stream.flush()
    kept = signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    parent, child = os.getpid(), os.fork()
    if not child:
        os.close(reading)
        _begin(writing, parent)
        signal.pthread_sigmask(signal.SIG_SETMASK, kept)
        return None
    os.close(writing)

    def pass_on(number: int, _frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    before = {number: signal.signal(number, pass_on) for number in PASSED_ON}
    signal.pthread_sigmask(signal.SIG_SETMASK, kept)
    try:
        return _ended(child, reading)
    finally:
        os.close(reading)
        for number, handler in before.items():
            signal.signal(number, handler)


def done(code: int) -> None:
    """In a child: tell the parent the exit code. What is left to do is the interpreter's, and runtimes that fail while
    they are taken down do not change what was answered."""
    _tell(f"={code}\n")


@contextlib.contextmanager
def opening(size: int) -> Iterator[None]:
    """Within, an artifact of so many bytes is opened."""
    _limit(OPEN_SECONDS + size / OPEN_BYTES_PER_SECOND)
    try:
        yield
    finally:
        end()


@contextlib.contextmanager
def calling(size: int, tokens: int) -> Iterator[None]:
    """Within, a runtime computes: so many tokens by weights of so many bytes."""
    begin_call(size, tokens)
    try:
        yield
    finally:
        end()


def begin_call(size: int, tokens: int) -> None:
    """As `calling`, until `end`."""
    _limit(CALL_SECONDS + tokens * size / CALL_BYTES_PER_SECOND)


def end() -> None:
    """What was begun is done."""
    _tell("<\n")


def _limit(seconds: float) -> None:
    _tell(f">{seconds:.1f}\n")


def _tell(line: str) -> None:
    if _marks >= 0:
        with contextlib.suppress(OSError):  # a parent that is gone needs no telling
            os.write(_marks, line.encode("ascii"))


def _begin(writing: int, parent: int) -> None:
    global _marks
    _marks = writing
    for number in PASSED_ON:
        if callable(handler := signal.getsignal(number)):
            signal.signal(number, _once(handler))
    _die_with(parent)


def _once(handler: Handler) -> Handler:
    """The handler, deaf for a moment once it was called."""
    last = -TWICE_SECONDS

    def answer(number: int, frame: FrameType | None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= TWICE_SECONDS:
            last = now
            handler(number, frame)

    return answer


def _die_with(parent: int) -> None:
    """Where the parent is killed, so is this process. Linux can be asked for that."""
    if sys.platform == "linux":
        import ctypes

        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(128 + signal.SIGKILL)


def _ended(child: int, reading: int) -> int:
    """The exit code. Raises Died."""
    told = b""
    limit: float | None = None
    said: int | None = None
    overdue = False
    while True:
        wait = None if limit is None else max(0.0, limit - time.monotonic())
        ready, _, _ = select.select([reading], [], [], wait)
        if not ready:
            overdue = True
            os.kill(child, signal.SIGKILL)
            limit = None
            continue
        piece = os.read(reading, 1 << 16)
        if not piece:
            break
        *lines, told = (told + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"="):
                said, limit = int(line[1:]), time.monotonic() + LEAVE_SECONDS
            elif line.startswith(b">"):
                limit = time.monotonic() + float(line[1:])
            else:
                limit = None
    _, status = os.waitpid(child, 0)
    if said is not None:
        return said
    if overdue:
        raise Died("")
    if not os.WIFSIGNALED(status):
        return os.waitstatus_to_exitcode(status)
    number = os.WTERMSIG(status)
    if number in ASKED:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    raise Died(signal.Signals(number).name)
