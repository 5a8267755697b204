"""Calibrate a random 9B-parameter model (20.6 GB) by the weighted search and by GPTQ, killed twice on the way.

    python benchmarks/bench_9b_calibrate.py [--work build/bench-9b] [--method search|gptq] [--layers N]

Each calibration begins with an empty cache, is killed by SIGKILL after a third and after two thirds of the layers, and
goes on; time is the sum over the three processes, until the integers are complete. A random model tells time and memory
alone. `--layers N` ends after so many and says what all would take by those beyond the first: an estimate, shown as
one. Exits with 1 where a figure is beyond its limit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench_9b import PRESET
from peak_rss import measure
from random_checkpoint import PRESETS, write_checkpoint

LIMITS = {"search": (30 * 60, 2.0e9), "gptq": (90 * 60, 3.0e9)}
"""Seconds and bytes that are asked at most, on two cores."""
INTERVAL = 0.25


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, default=Path("build/bench-9b"))
    parser.add_argument("--checkpoint", type=Path, help="one that was written before")
    parser.add_argument("--method", choices=LIMITS, action="append", help="both by default")
    parser.add_argument("--layers", type=int, help="end after so many, and estimate the rest")
    options = parser.parse_args()
    checkpoint: Path = options.checkpoint or options.work / PRESET
    if not (checkpoint / "tokenizer_config.json").exists():  # what is written last
        shutil.rmtree(checkpoint, ignore_errors=True)
        write_checkpoint(PRESETS[PRESET], checkpoint)
    kept = [_calibrated(checkpoint, options.work, method, options.layers) for method in options.method or LIMITS]
    return 0 if all(kept) else 1


def _calibrated(checkpoint: Path, work: Path, method: str, layers: int | None) -> bool:
    """One method's figures, and whether they are within its limits."""
    cache, out = (work / "cache").resolve(), work / "out"
    for folder in (out, cache):
        shutil.rmtree(folder, ignore_errors=True)
    stages = int(PRESETS[PRESET].config["text_config"]["num_hidden_layers"])
    ends: list[Callable[[], bool]]
    if layers is not None:
        ends = [lambda: _done(cache) > layers]
    else:
        ends = [lambda: _done(cache) >= stages // 3, lambda: _done(cache) >= 2 * stages // 3, lambda: _whole(cache)]
    command = [sys.executable, "-m", "edgeexport", "build", str(checkpoint), "--target", "android-ort"]
    command += ["--quant", "int4-b32", "--parity", "L1", "--quiet", "-o", str(out), "--calibrate-method", method]
    environment = {**os.environ, "EDGEEXPORT_CACHE_DIR": str(cache)}
    seconds, peak, at = 0.0, 0, [(0, 0.0)]
    began = time.perf_counter()

    def watched(end: Callable[[], bool]) -> bool:
        if (done := _done(cache)) > at[-1][0]:
            at.append((done, time.perf_counter() - began))
        return end()

    for end in ends:
        usage = measure(command, environment, quiet=True, interval=INTERVAL, enough=partial(watched, end))
        seconds, peak = seconds + usage.seconds, max(peak, usage.peak)
        if usage.code not in (0, -9):
            print(f"the build ended with exit code {usage.code}")
            return False
    most, room = LIMITS[method]
    how = f"killed {len(ends) - 1} times"
    if layers is not None:
        (first, start), (last, stop) = at[1], at[-1]
        rate = (stop - start) / max(1, last - first)
        seconds, how = rate * stages, f"ESTIMATED by {last - first} of {stages} stages, {rate:.1f} s each"
    print(f"{method:6} {seconds / 60:6.1f} min of {most / 60:.0f}, {peak / 1e9:5.2f} GB of {room / 1e9:.1f}; {how}")
    return seconds <= most and peak <= room


def _done(cache: Path) -> int:
    """Stages that are done, as the calibration files it."""
    for path in cache.glob("unfinished/calibrate/*/state.json"):
        try:
            return int(json.loads(path.read_text())["done"])
        except (OSError, ValueError):  # just being replaced
            return 0
    return 0


def _whole(cache: Path) -> bool:
    """Whether the integers are complete."""
    return any(not path.name.startswith(".") for path in cache.glob("steps/codes/*"))


if __name__ == "__main__":
    sys.exit(main())
