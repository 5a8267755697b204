"""LiteRT files that Android's NNAPI delegate takes as far as it can. Android has called NNAPI deprecated since 15.

NNAPI never writes into a tensor that it is given. So the decoder reads its caches and gives what a call adds to them;
the loader writes that at the position. Everything else is LiteRT's file (litert.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeexport import errors
from edgeexport.backends import litert
from edgeexport.backends.litert_names import slice_name
from edgeexport.backends.litert_nnapi_ops import OPS
from edgeexport.backends.litert_nnapi_table import LEVELS
from edgeexport.core import (
    Artifact,
    CanonicalModel,
    Finding,
    Progress,
    QuantPlan,
    Target,
    Traits,
    WeightSource,
    no_progress,
)

if TYPE_CHECKING:
    from edgeexport.backends.litert_file import ModelFile

NAME = "litert-nnapi"
__all__ = ["NAME", "OPS", "OPTIONS", "TRAITS", "check", "compile", "versions"]

STATIC = "int8-static"
DECODER = "decoder"
CALIBRATED = ("vision", "audio")
"""Components whose activations have fixed scales in the scheme STATIC; text goes on to be scaled token by token."""
MOST_REASONS = 3
"""Reasons that a finding lists."""


@dataclass(frozen=True)
class Options:
    """[options] of a target for this backend."""

    prefill: int = 64
    """Tokens of the piece in which a prompt is taken; 0 for token by token."""
    features: int = 512
    """Most features of pictures and sounds that one prompt's text attends to, where a model attends to them."""
    feature_level: int = 6
    """NNAPI's feature level that the reported share is for."""

    def __post_init__(self) -> None:
        if self.prefill != 0 and not 2 <= self.prefill <= 4096:
            raise ValueError("prefill is 0, or 2 to 4096 tokens")
        if not 1 <= self.features <= 8192:
            raise ValueError("features are 1 to 8192")
        if self.feature_level not in LEVELS:
            raise ValueError(f"feature_level is {min(LEVELS)} to {max(LEVELS)}")


OPTIONS = Options
TRAITS = Traits(schemes=(STATIC,), positive_scales=True, shifts=("int8",))


def versions() -> dict[str, str]:
    """Versions of the tools that shape the artifact's bytes. Raises: ToolError `missing-package`."""
    return litert.versions()


def check(model: CanonicalModel, target: Target, plan: QuantPlan) -> list[Finding]:
    """Every node that the table refuses or does not know, and every weight in a format that the runtime does not take,
    all at once. Pure; no SDK. What NNAPI leaves to the processor is no error: `compile` reports it."""
    return [*OPS.check(model.graph.graph), *litert.refused_formats(plan, NAME)]


def compile(
    models: Sequence[CanonicalModel],
    target: Target,
    plan: QuantPlan,
    source: WeightSource,
    work: Path,
    progress: Progress = no_progress,
) -> Artifact:
    """Write `<component>.tflite` into `work`, and report how much of it NNAPI would take.

    Raises: UsageError `output-not-writable`; LoweringError `op-not-lowered`; CheckpointError for weights that cannot be
    stored.
    """
    from edgeexport.backends.litert_file import ModelFile

    tools, options = versions(), Options(**target.options)
    component = models[0].component
    file = ModelFile(f"{component}.tflite")
    if plan.scheme == STATIC and component in CALIBRATED:
        return _calibrated(models, file, target, plan, source, work, progress)
    pieces = [options.prefill] if options.prefill else []
    signatures = [
        litert.sign(file, model, plan, name, options.features, OPS, slices=True)
        for model in models
        for name in litert.signature_names(model, pieces, windows=False)
    ]
    weights = file.write(work, source, progress)
    caches = [litert.given(models[0], past) for past, _ in models[0].state]
    state = tuple((cache, slice_name(cache)) for cache in caches)
    findings = _findings(component, work / file.name, options.feature_level, target.name)
    return Artifact(component, NAME, (file.name,), tuple(signatures), state, weights, tools, tuple(findings))


def _calibrated(
    models: Sequence[CanonicalModel], file: ModelFile, target: Target, plan: QuantPlan, source: WeightSource,
    work: Path, progress: Progress,
) -> Artifact:  # fmt: skip
    """An encoder whose activations are int8, too."""
    from edgeexport.backends import litert_nnapi_static as static

    lowered = [static.lower(file, model, plan, source) for model in models]
    signatures = tuple(signature for _, signature in lowered)
    weights = static.write(file, [lowering for lowering, _ in lowered], signatures, work, source, progress)
    component, level = models[0].component, Options(**target.options).feature_level
    findings = _findings(component, work / file.name, level, target.name)
    return Artifact(component, NAME, (file.name,), signatures, (), weights, versions(), tuple(findings))


def _findings(component: str, path: Path, level: int, target: str) -> list[Finding]:
    """That NNAPI is deprecated, once for each build, and what share of this component it would take."""
    from edgeexport.backends.litert_nnapi_lint import lint

    found = [errors.nnapi_deprecated(target)] if component == DECODER else []
    first = lint(path, level)[0]  # of a decoder, the signature for one token
    often = sorted(first.refused.items(), key=lambda each: -each[1])[:MOST_REASONS]
    reasons = [f"{count} {op}: {why}" for (op, why), count in often]
    found.append(
        errors.nnapi_share(
            component, first.signature, level, (first.taken, first.operators), (first.taken_macs, first.macs),
            first.runs, reasons,
        )
    )  # fmt: skip
    return found
