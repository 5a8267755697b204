"""TensorRT on the device: ONNX files in a dialect that its version takes, and one Python file that builds and measures.

An engine of TensorRT itself is made for the GPU that is present, and no other machine can make one for a Jetson.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeexport import errors
from edgeexport.backends.onnxruntime_runner import STEP
from edgeexport.backends.optable import OpTable
from edgeexport.backends.tensorrt_ops import OPS as RTX
from edgeexport.backends.tensorrt_plan import (
    FLOAT8_FLOOR,
    FUSED_FLOOR,
    bounded,
    graph_plan,
    in_float8,
    refusals,
    version_of,
)
from edgeexport.backends.tools import versions_of
from edgeexport.core import (
    Artifact,
    CanonicalModel,
    Finding,
    Progress,
    QuantPlan,
    Signature,
    Target,
    Traits,
    WeightSource,
    no_progress,
)

NAME = "tensorrt-kit"
BUILDER = "engine_builder.pyz"
"""The one file that the device runs: `python3 engine_builder.pyz build`."""
MAIN = """import sys

import tensorrt_device
import tensorrt_engine

COMMANDS = {"build": tensorrt_engine.main, "parity": tensorrt_device.main}
if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
    sys.exit("usage: python3 engine_builder.pyz build | parity")
COMMANDS[sys.argv[1]](sys.argv[2:])
"""
OPS = OpTable(NAME)
OPS.include(RTX)
__all__ = ["NAME", "OPS", "OPTIONS", "TRAITS", "check", "compile", "versions"]


@dataclass(frozen=True)
class Options:
    """[options] of a target for this backend."""

    floor: str = "10.3"
    """The oldest TensorRT that builds. Below 10.15, the graphs are of primitives: it has no fused cache."""
    prefill: int = 512
    """Tokens that one call takes at most: longer prompts go in pieces."""

    def __post_init__(self) -> None:
        if version_of(self.floor) < (10, 0):
            raise ValueError(f"floor is {self.floor}: int64 inputs and int4 weights came with TensorRT 10.0")
        if self.prefill < 1:
            raise ValueError("prefill is a number of tokens, 1 or more")

    @property
    def fused(self) -> bool:
        """Whether every TensorRT from the floor on has the fused ops."""
        return version_of(self.floor) >= FUSED_FLOOR


OPTIONS = Options


def versions() -> dict[str, str]:
    """Versions of the tools that shape the artifact's bytes. No TensorRT is among them."""
    return versions_of("build", "onnx", "onnx-ir")


def check(model: CanonicalModel, target: Target, plan: QuantPlan) -> list[Finding]:
    """Every node and weight that TensorRT would refuse, unpack or get wrong, all at once. Pure; no SDK."""
    found = OPS.check(model.graph.graph) + refusals(model, target, plan, NAME)
    floats = in_float8(model, plan)
    if floats and version_of(Options(**target.options).floor) < FLOAT8_FLOOR:
        why = "TensorRT before 10.13 is for boards whose GPU has no float8 (Orin, 8.7)"
        fix = 'for Thor set floor = "10.13" in a copy of the target file, or choose --quant int8'
        found.append(errors.op_not_lowered(NAME, "DequantizeLinear", floats[0], why, fix))
    return found


def compile(
    models: Sequence[CanonicalModel],
    target: Target,
    plan: QuantPlan,
    source: WeightSource,
    work: Path,
    progress: Progress = no_progress,
) -> Artifact:
    """Write each variant's ONNX file, one file of weights, and the plan by which the device builds.

    Raises: UsageError `output-not-writable`; CheckpointError for weights that cannot be stored.
    """
    from edgeexport.backends.tensorrt_lowering import write

    options, component = Options(**target.options), models[0].component
    layout = write(models, plan, source, work, OPS, fused=options.fused, progress=progress)
    graphs = [graph_plan(model, options.prefill, [], fused=options.fused) for model in models]
    plan_file = f"{component}.build_plan.json"
    commands = [trtexec(graph, fused=options.fused) for graph in graphs]
    document = {"floor": options.floor, "graphs": graphs, "trtexec": commands}
    (work / plan_file).write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    files = [graph["graph"] for graph in graphs]
    return Artifact(
        component=component,
        backend=NAME,
        files=(*files, *([layout.file] if layout.size else []), plan_file),
        signatures=tuple(
            Signature(
                model.variant or STEP,
                tuple(bounded(spec, options.prefill) for spec in model.inputs),
                tuple(bounded(spec, options.prefill) for spec in model.outputs),
                file,
            )
            for model, file in zip(models, files, strict=True)
        ),
        state=models[0].state,
        weights=layout.weights,
        tools=versions(),
        findings=(errors.engine_to_build(component, BUILDER),) if models[0].state else (),
    )


def trtexec(graph: Mapping[str, Any], *, fused: bool) -> str:
    """The command that builds the same engine of a graph of primitives. trtexec cannot repair a parsed attention, so
    that there is none for a fused graph."""
    if fused and graph["lengths"] is not None:
        return ""
    words = [f"--onnx={graph['graph']}", f"--saveEngine={graph['engines'][0]['file']}", "--stronglyTyped"]
    for k, option in enumerate(("minShapes", "optShapes", "maxShapes")):
        shapes = [f"{name}:{'x'.join(map(str, bounds[k]))}" for name, bounds in graph["profile"].items()]
        words += [f"--{option}={','.join(shapes)}"] if shapes else []
    return " ".join(["trtexec", *words, "--timingCacheFile=timing.cache"])


def write_package(
    target: Target,
    artifact: Artifact,
    folder: Path,
    tokenizer_files: Mapping[str, bytes],
    stop_ids: Sequence[int],
    context: int,
    out: Path,
) -> Path:
    """The builder for the device: the very code that builds engines here, and a step that measures them there."""
    from edgeexport.backends import tensorrt_device, tensorrt_engine

    path = out / BUILDER
    with zipfile.ZipFile(path, "w") as archive:
        for module in (tensorrt_device, tensorrt_engine):
            source = Path(str(module.__file__))
            archive.writestr(zipfile.ZipInfo(source.name), source.read_bytes())
        archive.writestr(zipfile.ZipInfo("__main__.py"), MAIN)
    return path


TRAITS = Traits(
    schemes=("fp8",), positive_scales=True, shifts=("int8",), least_block=32, widens=1 << 62, package=write_package
)
