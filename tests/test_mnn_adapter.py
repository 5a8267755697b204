"""The C++ engine of android_runtime/mnn, compiled and run in the library of MNN's Python package."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from factories import with_tokenizer
from graphs import write_checkpoint
from test_glm4v import CASES, checkpoint_of
from test_mnn_glm4v import target_of

from edgeexport import build, families

ROOT = Path(__file__).parent.parent
ADAPTER, CORE = ROOT / "android_runtime" / "mnn", ROOT / "android_runtime" / "cpp"
OURS = Path(__file__).parent / "mnn_adapter"
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Werror"]
OLD_STRINGS = "-D_GLIBCXX_USE_CXX11_ABI=0"
"""The package is built with C++ strings as they were before GCC 5."""

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++: apt-get install g++"),
    pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="Linux on x86-64 alone"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("adapter") / "adapter.so"
    sources = [OURS / "driver.cpp", ADAPTER / "mnn_engine.cpp"]
    sources += [CORE / "src" / f"{name}.cpp" for name in ("bundle", "interface", "manifest", "json", "sha256")]
    folders = [f"-I{folder}" for folder in (ADAPTER, CORE / "include", CORE / "src")] + ["-isystem", str(OURS)]
    subprocess.run(
        ["g++", *FLAGS, OLD_STRINGS, "-O1", "-shared", "-fPIC", *folders, *map(str, sources), "-o", str(made)],
        check=True, timeout=300,
    )  # fmt: skip
    return made


def compared(library: Path, bundle: Path) -> dict[str, float]:
    """How far the adapter's outputs are from the runner's, by component."""
    command = [sys.executable, str(OURS / "compare.py"), str(library), str(bundle)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_model_of_text(library: Path, tmp_path: Path) -> None:
    model = with_tokenizer(write_checkpoint(tmp_path / "model", families.find("llama").tiny, "float16"))
    made = build(str(model), "android-mnn", tmp_path / "out", quant="int8", context=64, parity="L1")
    assert compared(library, made.bundle) == {"decoder": 0}


def test_a_model_that_sees(library: Path, tmp_path: Path) -> None:
    case = CASES["plain"]
    model = checkpoint_of(case, tmp_path / "model")
    made = build(str(model), str(target_of(case, tmp_path)), tmp_path / "out", parity="L1")
    found = compared(library, made.bundle)
    assert found.keys() == {"decoder", "embed", "vision 4x6", "vision 6x4"}
    assert max(found.values()) <= 1e-5
