"""Looks into ONNX files and engines, whoever wrote them, and finds the smallest part of a graph that fails: Polygraphy.

Polygraphy does the work; here a foreign file is checked first, and its answer becomes plain data.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgeexport import errors
from edgeexport.backends.foreign import foreign
from edgeexport.backends.tensorrt_engine import has_gpu
from edgeexport.backends.tensorrt_runner import LARGEST_DESCRIPTION, check_engine
from edgeexport.plainfile import read_plain

ONNX, ENGINE = ".onnx", ".engine"
LARGEST_GRAPH = (1 << 31) - 1
"""Bytes of a protobuf message; of a graph that is to be reduced, with its weights, since each part of it is one."""
NO_GPU = "what is inside an engine is read on an NVIDIA GPU; its header alone has been checked"
POLYGRAPHY = """
import os, sys
try:
    import tensorrt_rtx_bindings
    sys.modules.setdefault("tensorrt_rtx", tensorrt_rtx_bindings)
    os.environ.setdefault("POLYGRAPHY_USE_TENSORRT_RTX", "1")
except ImportError:
    pass
from polygraphy.tools import main
sys.exit(main())
"""
"""Polygraphy's command line, with the wheels of TensorRT-RTX under the name that it looks for."""


def describe_onnx(path: Path) -> dict[str, Any]:
    """Inputs, outputs, ops and weights of an ONNX file, in JSON's own types. No weight outside of it is read.

    Raises: BundleError `artifact-does-not-open`; ToolError `missing-package`.
    """
    with foreign(lambda problem: errors.artifact_does_not_open(str(path), "ONNX", problem)):
        return _described(path)


def _described(path: Path) -> dict[str, Any]:
    model = _load(path)
    from polygraphy.backend.onnx import util

    counts = Counter(node.op_type for node in model.graph.node)
    stored = list(model.graph.initializer)
    return {
        "path": str(path),
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "opsets": {each.domain or "ai.onnx": each.version for each in model.opset_import},
        "bytes": path.stat().st_size,
        "inputs": _tensors(util.get_input_metadata(model.graph)),
        "outputs": _tensors(util.get_output_metadata(model.graph)),
        "nodes": util.get_num_nodes(model),
        "ops": ", ".join(f"{op} {count}" for op, count in counts.most_common()),
        "initializers": len(stored),
        "weight_files": [
            {"file": name, "bytes": size, "problem": problem}
            for name, (size, problem) in sorted(_weight_files(path, stored).items())
        ],
    }


def describe_engine(path: Path) -> dict[str, Any]:
    """What can be said of an engine: its size, what its build wrote beside it, and, where a GPU is, Polygraphy's view.

    Raises: BundleError `artifact-does-not-open`; ToolError `missing-package`.
    """
    if not path.is_file():
        raise errors.artifact_does_not_open(str(path), "TensorRT-RTX", "there is no such file")
    check_engine(path)
    document: dict[str, Any] = {"path": str(path), "bytes": path.stat().st_size}
    beside = path.with_name(f"{path.name}.json")
    if beside.is_file():
        document |= {"written_by_its_build": _description(beside)}
    if not has_gpu():
        return document | {"note": NO_GPU}
    _installed()
    done = _polygraphy("inspect", "model", str(path), "--model-type", "engine", "--show", "layers")
    if done.returncode:
        raise errors.artifact_does_not_open(str(path), "TensorRT", _said(done))
    return document | {"engine": done.stdout.splitlines()}


def reduce(path: Path, out: Path, check: str, shapes: Sequence[str] = ()) -> dict[str, Any]:
    """Write the smallest part of a graph for which a command still fails to `out`; returns what it is.

    `check` is a command line in which `{}` stands for the ONNX file to try; it fails by any exit code but 0. Empty: the
    comparison of ONNX Runtime with TensorRT, which needs a GPU. `shapes` gives inputs of a free size one, as
    `input_ids:[1,4]`.

    Raises: BundleError `artifact-does-not-open`; UsageError `nothing-to-reduce`, `check-does-not-run`,
    `output-not-writable`; ToolError `missing-package`, `reduction-failed`.
    """
    model = _load(path)
    files = _weight_files(path, model.graph.initializer)
    if wrong := next((f"{name}: {problem}" for name, (_, problem) in files.items() if problem), ""):
        raise errors.artifact_does_not_open(str(path), "ONNX", wrong)
    if (total := path.stat().st_size + sum(size for size, _ in files.values())) > LARGEST_GRAPH:
        raise errors.reduction_failed(path, f"graph and weights have {total} bytes, and 2 GiB are the most")
    if not check and not has_gpu():
        raise errors.check_does_not_run("", "ONNX Runtime and TensorRT can be compared on an NVIDIA GPU alone")
    command = shlex.split(check) if check else [sys.executable, "-c", POLYGRAPHY, "run", "{}", "--onnxrt", "--trt"]
    _must_fail(path, check, command)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        part, made = work / "part.onnx", work / "reduced.onnx"
        asked = ["--iter-artifact", str(part), "--save-debug-replay", str(work / "replay.json"), "-o", str(made)]
        asked += ["--external-data-dir", str(path.resolve().parent)]
        asked += ["--model-input-shapes", *shapes] if shapes else []
        check_part = [each.replace("{}", str(part)) for each in command]
        done = _polygraphy("debug", "reduce", str(path), *asked, "--check", *check_part)
        if done.returncode or not made.exists():
            raise errors.reduction_failed(path, _said(done))
        found = {"of": str(path), "of_nodes": len(model.graph.node), **describe_onnx(made), "path": str(out)}
        try:
            out.write_bytes(made.read_bytes())
        except OSError as problem:
            raise errors.output_not_writable(out.parent, str(problem)) from problem
    return found


