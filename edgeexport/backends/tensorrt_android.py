"""Android: what LiteRT runs on every phone, and beside it engines for NVIDIA GPUs, which no phone has.

No current TensorRT has an Android runtime. So each component is LiteRT's, which the Android loader runs as it is;
the engines lie in `engines/` with a file that says what may take which, for a system that has both.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgeexport import errors
from edgeexport.backends import litert, tensorrt
from edgeexport.backends.optable import OpTable
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

NAME = "tensorrt-android"
ENGINES = "engines"
"""The folder of the engines in a bundle."""
NO_RUNTIME = "no current TensorRT has an Android runtime (5.0.6 listed one, 8.5 and later do not), and no phone its GPU"
OPS = OpTable(NAME)
OPS.include(tensorrt.OPS)
__all__ = ["NAME", "OPS", "OPTIONS", "TRAITS", "check", "compile", "versions"]


@dataclass(frozen=True)
class Options:
    """[options] of a target for this backend."""

    sm: str = "80 86 89 120"
    """Compute capabilities, times ten, that the engines are built for. 75 gets a file of its own."""
    prefill: int = 256
    """Tokens that one call takes at most, of LiteRT and of the engine: longer prompts go in pieces."""

    def __post_init__(self) -> None:
        tensorrt.Options(self.sm, self.prefill)
        litert.Options(prefill=self.prefill, prefill_short=0)


OPTIONS = Options
TRAITS = Traits(positive_scales=True, shifts=("int8",), least_block=32, compiler=tensorrt.TRAITS.compiler)


def versions() -> dict[str, str]:
    """Versions of the tools that shape the artifact's bytes. Raises: ToolError `missing-package`."""
    return {**litert.versions(), **tensorrt.versions()}


def check(model: CanonicalModel, target: Target, plan: QuantPlan) -> list[Finding]:
    """Everything that LiteRT or TensorRT would refuse, all at once. Pure; no SDK."""
    fallback, engine = _targets(target)
    return litert.check(model, fallback, plan) + tensorrt.check(model, engine, plan)


def compile(
    models: Sequence[CanonicalModel],
    target: Target,
    plan: QuantPlan,
    source: WeightSource,
    work: Path,
    progress: Progress = no_progress,
) -> Artifact:
    """Write LiteRT's files into `work`, and the engines with what picks one into `work`/engines.

    Raises: what the two backends raise.
    """
    fallback, engine = _targets(target)
    versions()  # before minutes of work: both must be there
    made = litert.compile(models, fallback, plan, source, work, progress)
    folder = work / ENGINES
    folder.mkdir()
    built = tensorrt.compile(models, engine, plan, source, folder, progress)
    engines = [name for name in built.files if name.endswith(".engine")]
    told = {name: json.loads((folder / f"{name}.json").read_bytes()) for name in engines}
    for name in built.files:
        if name not in engines:
            (folder / name).unlink()  # the graph and its weights: rtx-trt ships them, to be built from again
    choice = folder / f"{made.component}.json"
    choice.write_text(json.dumps(_choice(made, told), indent=1, sort_keys=True) + "\n")
    extra = [f"{ENGINES}/{name}" for name in (*engines, choice.name)]
    findings = (errors.engine_without_runtime(target.name, NO_RUNTIME),) if models[0].state else ()
    return replace(
        made, files=(*made.files, *extra), tools={**made.tools, **built.tools}, findings=(*made.findings, *findings)
    )


def _choice(made: Artifact, told: dict[str, dict[str, object]]) -> dict[str, object]:
    """What a loader reads to pick: an engine where the GPU and the runtime are those it was built for, else LiteRT."""
    return {
        "component": made.component,
        "engines": [{"file": name, **described} for name, described in told.items()],
        "otherwise": {"backend": made.backend, "files": list(made.files)},
        "why_otherwise": NO_RUNTIME,
    }


def _targets(target: Target) -> tuple[Target, Target]:
    """(LiteRT's, TensorRT's) view of the target: each has its own options and precision."""
    options = Options(**target.options)
    fallback = {"prefill": options.prefill, "prefill_short": 0}
    return (
        replace(target, precision="float32", options=fallback),
        replace(target, precision="float16", options={"sm": options.sm, "prefill": options.prefill}),
    )
