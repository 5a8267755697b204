"""SmolLM2 as MNN-LLM's directory: the ladder, and the engine's own answer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edgeexport.cli import execute

pytestmark = pytest.mark.real
ASK = """
import sys
import _mnncengine.llm as engine
llm = engine.create(sys.argv[1], False)
assert llm.load()
print(llm.response("What is the capital of France?", False))
"""


def test_smollm2_climbs_the_ladder_and_mnn_answers_by_itself(tmp_path: Path) -> None:
    build = ["build", "smollm2-135m", "--target", "android-mnn", "--context", "512", "-o", str(tmp_path)]
    assert execute(build) == 0
    config = tmp_path / "smollm2-135m-android-mnn" / "config.json"
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(config)], capture_output=True, text=True, check=True, timeout=120
    )
    assert "Paris" in done.stdout
