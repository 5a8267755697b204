"""What `make kills` does a thousand times, a few times."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

KILLS = Path(__file__).parent.parent / "benchmarks" / "kills.py"


def test_three_kills_leave_nothing_half(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(KILLS), "-k", "3", "--work", str(tmp_path / "kills")],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("3 kills") and done.stdout.endswith(": 0 problems\n")
