"""The walk: a checkpoint and a target in, a proven bundle out. Each step is one call; the steps are in steps.py."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeexport import choosing, errors, families, outputs, quant, shipping, targets
from edgeexport import steps as step
from edgeexport.bench import peak_rss_of_all
from edgeexport.bundle.cache import Cache
from edgeexport.bundle.writer import refuse_existing
from edgeexport.checkpoint import WeightReader
from edgeexport.checkpoint.digest import refuse_changed
from edgeexport.console import Console
from edgeexport.core import Array, Example, Finding, ParityResult, Verdict
from edgeexport.job import Job
from edgeexport.plan import Asked, context_for
from edgeexport.plan import plan as plan_of
from edgeexport.quant.budget import FILE, Budget
from edgeexport.quant.schemes import AUTO
from edgeexport.samples import find as find_samples

if TYPE_CHECKING:
    from edgeexport.parity.ladder import Climb
    from edgeexport.parity.text import TextResult


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
    answers: Sequence[Mapping[str, Any]] = ()
    """The ladder's questions with both answers, as in parity.json."""
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
    max_size: int | None = None,
    max_kl: float | None = None,
    for_device: str | None = None,
    context: int | None = None,
    parity: str = "L5",
    max_rss: int | None = None,
    samples: Path | None = None,
    calibrate: Path | None = None,
    calibrate_method: str | None = None,
    device: str = "cpu",
    dump: Path | None = None,
    force: bool = False,
    console: Console | None = None,
) -> BuildResult:
    """Build OUT/<model>-<target>/ and prove it up to level `parity`. `quant` is a scheme's name, the path of a plan of
    formats (.json), or `auto`: formats chosen within `max_size` bytes or what `for_device` has, to lose `max_kl` nats
    at most. A scheme that calibrates activations does so by
    the pictures and sounds in the folder `samples`; integers of 4 bits are chosen by the texts in `calibrate`, by the
    method `none`, `search` or `gptq`.

    Raises: an EdgeExportError of the class that the failing step names; nothing is left behind then.
    """
    console = console or Console(quiet=True)
    started = time.perf_counter()
    for folder in (Path(out), *([dump] if dump is not None else [])):
        outputs.refuse_folder(folder)
    asked = Asked(quant, max_size, max_kl, for_device)
    plan = plan_of(model, target, asked, context)
    step.refuse_plan(plan, max_rss, parity)
    checkpoint, family = families.open_model(model)
    aim = targets.load(target)
    given = find_samples(samples) if samples is not None else None
    calibration = choosing.calibration(plan, calibrate, calibrate_method, device)
    limits, choice = Budget(**plan["budget"]), asked.choice
    job = Job(
        checkpoint, aim, plan["scheme"], plan["context"], parity, family, given, calibration, limits, choice
    )  # fmt: skip
    destination = Path(out) / f"{checkpoint.name}-{aim.name}"
    remarks = [*checkpoint.remarks, *step.read_tokenizer(job), *step.rounded_anew(plan)]
    step.announce(console, plan, destination)

    def done(job: Job) -> BuildResult | None:
        if not destination.exists() or (known := shipping.up_to_date(job, destination, force=force)) is None:
            return None
        size, ideal, results, answers = known
        seconds, peak = time.perf_counter() - started, peak_rss_of_all()
        return BuildResult(destination, seconds, peak, size, ideal, results, [], answers, True, plan)

    if (result := done(job)) is not None:
        return result
    if plan["scheme"] != AUTO.name or choice is not None:  # else what is there may be what will be chosen
        refuse_existing(destination, force=force)

    cache = Cache(check=partial(refuse_changed, checkpoint))
    with WeightReader() as reader:
        traced = step.trace(job, cache, console)
        step.refuse_unread(job, traced, reader)
        job, planned = choosing.choose(job, traced, reader, cache, console)
        if (result := done(job)) is not None:
            return result
        refuse_existing(destination, force=force)
        step.check(job, planned)
        smoothed = choosing.smooth(job, planned, reader, cache, console)
        chosen = choosing.calibrate(job, smoothed, reader, cache, console)
        parts = step.compile(job, chosen, reader, cache, console)
        shown = step.shown(job)
        climb = step.climb(job, parts, shown, reader, console)
    refuse_failed(climb, console)
    refuse_changed(checkpoint)
    with console.step("Writing the bundle"):
        shipping.write_bundle(job, parts, climb, shown, destination, force=force)
    if dump is not None:
        shipping.dump(dump, parts)
    cache.release()
    cache.prune()
    findings = [*remarks, *cache.remarks, *(finding for part in parts for finding in part.files[1].findings)]
    findings += step.memory_findings(max_rss)
    findings += step.size_findings(max_size, shipping.sizes(parts)[0])
    seconds = time.perf_counter() - started
    peak, sizes = peak_rss_of_all(), shipping.sizes(parts)
    return BuildResult(destination, seconds, peak, *sizes, climb.results, findings, climb.answers, False, plan)


