"""The native loader's readers of untrusted files under AddressSanitizer and UBSan: 20,000 changed inputs of each.

`make fuzz-native` runs the same readers under libFuzzer, which needs clang; this needs what the other native tests do.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from native import programs, run

INPUTS = 20_000
TARGETS = (
    *("json", "manifest", "safetensors", "tflite", "media"),
    *("preprocess", "tokenizer", "chat", "cache", "sampling"),
)


@pytest.fixture(scope="module")
def driver() -> Path:
    return programs("asan", ["fuzz-driver"]) / "fuzz-driver"


def test_every_target_is_run(driver: Path) -> None:
    assert run([driver]).split() == list(TARGETS)


@pytest.mark.parametrize("target", TARGETS)
def test_every_input_is_read_or_refused(target: str, driver: Path) -> None:
    """No crash, nothing undefined, nothing thrown but an error with a code, no gigabyte asked for at once."""
    environment = {**os.environ, "ASAN_OPTIONS": "max_allocation_size_mb=1024"}
    done = subprocess.run(
        [driver, target, str(INPUTS)], env=environment, capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == f"{target}: {INPUTS} inputs were read or refused\n"
