"""Spread work over processes. Threads that take turns at Python's lock gain nothing from short numpy calls.

A worker is this module run by a fresh interpreter: it imports what the work needs and nothing else, so that it holds
some 50 MB beside its own arrays, and no thread or lock of the parent can trouble it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from edgeexport import errors

Job = TypeVar("Job")
Result = TypeVar("Result")

RUN = 8
"""Jobs that one worker does in a row: neighbours lie side by side in a file, which the system reads ahead."""

ENVIRONMENT = {
    # Without these, glibc gives the blocks of each row block back and gets them anew: 1.6 us for every 4 kB.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 28),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 28),
    "OPENBLAS_NUM_THREADS": "1",
}


def spread(work: Callable[[Job], Result], jobs: Sequence[Job], processes: int, run: int = RUN) -> Iterator[Result]:
    """`work` of every job, in the order of the jobs; by this process itself where `processes` is 1.

    `work`, jobs and results are pickled. An EdgeExportError or OSError of `work` is raised here, once the results
    before it are taken. Raises: ToolError `worker-died`.
    """
    if processes == 1:
        yield from map(work, jobs)
        return
    owner = [i // run % processes for i in range(len(jobs))]
    workers = [
        _Worker(work, [job for job, who in zip(jobs, owner, strict=True) if who == number])
        for number in range(processes)
    ]
    try:
        for who in owner:
            yield workers[who].result()
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """One process with its jobs. Results that are not taken yet wait in the pipe, and the worker with them."""

    def __init__(self, work: Callable[[Any], Any], jobs: Sequence[Any]) -> None:
        self._connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "edgeexport.workers", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **ENVIRONMENT},
            )
        self._connection.send(sys.path)
        self._connection.send((work, jobs))

    def result(self) -> Any:
        """The next job's result."""
        try:
            problem, value = self._connection.recv()
        except (EOFError, ConnectionResetError):
            raise errors.worker_died(self._process.wait()) from None
        if problem is not None:
            raise problem(*value)
        return value

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        self._connection.close()
        self._process.kill()
        self._process.wait()


def _serve(connection: Connection) -> None:
    """Do the jobs that come first through the connection, and send (class of the failure or None, value) for each."""
    sys.path[:] = connection.recv()  # what the parent could import, the worker can
    work, jobs = connection.recv()
    threading.Thread(target=_end_with_parent, args=(connection,), daemon=True).start()
    for job in jobs:
        try:
            connection.send((None, work(job)))
        except errors.EdgeExportError as problem:
            connection.send((type(problem), problem.findings))
        except OSError as problem:
            connection.send((OSError, problem.args))


def _end_with_parent(connection: Connection) -> None:
    """The parent sends nothing more: what can be read now is the end of the connection."""
    connection.poll(None)
    os._exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and ends its workers
    try:
        _serve(Connection(int(sys.argv[1])))
    except (BrokenPipeError, ConnectionResetError):
        sys.exit(1)  # the parent is gone