def _must_fail(path: Path, check: str, command: Sequence[str]) -> None:
    """Polygraphy gives the whole graph back, without a word, where nothing fails.

    Raises: UsageError `nothing-to-reduce`, `check-does-not-run`.
    """
    if not any("{}" in each for each in command):
        raise errors.check_does_not_run(check, "it has no {} where the ONNX file's path would go")
    try:
        done = subprocess.run([each.replace("{}", str(path)) for each in command], capture_output=True, check=False)
    except OSError as problem:
        raise errors.check_does_not_run(check, str(problem)) from problem
    if done.returncode == 0:
        raise errors.nothing_to_reduce(path)


def _load(path: Path) -> Any:
    """An ONNX file without the weights outside of it. Raises: as `describe_onnx`."""
    _installed()
    from google.protobuf.message import DecodeError
    from polygraphy.backend.onnx import OnnxFromPath
    from polygraphy.logger import G_LOGGER

    if not path.is_file():
        raise errors.artifact_does_not_open(str(path), "ONNX", "there is no such file")
    if path.stat().st_size > LARGEST_GRAPH:
        raise errors.artifact_does_not_open(
            str(path), "ONNX", f"it has {path.stat().st_size} bytes; 2 GiB are the most"
        )
    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
            model = OnnxFromPath(str(path), ignore_external_data=True)()
    except DecodeError as problem:
        raise errors.artifact_does_not_open(str(path), "ONNX", str(problem)) from problem
    if not model.graph.node:
        raise errors.artifact_does_not_open(str(path), "ONNX", "it holds no graph")
    return model


def _weight_files(path: Path, initializers: Sequence[Any]) -> dict[str, tuple[int, str]]:
    """Files of weights by the name that the graph has for each: bytes, and what is wrong with what the graph says."""
    folder, found = path.resolve().parent, {}
    for tensor in initializers:
        given = {each.key: each.value for each in tensor.external_data}
        if not given:
            continue
        name = given.get("location", "")
        try:
            file = (folder / name).resolve()
            file.is_file()
        except (OSError, ValueError, RuntimeError) as problem:  # too long, a NUL, a loop of links
            found[name] = (0, f"its name is none: {problem}"[:200])
            continue
        if not file.is_relative_to(folder) or not name:
            found[name] = (0, "it is outside of the graph's folder")
        elif not file.is_file():
            found[name] = (0, "there is no such file")
        else:
            numbers = [given.get("offset", "0"), given.get("length", "0")]
            size = file.stat().st_size
            fits = all(text.isdecimal() and len(text) < 20 for text in numbers) and sum(map(int, numbers)) <= size
            before = found.get(name, (0, ""))[1]
            found[name] = (size, before or ("" if fits else f"{tensor.name} lies outside of its {size} bytes"))
    return found


def _tensors(metadata: Any) -> list[dict[str, Any]]:
    return [
        {"name": name, "dtype": str(each.dtype), "shape": "x".join(map(str, each.shape or ())) or "scalar"}
        for name, each in metadata.items()
    ]


def _description(beside: Path) -> dict[str, Any]:
    """Raises: BundleError `artifact-does-not-open` where it is no JSON object of a sane size."""
    with foreign(lambda problem: errors.artifact_does_not_open(str(beside), "JSON", problem)):
        held = json.loads(read_plain(beside, LARGEST_DESCRIPTION, follow=True))
        if not isinstance(held, dict):
            raise ValueError("it holds no object")
        return held


def _installed() -> None:
    """Raises: ToolError `missing-package`."""
    for module, package, extra in (("onnx", "onnx", "build"), ("polygraphy", "polygraphy", "tensorrt")):
        try:
            __import__(module)
        except ImportError as problem:
            raise errors.missing_package(package, extra) from problem


def _polygraphy(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Its command line, in a process of its own: a foreign engine may end that one."""
    command = [sys.executable, "-P", "-c", POLYGRAPHY, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, errors="replace")


def _said(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith(("[!]", "[E]"))] or lines[-1:]
    return " ".join(told[:3]) if told else f"it ended with code {done.returncode}"
