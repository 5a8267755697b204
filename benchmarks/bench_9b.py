"""Build a random 9B-parameter multimodal model (20.6 GB) and compare time, memory and bytes with what is asked.

    python benchmarks/bench_9b.py [--work build/bench-9b] [--target android-ort] [--ladder]

The checkpoint is written once and kept in the work folder; the build starts with an empty cache and with the checkpoint
out of the system's memory. `--ladder` also climbs the levels above L3, which run the artifact: that takes the memory
that the runtime needs to load it, and many minutes. Exits with 1 where a figure is beyond its limit.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peak_rss import Usage, measure
from random_checkpoint import PRESETS, write_checkpoint

PRESET = "autoglm-phone-9b"


@dataclass(frozen=True)
class Limits:
    """What a build with the ladder up to L3 may take; `seconds` None where nothing is asked."""

    scheme: str
    peak: float
    seconds: float | None = None
    over_ideal: float | None = None


TARGETS = {
    "android-mnn": Limits("int4-b32", 2.0e9),
    "android-ort": Limits("int4-b128", 1.5e9, 150),
    "android-tflite": Limits("int4-b32", 1.5e9, 150, 1.005),
    "ios-coreml": Limits("int4-b32", 2.0e9),
}
ABOVE_RUNTIME = 2e9
"""What the levels above may add to the memory that the runtime takes to load the decoder."""
PROBE_BYTES = 1 << 30
"""Read and written to find the disk's speed."""
BLOCK = 8 << 20
INTERVAL = 0.1
"""Seconds between looks at the build: what is measured has two cores, and the measuring should not take one."""

LOAD = """
import sys, onnxruntime
onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
"""


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, default=Path("build/bench-9b"))
    parser.add_argument("--checkpoint", type=Path, help="one that was written before")
    parser.add_argument("--target", choices=TARGETS, default="android-ort")
    parser.add_argument("--ladder", action="store_true", help="climb the levels above L3 too")
    parser.add_argument("--calibrate-method", choices=("none", "search", "gptq"), default="none")
    options = parser.parse_args()
    checkpoint: Path = options.checkpoint or options.work / PRESET
    if not (checkpoint / "tokenizer_config.json").exists():  # what is written last
        shutil.rmtree(checkpoint, ignore_errors=True)
        write_checkpoint(PRESETS[PRESET], checkpoint)
    limits = TARGETS[options.target]
    bundle = options.work / "out" / f"{checkpoint.name}-{options.target}"

    usage = _build(checkpoint, options, "L3")
    if usage.code:
        print(f"the build ended with exit code {usage.code}")
        return 1
    print(f"{options.target} {limits.scheme}, ladder up to L3")
    kept = [
        _say("seconds", usage.seconds, limits.seconds, ""),
        _say("peak RSS", usage.peak / 1e9, limits.peak / 1e9, "GB"),
    ]
    weights = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    sizes: dict[str, Any] = json.loads((bundle / "parity.json").read_bytes())["sizes"]
    load = os.getloadavg()[0]
    print(f"processor   {usage.cpu:8.1f} s of {os.cpu_count()} cores; the system's load is {load:.1f}")
    times = usage.read / weights
    print(f"read        {usage.read / 1e9:8.2f} GB, {times:.2f} times the checkpoint's {weights / 1e9:.2f}")
    print(f"from disk   {usage.fetched / 1e9:8.2f} GB, the rest was in the system's memory")
    print(f"written     {usage.written / 1e9:8.2f} GB")
    size, ideal = sizes["artifact_bytes"], sizes["ideal_bytes"]
    kept.append(_say("size over the ideal", size / ideal, limits.over_ideal, f"of {ideal / 1e9:.2f} GB"))
    reading, writing = _read_speed(checkpoint), _write_speed(options.work)
    floor = weights / reading + size / writing
    print(
        f"disk floor  {floor:8.1f} s: the checkpoint read once at {reading / 1e9:.2f} GB/s, the artifact written at "
        f"{writing / 1e9:.2f} GB/s"
    )
    if options.ladder:
        kept.append(_above(checkpoint, options, bundle))
    return 0 if all(kept) else 1


def _build(checkpoint: Path, options: argparse.Namespace, level: str) -> Usage:
    """A build from nothing."""
    cache, out = options.work / "cache", options.work / "out"
    for folder in (out, cache):
        shutil.rmtree(folder, ignore_errors=True)
    for path in checkpoint.glob("*.safetensors"):
        _forget(path)
    command = [sys.executable, "-m", "edgeexport", "build", str(checkpoint), "--target", options.target]
    command += ["--quant", TARGETS[options.target].scheme, "--parity", level, "--quiet", "-o", str(out)]
    command += ["--calibrate-method", options.calibrate_method]
    return measure(command, {**os.environ, "EDGEEXPORT_CACHE_DIR": str(cache.resolve())}, quiet=True, interval=INTERVAL)


def _above(checkpoint: Path, options: argparse.Namespace, bundle: Path) -> bool:
    """The levels above L3, beside what the runtime itself takes to load the decoder's file."""
    loading = measure([sys.executable, "-c", LOAD, str(bundle / "decoder.onnx")], quiet=True)
    print(f"runtime     {loading.peak / 1e9:8.2f} GB to load the decoder, {loading.seconds:.1f} s")
    usage = _build(checkpoint, options, "L5")
    print(f"L5          {usage.peak / 1e9:8.2f} GB, {usage.seconds:.1f} s, exit code {usage.code}")
    most = (loading.peak + ABOVE_RUNTIME) / 1e9
    return loading.code == usage.code == 0 and _say("peak RSS, whole ladder", usage.peak / 1e9, most, "GB")


def _say(what: str, found: float, most: float | None, unit: str) -> bool:
    asked = "" if most is None else f"; asked {most:.3f}: {'kept' if found <= most else 'MISSED'}"
    print(f"{what:<24} {f'{found:9.3f} {unit}'.rstrip()}{asked}")
    return most is None or found <= most


def _forget(path: Path) -> None:
    """Drop a file from the system's memory, so that reading it is reading the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _read_speed(checkpoint: Path) -> float:
    """Bytes a second from the disk, past the system's memory."""
    path = max(checkpoint.glob("*.safetensors"), key=lambda each: each.stat().st_size)
    total = min(PROBE_BYTES, path.stat().st_size // BLOCK * BLOCK)
    buffer = mmap.mmap(-1, BLOCK)  # O_DIRECT wants memory at a page's start
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        start = time.perf_counter()
        for offset in range(0, total, BLOCK):
            os.preadv(descriptor, [buffer], offset)
        return total / (time.perf_counter() - start)
    finally:
        os.close(descriptor)


def _write_speed(work: Path) -> float:
    """Bytes a second to the disk, with the sync at the end."""
    path, block = work / "speed", os.urandom(BLOCK)
    try:
        start = time.perf_counter()
        with path.open("wb", buffering=0) as file:
            for _ in range(PROBE_BYTES // BLOCK):
                file.write(block)
            os.fsync(file.fileno())
        return PROBE_BYTES / (time.perf_counter() - start)
    finally:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