def refuse_failed(climb: Climb, console: Console) -> None:
    """Raises: ParityError with every row that failed."""
    failed = [row for row in climb.results if row.verdict is Verdict.FAIL]
    if failed:
        console.parity(climb.results)
        console.answers(climb.answers)
        raise errors.ParityError(*(errors.parity_failed(row) for row in failed))


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
    outputs.refuse_folder(Path(out))
    checkpoint, family = families.open_model(model)
    aim = targets.load("host-ort")
    slots = context_for(context, aim, family.geometry(checkpoint.config))
    job = Job(checkpoint, aim, quant.find("fp32").name, slots, "L1", family)
    cache = Cache()
    models = [model for part in step.trace(job, cache, console) for model in part.models]
    with WeightReader() as reader:
        paths = step.write_canonical(models, Path(out), reader, console, reference_weights=reference_weights)
    for remark in cache.remarks:
        console.finding(remark)
    size = sum(file.stat().st_size for path in paths for file in Path(out).glob(f"{path.name}*"))
    nodes = sum(len(model.graph.graph) for model in models)
    return ExportResult(paths[-1], nodes, sum(len(model.weights) for model in models), size)


def parity(
    bundle: Path, model: str, *, level: str = "L5", max_rss: int | None = None, console: Console | None = None
) -> list[ParityResult]:
    """Climb the ladder again over a bundle that was built from `model`, without changing it.

    Raises: BundleError when the bundle was made from another checkpoint; ParityError when a level fails.
    """
    console = console or Console(quiet=True)
    job = shipping.job_of_bundle(bundle, model, level)
    plan = plan_of(model, job.target.name, str(bundle / FILE) if job.choice is not None else job.scheme, job.context)
    step.refuse_plan(plan, max_rss, level)
    with WeightReader() as reader:
        parts = shipping.artifacts_of_bundle(bundle, step.trace(job, Cache(), console))
        climb = step.climb(job, parts, step.shown(job), reader, console)
    refuse_failed(climb, console)
    return climb.results


def parity_text(
    bundle: Path, model: str, text: Path, *, threads: int | None = None, console: Console | None = None
) -> TextResult:
    """How far a bundle is from the `model` it was built from along a user's text.

    Raises: BundleError when the bundle was made from another checkpoint; UsageError `text-unreadable`.
    """
    from edgeexport.bundle.bundle import open_bundle
    from edgeexport.parity import text as along
    from edgeexport.parity.reference import Reference

    console = console or Console(quiet=True)
    job = shipping.job_of_bundle(bundle, model, "L5")
    tensors = job.checkpoint.tensors
    tokens = step.tokens_of(job, text)
    with WeightReader() as reader, open_bundle(bundle).session(threads=threads) as session:

        def judge(examples: Sequence[Example], firsts: Sequence[int]) -> list[Array]:
            rows = Reference(
                job.family.oracle(job.checkpoint.config),
                lambda name, start, stop: reader.rows(tensors[name], start, stop),
            )
            return [answer.logits for answer in rows.answers(examples, firsts)]

        vocab = job.family.geometry(job.checkpoint.config).vocab
        with console.step(f"Comparing along {text.name}"), console.progress("Comparing", unit="steps") as progress:
            return along.measure(tokens, session, judge, vocab, progress)
