"""Real models as MNN-LLM's directories: the ladder, and the engine's own answer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edgeexport.cli_edge import execute

pytestmark = pytest.mark.real
ASK = """
import sys
import _mnncengine.llm as engine
llm = engine.create(sys.argv[1], False)
llm.set_config('{"max_new_tokens": 24}')
assert llm.load()
print(llm.response("What is the capital of France?", False))
"""


def answer(config: Path) -> str:
    """What MNN-LLM, told no more than this file, answers."""
    command = [sys.executable, "-c", ASK, str(config)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_smollm2_climbs_the_ladder_and_mnn_answers_by_itself(tmp_path: Path) -> None:
    build = ["build", "smollm2-135m", "--target", "android-mnn", "--context", "512", "-o", str(tmp_path)]
    assert execute(build) == 0
    assert "Paris" in answer(tmp_path / "smollm2-135m-android-mnn" / "config.json")


def test_mini_climbs_the_ladder_with_pictures_and_sound_and_mnn_answers_text_by_itself(tmp_path: Path) -> None:
    build = ["build", "autoglm-phone-mini", "--target", "android-mnn", "--context", "512", "-o", str(tmp_path)]
    assert execute(build) == 0
    assert "Paris" in answer(tmp_path / "autoglm-phone-mini-android-mnn" / "config.json")
