"""The build plan: what a TensorRT builder must know of each ONNX graph, as JSON. Pure; needs no SDK."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from edgeexport import errors
from edgeexport.backends.onnx_file import stem_of
from edgeexport.backends.tensorrt_engine import groups
from edgeexport.canonical.dialect import MULTIPLIED
from edgeexport.core import CanonicalModel, Dim, Finding, QuantPlan, Target, TensorSpec

FUSED_FLOOR = (10, 15)
"""The first TensorRT that has IAttention, IRotaryEmbeddingLayer and IKVCacheUpdateLayer."""
FLOAT8_FLOOR = (10, 13)
"""JetPack 7's TensorRT, the first for a board whose GPU has float8: Thor."""
TOKENS = "T"
"""What every family calls the number of a call's tokens."""
USUAL = 32
"""Tokens of a prompt that kernels are chosen for, where a range is given."""
INT4_BLOCKS = (32, 64, 128)
"""Weights that may share a scale: what builds."""

FIX_PRECISION = 'set precision = "float16" in the target file'
FIX_FORMAT = "choose --quant int4-b128, int8 or fp16"


def version_of(text: str) -> tuple[int, int]:
    """(major, minor) of "10.15". Raises ValueError."""
    if not re.fullmatch(r"\d{1,3}\.\d{1,3}", text):
        raise ValueError(f"{text!r} is no version such as 10.15")
    major, minor = text.split(".")
    return int(major), int(minor)


def bounded(spec: TensorSpec, tokens: int) -> TensorSpec:
    """The same value with at most `tokens` of a prompt at once."""
    shape = tuple(
        replace(size, max=min(size.max, tokens)) if isinstance(size, Dim) and size.name == TOKENS else size
        for size in spec.shape
    )
    return replace(spec, shape=shape)


def graph_plan(model: CanonicalModel, tokens: int, capabilities: Sequence[int], *, fused: bool) -> dict[str, Any]:
    """The plan of one graph: see tensorrt_engine.build. A graph takes at most `tokens` at once. `in_place`: a cache
    must be updated in one buffer, and not from one to another, which a graph of primitives needs."""
    stem, names = stem_of(model), {spec.name for spec in model.inputs}
    fed = "input_ids" if "input_ids" in names else "inputs_embeds"
    return {
        "graph": f"{stem}.onnx",
        "weights": f"{model.component}.onnx.data" if model.weights else "",
        "engines": [
            {"file": engine_file(stem, group), "capabilities": group} for group in groups(capabilities) or [[]]
        ],
        "profile": {
            spec.name: _range(bounded(spec, tokens))
            for spec in model.inputs
            if any(isinstance(size, Dim) for size in spec.shape)
        },
        "lengths": {"fed": fed, "position": "position"} if model.state else None,
        "in_place": fused,
        "state": [list(pair) for pair in model.state],
    }


def engine_file(stem: str, group: Sequence[int]) -> str:
    """The engine of these compute capabilities; the one of SM75 has it in its name."""
    return f"{stem}.sm75.engine" if list(group) == [75] else f"{stem}.engine"


def _range(spec: TensorSpec) -> list[list[int]]:
    """Least, usual and largest shape."""
    bounds = [
        (size.min, min(USUAL, size.max), size.max) if isinstance(size, Dim) else (size,) * 3 for size in spec.shape
    ]
    return [list(shape) for shape in zip(*bounds, strict=True)]


def refusals(model: CanonicalModel, target: Target, plan: QuantPlan, backend: str) -> list[Finding]:
    """What TensorRT would refuse or unpack: precision and weights' formats. Each names what has it."""
    found = []
    if target.precision != "float16":
        why = "its attention computes in float16: in float32 it falls apart into single ops"
        found.append(errors.op_not_lowered(backend, "Attention", f"precision of {target.name}", why, FIX_PRECISION))
    reasons: Mapping[str, tuple[str, list[str]]] = _weight_reasons(model, plan)
    for format_name, (why, names) in reasons.items():
        where = f"{names[0]} and {len(names) - 1} more in {format_name}" if len(names) > 1 else names[0]
        found.append(errors.op_not_lowered(backend, "DequantizeLinear", where, why, FIX_FORMAT))
    return found


def in_float8(model: CanonicalModel, plan: QuantPlan) -> list[str]:
    """The weights whose format is a float8."""
    return [name for name in model.weights if plan.formats[name].float8]


def _weight_reasons(model: CanonicalModel, plan: QuantPlan) -> dict[str, tuple[str, list[str]]]:
    found: dict[str, tuple[str, list[str]]] = {}
    for name in model.weights:
        fmt = plan.formats[name]
        why = ""
        if fmt.palette:
            why = "it has no palettes"
        elif fmt.integer and fmt.bits == 8 and fmt.block:
            why = "it unpacks blocks of int8 into float16"
        elif fmt.integer and fmt.bits == 4 and fmt.block not in INT4_BLOCKS:
            why = f"int4 needs one scale for each {', '.join(map(str, INT4_BLOCKS))} weights"
        elif fmt.shift and (fmt.shift != "int8" or plan.classes[name] not in MULTIPLIED):
            why = "its blocks of int4 have no zero points, and int8 offsets where they are multiplied by alone"
        if why:
            found.setdefault(fmt.name, (why, []))[1].append(name)
    return found
