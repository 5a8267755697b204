"""MNN's converter, in a process of its own: ONNX to MNN's graph, and that graph as JSON and back.

The wheel's command `mnnconvert` is never used: on import it installs packages and posts telemetry. The native entry
does neither. It reports success when it failed, so that only a file that is there counts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from edgeexport import errors
from edgeexport.backends.mnn_rewrite import Json, Placeholders, rewrite, unknown_ops

ALONE = "import ctypes; getattr(ctypes.CDLL(None), 'unshare', lambda flags: 0)(0x50000000)"
"""Leaves the computer's network for an empty one (CLONE_NEWUSER, CLONE_NEWNET), where the system lets a process do so.
The native entry opens no connection that we know of: this is a second lock."""
CONVERT = f"{ALONE}; import _tools, json, sys; [_tools.mnnconvert(['', *each]) for each in json.loads(sys.argv[1])]"
SECONDS = 600
"""A graph without weights takes a few; the converter is known to hang on some it does not understand."""
NOISE = ("The device supports", "Don't has bizCode", "Start to ", "inputTensors", "outputTensors", "Converted Success")


def convert(onnx: bytes, placeholders: Placeholders, component: str) -> bytes:
    """The `.mnn` file of an ONNX graph whose placeholders become MNN's own ops.

    Raises: LoweringError `mnn-conversion-failed` with what MNN said; ToolError `missing-package`.
    """
    with tempfile.TemporaryDirectory(prefix="edgeexport-mnn-") as name:
        folder = Path(name)
        (folder / "graph.onnx").write_bytes(onnx)
        to_mnn = ["-f", "ONNX", "--modelFile", "graph.onnx", "--MNNModel", "graph.mnn", "--allowCustomOp"]
        to_json = ["-f", "MNN", "--modelFile", "graph.mnn", "--JsonFile", "graph.json"]
        _run(folder, component, "graph.json", to_mnn, to_json)
        converted: Json = json.loads((folder / "graph.json").read_text())
        if unknown := unknown_ops(converted):
            raise errors.mnn_conversion_failed(component, f"no op of MNN's for {', '.join(unknown)}")
        (folder / "final.json").write_text(json.dumps(rewrite(converted, placeholders)))
        _run(folder, component, "final.mnn", ["-f", "JSON", "--modelFile", "final.json", "--MNNModel", "final.mnn"])
        return (folder / "final.mnn").read_bytes()


def _run(folder: Path, component: str, makes: str, *calls: list[str]) -> None:
    """Run the converter in `folder`, call by call; the last must make the file `makes`. HOME is the folder, where the
    converter may write a log."""
    environment = {"PATH": os.defpath, "HOME": str(folder), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            [sys.executable, "-c", CONVERT, json.dumps(calls)],
            cwd=folder, env=environment, capture_output=True, timeout=SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as problem:
        raise errors.mnn_conversion_failed(component, f"no result after {SECONDS} seconds") from problem
    made = folder / makes
    if done.returncode or not made.exists() or not made.stat().st_size:
        raise errors.mnn_conversion_failed(component, _message(done.stdout + done.stderr, done.returncode))


def _message(output: bytes, code: int) -> str:
    """What the converter said, without what it always says; its last lines."""
    lines = [line.strip() for line in output.decode("utf-8", "replace").splitlines()]
    said = [line for line in lines if line and not line.startswith(NOISE)]
    return " | ".join(said[-6:]) or f"no file, and nothing said (exit status {code})"
