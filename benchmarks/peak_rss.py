"""Run a command; print its wall time and the peak memory of it and its children.

python benchmarks/peak_rss.py COMMAND [ARGUMENT...]
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import psutil

INTERVAL = 0.02


@dataclass(frozen=True)
class Usage:
    """What a command took.

    `largest_process` is the kernel's high-water mark of the largest single process: wait4's ru_maxrss. It is exact, but
    on Linux never less than what this process itself held when it started the command. `tree` is the largest sum over
    all processes seen together: sampled, so it may miss short peaks, and it counts shared pages once per process.
    The bytes are the process's own and those of its children that ended: `read` and `written` are what went through
    system calls, `fetched` what had to come from the disk. 0 where the system does not count them. `cpu` is the
    processor's seconds, of the system's calls too.
    """

    code: int
    seconds: float
    largest_process: int
    tree: int
    cpu: float = 0.0
    read: int = 0
    written: int = 0
    fetched: int = 0

    @property
    def peak(self) -> int:
        """The larger of the two figures, in bytes."""
        return max(self.largest_process, self.tree)


def measure(
    command: Sequence[str],
    env: Mapping[str, str] | None = None,
    *,
    quiet: bool = False,
    interval: float = INTERVAL,
    enough: Callable[[], bool] | None = None,
) -> Usage:
    """Run the command to its end, looking at its processes every `interval` seconds (a look takes 2 ms of a core); with
    `quiet` its standard output is dropped. It is killed when `enough` says so, asked as often."""
    start = time.perf_counter()
    process = subprocess.Popen(list(command), env=env, stdout=subprocess.DEVNULL if quiet else None)
    done = threading.Event()
    largest, passed = [0], [(0, 0, 0)]

    def sample() -> None:
        root = psutil.Process(process.pid)
        while not done.wait(interval):
            largest[0] = max(largest[0], _tree_rss(root))
            passed[0] = max(passed[0], _bytes(root))
            if enough is not None and enough():
                process.kill()
                return

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        _, status, usage = os.wait4(process.pid, 0)
    finally:
        done.set()
        sampler.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    unit = 1 if sys.platform == "darwin" else 1024
    seconds, cpu = time.perf_counter() - start, usage.ru_utime + usage.ru_stime
    return Usage(process.returncode, seconds, usage.ru_maxrss * unit, largest[0], cpu, *passed[0])


def _bytes(process: psutil.Process) -> tuple[int, int, int]:
    """(read, written, fetched from the disk) of a process so far."""
    try:
        counted = process.io_counters()  # /proc/<pid>/io
        return counted.read_chars, counted.write_chars, counted.read_bytes
    except (psutil.Error, AttributeError):  # it ended; or the system has no such counters
        return 0, 0, 0


def _tree_rss(root: psutil.Process) -> int:
    total = 0
    try:
        for process in (root, *root.children(recursive=True)):
            total += process.memory_info().rss
    except psutil.Error:  # a process ended between two looks; the next sample is near
        return 0
    return total


def main() -> int:
    """The command line."""
    if len(sys.argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    usage = measure(sys.argv[1:])
    print(
        f"{usage.seconds:.2f} s wall, peak RSS: largest process {usage.largest_process / 1e6:.0f} MB, "
        f"process tree {usage.tree / 1e6:.0f} MB, exit code {usage.code}",
        file=sys.stderr,
    )
    return usage.code


if __name__ == "__main__":
    sys.exit(main())
