"""Build a random 1.1B-parameter Llama (2.2 GB) and compare time and peak memory with what is asked.

    python benchmarks/bench_1b.py [--work build/bench-1b] [--target android-ort]

An engine (rtx-trt) is built in float16, other targets in int4-b32.

The checkpoint is written once and kept in the work folder. Each build starts with an empty cache. Exits with 1 where a
figure is beyond its limit.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from peak_rss import measure
from random_checkpoint import PRESETS, write_checkpoint

PRESET = "llama-1.1b"


@dataclass(frozen=True)
class Case:
    """A build with its limits in bytes and seconds; None where nothing is asked."""

    level: str
    title: str
    bytes: float | None
    seconds: float | None


CASES = (
    # onnxruntime-genai 0.18's builder: 38.3 s and 8.12 GB, int4, 2 cores; at most half its time is asked
    Case("L1", "without the ladder", None, 38.3 / 2),
    Case("L3", "ladder up to L3", 1.0e9, None),
    Case("L5", "whole ladder", 2.5e9, None),
)
FLOAT16_BYTES = 2 * 1_100_048_384
ENGINE_CASES = (
    Case("L1", "without the ladder", 3.0 * FLOAT16_BYTES, None),
    Case("L5", "whole ladder", None, None),  # ONNX Runtime, standing in for the engine, holds float32 weights
)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, default=Path("build/bench-1b"))
    parser.add_argument("--target", default="android-ort")
    parser.add_argument("--level", choices=[case.level for case in CASES], help="only this one")
    options = parser.parse_args()
    checkpoint = options.work / PRESET
    if not (checkpoint / "tokenizer_config.json").exists():  # what is written last
        shutil.rmtree(checkpoint, ignore_errors=True)
        write_checkpoint(PRESETS[PRESET], checkpoint)
    missed = 0
    cases, quant = (ENGINE_CASES, "fp16") if options.target == "rtx-trt" else (CASES, "int4-b32")
    print(f"{'build':<20} {'seconds':>8} {'asked':>8} {'peak GB':>8} {'asked':>8}  verdict")
    for case in cases:
        if options.level in {None, case.level}:
            missed += not _run(case, quant, checkpoint, options)
    return 1 if missed else 0


def _run(case: Case, quant: str, checkpoint: Path, options: argparse.Namespace) -> bool:
    out, cache = options.work / "out", options.work / "cache"
    for folder in (out, cache):
        shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "edgeexport", "build", str(checkpoint), "--target", options.target]
    command += ["--quant", quant, "--parity", case.level, "--quiet", "-o", str(out)]
    command += ["--calibrate-method", "none"]  # random weights; bench_9b --calibrate-method measures calibrations
    usage = measure(command, {**os.environ, "EDGEEXPORT_CACHE_DIR": str(cache.resolve())}, quiet=True)
    kept = (
        usage.code == 0
        and (case.seconds is None or usage.seconds <= case.seconds)
        and (case.bytes is None or usage.peak <= case.bytes)
    )
    seconds = f"{case.seconds:.1f}" if case.seconds else "–"
    size = f"{case.bytes / 1e9:.2f}" if case.bytes else "–"
    verdict = "kept" if kept else f"exit code {usage.code}" if usage.code else "MISSED"
    print(f"{case.title:<20} {usage.seconds:>8.1f} {seconds:>8} {usage.peak / 1e9:>8.2f} {size:>8}  {verdict}")
    return kept


if __name__ == "__main__":
    sys.exit(main())
