"""TensorRT-RTX ahead of time: the canonical graph to a strongly typed ONNX file, and that file to an engine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgeexport import errors
from edgeexport.backends import tensorrt_engine
from edgeexport.backends.onnxruntime_runner import STEP
from edgeexport.backends.tensorrt_ops import OPS
from edgeexport.backends.tensorrt_plan import bounded, graph_plan, in_float8, refusals
from edgeexport.backends.tensorrt_runner import TENSORRT_NAMES, fits
from edgeexport.backends.tools import versions_of
from edgeexport.core import (
    Artifact,
    CanonicalModel,
    Finding,
    Progress,
    QuantPlan,
    Signature,
    Target,
    TensorSpec,
    Traits,
    WeightSource,
    no_progress,
)

NAME = "tensorrt"
PACKAGES = ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu13-libs")
MODULE = "tensorrt_rtx_bindings"
"""What those packages are imported as."""
CAPABILITIES = (75, 80, 86, 89, 120, 121)
"""Compute capabilities that TensorRT-RTX 1.7 builds for."""
FLOAT8_SINCE = 89
"""The first compute capability that multiplies float8."""
__all__ = ["NAME", "OPS", "OPTIONS", "TRAITS", "check", "compile", "versions"]


@dataclass(frozen=True)
class Options:
    """[options] of a target for this backend."""

    sm: str = "80 86 89 120"
    """Compute capabilities, times ten, that the engine is built for. 75 gets a file of its own."""
    prefill: int = 1024
    """Tokens that one call takes at most: longer prompts go in pieces."""

    def __post_init__(self) -> None:
        if self.prefill < 1:
            raise ValueError("prefill is a number of tokens, 1 or more")
        words = self.sm.split()
        unknown = [word for word in words if word not in map(str, CAPABILITIES)]
        if unknown or not words or len(set(words)) != len(words):
            raise ValueError(f"sm is {self.sm!r}: some of {', '.join(map(str, CAPABILITIES))} are needed")

    @property
    def capabilities(self) -> list[int]:
        """As numbers."""
        return [int(word) for word in self.sm.split()]


OPTIONS = Options
TRAITS = Traits(
    schemes=("fp8",),
    positive_scales=True,
    shifts=("int8",),
    least_block=32,
    widens=1 << 62,
    compiler=2.5,  # 2.2: see docs/tensorrt.md
)


def versions() -> dict[str, str]:
    """Versions of the tools that shape the artifact's bytes. Raises: ToolError `missing-package`."""
    return versions_of("tensorrt", PACKAGES[0], "onnx", "onnx-ir")


def check(model: CanonicalModel, target: Target, plan: QuantPlan) -> list[Finding]:
    """Every node and weight that TensorRT would refuse, unpack or get wrong, all at once. Pure; no SDK."""
    found = OPS.check(model.graph.graph) + refusals(model, target, plan, NAME)
    capabilities = Options(**target.options).capabilities
    packed = [name for name in model.weights if plan.formats[name].integer and plan.formats[name].bits == 4]
    if packed and tensorrt_engine.APART in capabilities:
        why = "GPUs of compute capability 7.5 multiply by no int4"
        fix = "take 75 out of sm in the target file, or choose --quant int8 or fp16"
        found.append(errors.op_not_lowered(NAME, "DequantizeLinear", packed[0], why, fix))
    floats, without = in_float8(model, plan), [number for number in capabilities if number < FLOAT8_SINCE]
    if floats and without:
        why = f"GPUs of compute capability {', '.join(f'{k // 10}.{k % 10}' for k in without)} have no float8"
        able = " ".join(str(number) for number in CAPABILITIES if number >= FLOAT8_SINCE)
        fix = f"set sm to some of {able} in a copy of the target file, or choose --quant int8"
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
    """Write each variant's ONNX file, one file of weights, and the engines with what they say of themselves.

    Raises: ToolError `missing-package`; LoweringError `engine-not-built` with TensorRT's words; UsageError
    `output-not-writable`; CheckpointError for weights that cannot be stored.
    """
    from edgeexport.backends.tensorrt_lowering import write

    tools, options = versions(), Options(**target.options)
    layout = write(models, plan, source, work, OPS, fused=True, progress=progress)
    graphs = [graph_plan(model, options.prefill, options.capabilities, fused=True) for model in models]
    component = models[0].component
    described = {one["graph"]: one for one in build_engines({"graphs": graphs}, work, component)}
    files = [graph["graph"] for graph in graphs] + ([layout.file] if layout.size else [])
    engines = [one["file"] for graph in graphs for one in graph["engines"]]
    return Artifact(
        component=component,
        backend=NAME,
        files=(*files, *engines, *(f"{name}.json" for name in engines), f"{component}.build_plan.json"),
        signatures=tuple(
            _signature(model, graph["engines"][0]["file"], described[graph["graph"]], options.prefill)
            for model, graph in zip(models, graphs, strict=True)
        ),
        state=models[0].state,
        weights=layout.weights,
        tools=tools,
        findings=(errors.engine_not_run(component, options.sm),) if models[0].state else (),
    )


def build_engines(plan: Mapping[str, Any], work: Path, component: str) -> list[dict[str, Any]]:
    """The engines of a build plan, in a process of its own, whose memory goes with it; what each network says of
    itself. Raises: LoweringError `engine-not-built`."""
    file = work / f"{component}.build_plan.json"
    file.write_text(json.dumps(plan, indent=1, sort_keys=True) + "\n")
    command = [sys.executable, "-P", tensorrt_engine.__file__, str(file), "--module", MODULE]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=work)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise errors.engine_not_built(component, said[-1] if said else f"it ended with code {done.returncode}")
    return [
        json.loads((work / f"{one['file']}.json").read_bytes()) for graph in plan["graphs"] for one in graph["engines"]
    ]


def _signature(model: CanonicalModel, file: str, described: Mapping[str, Any], tokens: int) -> Signature:
    """The engine's interface by the network's own words: its names and dtypes, and sizes that are those promised.

    Raises: LoweringError `engine-not-built` where the network has another interface than the graph it was parsed from.
    """
    inputs, outputs = (
        tuple(_spec(spec, described[side], tokens, model.component) for spec in specs)
        for side, specs in (("inputs", model.inputs), ("outputs", model.outputs))
    )
    if len(described["inputs"]) + len(described["outputs"]) != len(inputs) + len(outputs):
        raise errors.engine_not_built(model.component, "the network has inputs or outputs that the graph has not")
    return Signature(model.variant or STEP, inputs, outputs, file)


def _spec(spec: TensorSpec, described: Sequence[Mapping[str, Any]], tokens: int, component: str) -> TensorSpec:
    found = next((each for each in described if each["name"] == spec.name), None)
    promised = bounded(spec, tokens)
    if found is None or not fits(found["shape"], promised):
        raise errors.engine_not_built(component, f"the network's {spec.name} is not the graph's")
    return replace(promised, dtype=TENSORRT_NAMES.get(found["dtype"], found["dtype"]))
