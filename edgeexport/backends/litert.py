"""LiteRT (TensorFlow Lite): the canonical graph to one `.tflite`, its signatures over the same weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeexport import errors
from edgeexport.backends.litert_names import DECODE, PREFILL, STEP, given_name
from edgeexport.backends.litert_ops import OPS
from edgeexport.core import (
    Artifact,
    CanonicalModel,
    Dim,
    Finding,
    Format,
    Progress,
    QuantPlan,
    Signature,
    Target,
    TensorSpec,
    WeightSource,
    no_progress,
)

if TYPE_CHECKING:
    from edgeexport.backends.litert_file import ModelFile, Tensor
    from edgeexport.backends.litert_lowering import Lowering

NAME = "litert"
__all__ = ["NAME", "OPS", "OPTIONS", "POSITIVE_SCALES", "check", "compile", "versions"]

POSITIVE_SCALES = True
"""The runtime's fast kernels (XNNPACK) refuse a file with a scale that is zero or negative."""


@dataclass(frozen=True)
class Options:
    """[options] of a target for this backend."""

    prefill: int = 256
    """Tokens of the longest piece of a prompt."""
    prefill_short: int = 64
    """Tokens of a shorter one, for what remains; 0 for none."""
    blockwise: bool = True
    """Whether the runtime takes a scale for each block of a row. GPU delegates do not."""

    def __post_init__(self) -> None:
        if not 2 <= self.prefill <= 4096 or not (self.prefill_short == 0 or 2 <= self.prefill_short < self.prefill):
            raise ValueError("prefill is 2 to 4096 tokens, and prefill_short is 0 or less than it")

    @property
    def pieces(self) -> tuple[int, ...]:
        """Lengths of the prefill signatures, the longest last."""
        return tuple(size for size in (self.prefill_short, self.prefill) if size)


OPTIONS = Options


def versions() -> dict[str, str]:
    """Versions of the tools that shape the artifact's bytes. Raises: ToolError `missing-package`."""
    found = {}
    for name in ("ai-edge-litert", "flatbuffers", "onnx", "onnx-ir"):
        try:
            found[name] = version(name)
        except PackageNotFoundError as problem:
            raise errors.missing_package(name, "tflite") from problem
    return found


def check(model: CanonicalModel, target: Target, plan: QuantPlan) -> list[Finding]:
    """Every node that the table refuses or does not know, and every weight in a format that the target's runtime does
    not take, all at once. Pure; no SDK."""
    findings = []
    for node in model.graph.graph:
        row = OPS.get(node.op_type)
        if row is None or row.kind == "reject":
            why, fix = (row.why, row.fix) if row else ("the op table has no row for it", "add a row to litert_ops.py")
            findings.append(errors.op_not_lowered(NAME, node.op_type, node.name or "", why, fix))
        elif row.limit is not None and (reason := row.limit(node)) is not None:
            findings.append(errors.op_not_lowered(NAME, node.op_type, node.name or "", reason, "see `edgeexport ops`"))
    return findings


def compile(
    models: Sequence[CanonicalModel],
    target: Target,
    plan: QuantPlan,
    source: WeightSource,
    work: Path,
    progress: Progress = no_progress,
) -> Artifact:
    """Write `<component>.tflite` into `work`: a signature for each variant, or, over tokens, for one token and for each
    length of a prompt's pieces.

    Raises: UsageError `output-not-writable`; LoweringError `op-not-lowered`; CheckpointError for weights that cannot be
    stored.
    """
    from edgeexport.backends.litert_file import ModelFile

    tools = versions()
    component = models[0].component
    file = ModelFile(f"{component}.tflite")
    signatures = [
        _sign(file, model, plan, name, length)
        for model in models
        for name, length in _signatures(model, Options(**target.options))
    ]
    weights = file.write(work, source, progress)
    state = dict(models[0].state)
    return Artifact(
        component=component,
        backend=NAME,
        files=(file.name,),
        signatures=tuple(signatures),
        state=tuple((given_name(past, state), given_name(present, state)) for past, present in models[0].state),
        weights=weights,
        tools=tools,
    )


def _signatures(model: CanonicalModel, options: Options) -> list[tuple[str, int]]:
    """Name and number of tokens of each signature of a graph; 0 tokens where its shapes are fixed."""
    dims = {size.name: size for spec in model.inputs for size in spec.shape if isinstance(size, Dim)}
    if not dims:
        return [(model.variant or STEP, 0)]
    (tokens,) = dims.values()
    pieces = dict.fromkeys(min(size, tokens.max) for size in options.pieces)
    return [(DECODE, 1), *((f"{PREFILL}{size}", size) for size in pieces if size > 1)]


def _sign(file: ModelFile, model: CanonicalModel, plan: QuantPlan, name: str, length: int) -> Signature:
    """Lower one graph for so many tokens."""
    from edgeexport.backends.litert_lowering import Lowering

    lowering = Lowering(model, plan, OPS, file, name)
    state = dict(model.state)
    inputs: dict[str, Tensor] = {}
    for spec in model.inputs:
        sizes = [length if isinstance(size, Dim) else size for size in spec.shape]
        given = given_name(spec.name, state)
        dtype = {"int64": "int32"}.get(spec.dtype, spec.dtype)
        if given == "input_pos":
            inputs[given] = lowering.graph.tensor((length,), dtype, given)
            lowering.bind(spec.name, lowering.slice(inputs[given], 0, 0, 1))
        else:
            inputs[given] = lowering.graph.tensor(sizes, dtype, given)
            lowering.bind(spec.name, inputs[given])
    made = lowering.run()
    left_out = {"logits"} if state and name != DECODE else set()
    outputs = {given_name(key, state): tensor for key, tensor in made.items() if key not in left_out}
    file.sign(lowering.graph, inputs, outputs)
    return Signature(name, _specs(inputs), _specs(outputs), file.name)


def _specs(tensors: Mapping[str, Tensor]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items())
