"""How much later the first token of `edgeexport run` comes for the child process that runs the artifact.

    python benchmarks/first_token.py BUNDLE [--rounds 10]

Starts `edgeexport run` with and without `--in-process`, in turns, and measures from the start of the process to the
first byte of the answer. Prints the median of each and their difference in milliseconds.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

WAYS = {"in a child": [], "in process": ["--in-process"]}


def seconds_to_first_byte(bundle: Path, options: list[str]) -> float:
    """From the start of the command to the first byte on its stdout."""
    line = [sys.executable, "-m", "edgeexport", "run", str(bundle), "--raw", "-q", "-p", "The", "--max-tokens", "8"]
    started = time.perf_counter()
    with subprocess.Popen([*line, *options], stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        seconds = time.perf_counter() - started
        process.stdout.read()
    if process.returncode:
        raise SystemExit(f"edgeexport run ended with code {process.returncode}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    for options in WAYS.values():
        seconds_to_first_byte(given.bundle, options)  # files into memory
    for _ in range(given.rounds):
        for way, options in WAYS.items():
            taken[way].append(1000 * seconds_to_first_byte(given.bundle, options))
    medians = {way: statistics.median(each) for way, each in taken.items()}
    for way, median in medians.items():
        print(f"{way:<12} {median:7.1f} ms (of {given.rounds}: {min(taken[way]):.1f} to {max(taken[way]):.1f})")
    print(f"{'later by':<12} {medians['in a child'] - medians['in process']:7.1f} ms")


if __name__ == "__main__":
    main()
