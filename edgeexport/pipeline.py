"""The walk: a checkpoint and a target in, a proven bundle out. Each step is one call; the steps are in steps.py."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeexport import errors, families, quant, targets
from edgeexport import steps as step
from edgeexport.bench import peak_rss
from edgeexport.bundle.cache import Cache
from edgeexport.bundle.writer import refuse_existing
from edgeexport.checkpoint import WeightReader, open_checkpoint
from edgeexport.console import Console
from edgeexport.core import Finding, ParityResult, Verdict
from edgeexport.plan import context_for
from edgeexport.plan import plan as plan_of


@dataclass(frozen=True)
class BuildResult:
    """What a build made. `size` is the artifacts' bytes, `ideal_bytes` what their scheme needs by arithmetic."""

    bundle: Path
    seconds: float
    peak_rss: int
    size: int
    ideal_bytes: int
    results: list[ParityResult]
    findings: list[Finding] = field(default_factory=list)
    up_to_date: bool = False
    plan: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ExportResult:
    """The canonical graph on disk."""

    path: Path
    nodes: int
    weights: int
    bytes: int


def build(
    model: str,
    target: str,
    out: Path | str = "dist",
    *,
    quant: str | None = None,
    context: int | None = None,
    parity: str = "L5",
    max_rss: int | None = None,
    dump: Path | None = None,
    force: bool = False,
    console: Console | None = None,
) -> BuildResult:
    """Build OUT/<model>-<target>/ and prove it up to level `parity`.

    Raises: an EdgeExportError of the class that the failing step names; nothing is left behind then.
    """
    console = console or Console(quiet=True)
    started = time.perf_counter()
    plan = plan_of(model, target, quant, context)
    step.refuse_plan(plan, max_rss, parity)
    checkpoint = open_checkpoint(model)
    aim = targets.load(target)
    job = step.Job(checkpoint, aim, plan["scheme"], plan["context"], parity, families.find(checkpoint.model_type))
    destination = Path(out) / f"{checkpoint.name}-{aim.name}"
    remarks = step.read_tokenizer(job)
    step.announce(console, plan, destination)

    if destination.exists() and (known := step.up_to_date(job, destination, console)) is not None:
        return BuildResult(destination, time.perf_counter() - started, peak_rss(), *known, [], True, plan)
    refuse_existing(destination, force=force)

    cache = Cache()
    with WeightReader() as reader:
        canonical = step.trace(job, cache, console)
        storage = step.plan_weights(job, canonical)
        step.check(job, canonical, storage)
        folder, artifact = step.compile(job, canonical, storage, reader, cache, console)
        climb = step.climb(job, canonical, storage, folder, artifact, reader, console)
    if climb.failed:
        console.parity(climb.results)
        raise errors.ParityError(*(errors.parity_failed(row) for row in climb.results if row.verdict is Verdict.FAIL))
    with console.step("Writing the bundle"):
        step.write_bundle(job, storage, folder, artifact, climb, destination, force=force)
    if dump is not None:
        step.dump(dump, canonical, storage, folder, artifact)
    cache.prune()
    size, ideal = step.sizes(folder, artifact, canonical, storage)
    findings = [*remarks, *artifact.findings, *step.memory_findings(max_rss)]
    seconds = time.perf_counter() - started
    return BuildResult(destination, seconds, peak_rss(), size, ideal, climb.results, findings, False, plan)


def export(
    model: str,
    out: Path | str,
    *,
    context: int | None = None,
    reference_weights: bool = False,
    console: Console | None = None,
) -> ExportResult:
    """Write the canonical ONNX of `model` into the folder `out`."""
    console = console or Console(quiet=True)
    checkpoint = open_checkpoint(model)
    family = families.find(checkpoint.model_type)
    aim = targets.load("host-ort")
    slots = context_for(context, aim, family.geometry(checkpoint.config))
    job = step.Job(checkpoint, aim, quant.find("fp32").name, slots, "L1", family)
    canonical = step.trace(job, Cache(), console)
    with WeightReader() as reader:
        path = step.write_canonical(canonical, Path(out), reader, console, reference_weights=reference_weights)
    size = sum(file.stat().st_size for file in Path(out).iterdir() if file.name.startswith(path.name))
    return ExportResult(path, len(canonical.graph.graph), len(canonical.weights), size)


def parity(
    bundle: Path, model: str, *, level: str = "L5", max_rss: int | None = None, console: Console | None = None
) -> list[ParityResult]:
    """Climb the ladder again over a bundle that was built from `model`, without changing it.

    Raises: BundleError when the bundle was made from another checkpoint; ParityError when a level fails.
    """
    console = console or Console(quiet=True)
    job, artifact = step.job_of_bundle(bundle, model, level)
    plan = plan_of(model, job.target.name, job.scheme, job.context)
    step.refuse_plan(plan, max_rss, level)
    with WeightReader() as reader:
        canonical = step.trace(job, Cache(), console)
        storage = step.plan_weights(job, canonical)
        climb = step.climb(job, canonical, storage, bundle, artifact, reader, console)
    if climb.failed:
        console.parity(climb.results)
        raise errors.ParityError(*(errors.parity_failed(row) for row in climb.results if row.verdict is Verdict.FAIL))
    return climb.results
