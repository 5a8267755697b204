"""android_runtime compiled for tests, and its parts that work without an engine asked through a tool."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from sharing import alone

from edgeexport import open_bundle
from edgeexport.bundle import device_report
from edgeexport.core import ParityResult

ROOT = Path(__file__).parent.parent
CPP = ROOT / "android_runtime" / "cpp"
SANITIZERS = {"asan": "address,undefined", "tsan": "thread"}
AARCH64 = (
    *("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"),
    *("-DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc", "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++"),
)


def programs(variant: str, targets: Sequence[str]) -> Path:
    """The folder of the compiled loader's programs. It lies in build/, where nothing is compiled twice."""
    needed = {"cmake": "cmake", "g++": "g++"}
    if variant == "aarch64":
        needed["aarch64-linux-gnu-g++"] = "g++-aarch64-linux-gnu"
    for tool, package in needed.items():
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}: apt-get install {package}")
    cross = AARCH64 if variant == "aarch64" else ()
    folder = ROOT / "build" / "android" / variant
    with alone(folder):
        run(["cmake", "-S", CPP, "-B", folder, f"-DEDGEEXPORT_SANITIZE={SANITIZERS.get(variant, '')}", *cross])
        run(["cmake", "--build", folder, "-j", "2", "--target", *targets])
    return folder


def libraries() -> dict[str, Path]:
    """The runtimes' shared libraries, out of their wheels."""
    import ai_edge_litert
    import onnxruntime

    (ort,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")
    return {"onnxruntime": ort, "litert": Path(next(iter(ai_edge_litert.__path__))) / "libLiteRt.so"}


def edgeexport_run(programs: Path, bundle: Path, packed: Path, *more: Any) -> list[str]:
    """The command; LiteRT's packed weights are kept in `packed`."""
    places = [part for name, path in libraries().items() for part in (f"--{name}", path)]
    command = [programs / "edgeexport-run", bundle, *places, "--cache", packed, "--threads", 2, *more]
    return [str(part) for part in command]


def answers(programs: Path, bundle: Path, packed: Path, prompts: Sequence[Sequence[int]], *more: Any) -> dict[str, Any]:
    """What edgeexport-run says of these prompts."""
    tokens = [part for prompt in prompts for part in ("--tokens", ",".join(map(str, prompt)))]
    found: dict[str, Any] = json.loads(run(edgeexport_run(programs, bundle, packed, *tokens, *more)))
    return found


def device_rows(programs: Path, bundle: Path, packed: Path, place: Path) -> list[ParityResult]:
    """The rows of the report that edgeexport-run writes, as Python judges them; the report goes to `place`."""
    place.write_text(run(edgeexport_run(programs, bundle, packed, "--report")))
    return device_report.judge(device_report.read(place), open_bundle(bundle), place)


def run(command: Sequence[Any]) -> str:
    """What a program prints. It must succeed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


class Parts:
    """The tool, under sanitizers, and a folder for the files that it is given and gives."""

    def __init__(self, folder: Path) -> None:
        self.program, self.folder = programs("asan", ["parts-tool"]) / "parts-tool", folder

    def ask(self, requests: Iterable[dict[str, Any]]) -> list[Any]:
        """One answer for each request, all of them in one process."""
        lines = "".join(json.dumps(request) + "\n" for request in requests)
        done = subprocess.run([self.program], input=lines.encode(), capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()[-4000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    def file(self, name: str, data: bytes) -> str:
        path = self.folder / name
        path.write_bytes(data)
        return str(path)
