"""LiteRT (TensorFlow Lite): the canonical graph to one `.tflite`, its signatures over the same weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeexport import errors
from edgeexport.backends.litert_names import DECODE, EMBEDDINGS, LOGITS, POSITIONS, ROPE, TOKENS, cache_name, prefill
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
    """Versions of the tools that shape the artifact's bytes. Raises: ToolError `tool-missing`."""
    found = {}
    for name in ("ai-edge-litert", "flatbuffers", "onnx", "onnx-ir"):
        try:
            found[name] = version(name)
        except PackageNotFoundError as problem:
            raise errors.tool_missing(name, "edgeexport[tflite]") from problem
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
