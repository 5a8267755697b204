"""The steps of the walk, each between two of the house's rooms: cached where that pays, narrated, and nothing else."""

from __future__ import annotations

import importlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from edgeexport import backends, errors, outputs, quant, threads
from edgeexport.bench import peak_rss_of_all
from edgeexport.bundle.artifacts import OpenArtifacts, read_signature, size_of
from edgeexport.bundle.cache import Cache, key
from edgeexport.checkpoint import WeightReader
from edgeexport.console import Console
from edgeexport.core import (
    Array,
    Artifact,
    CanonicalModel,
    Component,
    Finding,
    Progress,
    Provenance,
    QuantPlan,
    TensorRef,
)
from edgeexport.families.decoder import unread_tensors
from edgeexport.job import Job
from edgeexport.quant.codes import CodeStore
from edgeexport.quant.smoothing import NOTHING, Smoothing
from edgeexport.quant.source import PlannedWeights, no_samples
from edgeexport.threads import Stop
from edgeexport.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from edgeexport.parity.evidence import Probe
    from edgeexport.parity.examples import Shown
    from edgeexport.parity.ladder import Climb
    from edgeexport.session.preprocess import Preprocess

DECODER = "decoder"
PROBE_WORK = 1e12
"""Floating point operations that L2 may spend on pictures: some ten seconds on two cores."""
PROBE_SCREEN = (112, 84)
"""Height and width in pixels of the picture that L2 shows instead."""
MAX_TEXT_BYTES = 1 << 20
"""Of a text that a bundle is compared along: hours at most."""
PROMPTS = 4
ANSWER_TOKENS = 16
"""The ladder's greedy answers: PROMPTS texts, ANSWER_TOKENS each. `benchmarks/` asks for more."""


def refuse_plan(plan: Mapping[str, Any], max_rss: int | None, parity: str) -> None:
    """Raise the plan's errors, and `max-rss-too-small` where the build cannot keep to the limit."""
    found = [Finding(**finding) for finding in plan["findings"] if finding["severity"] == "error"]
    if found:
        classes = {kind.exit_code: kind for kind in errors.EdgeExportError.__subclasses__()}
        raise classes[plan["exit_code"]](*found)
    memory = {"L1": "memory", "L2": "memory_to_l3", "L3": "memory_to_l3"}.get(parity, "memory_with_ladder")
    need = plan["build"][memory]
    if max_rss is not None and need > max_rss:
        raise errors.max_rss_too_small(max_rss, need, parity)


def read_tokenizer(job: Job) -> list[Finding]:
    """Raise what is wrong with the tokenizer now, not after minutes of work on the weights; returns remarks.

    Raises: CheckpointError `tokenizer-unusable`, `token-beyond-model`, `chat-template-unusable`."""
    try:
        _import_meanwhile(lambda: job.tokenizer_files)
        return _judged_tokenizer(job)
    except errors.BundleError as problem:  # which it is where a session opens it
        raise errors.CheckpointError(*problem.findings) from problem


def _import_meanwhile(work: Callable[[], object]) -> None:
    """Do `work`, which waits for another process where nothing is remembered of it; import meanwhile what tracing needs
    then, which takes as long."""
    with threads.pool(1) as pool, suppress(errors.EdgeExportError):  # which is raised where it is asked again
        waiting = pool.submit(work)
        wait([waiting], 0.1)
        if not waiting.done():
            with suppress(ImportError):  # said by the step that needs it
                importlib.import_module("edgeexport.families.stages")
        waiting.result()


def _judged_tokenizer(job: Job) -> list[Finding]:
    path, vocab = job.checkpoint.path, job.family.geometry(job.checkpoint.config).vocab
    if job.chat_template is not None:
        job.chat_template.check()
    remarks = list(getattr(job.tokenizer_files, "remarks", ()))
    remarks += [] if job.special_tokens.stop_ids else [errors.no_stop_token(path)]
    if job.tokenizer.vocab > vocab:
        remarks.append(errors.tokenizer_larger(path, job.tokenizer.vocab, vocab))
    for what, tokens in _certain(job).items():
        if beyond := [token for token in tokens if not 0 <= token < vocab]:
            raise errors.token_beyond_model(path, what, beyond[0], vocab)
    return remarks + job.text_tables[1]


def _certain(job: Job) -> dict[str, Sequence[int]]:
    """Ids that a prompt or an answer is certain to have, by what gives them."""
    found = {"what ends an answer": job.special_tokens.stop_ids, "what begins a text": job.tokenizer.encode("a")}
    if job.chat_template is not None:
        with suppress(errors.EdgeExportError):  # a template that fails is said where it is asked
            text = job.chat_template.render([{"role": "user", "content": "a"}])
            found["the chat template's text"] = job.tokenizer.encode(text, add_special_tokens=False)
    return found


def refuse_unread(job: Job, parts: Sequence[Built], reader: WeightReader) -> None:
    """Raises: CheckpointError `unread-tensors` where the checkpoint has tensors that no part of the model reads."""
    tensors, unused = job.checkpoint.tensors, job.family.unused(job.checkpoint)
    used = {ref.name for part in parts for model in part.models for ref in model.weights.values()}
    if left := unread_tensors(tensors, used, unused, lambda name, *rows: reader.rows(tensors[name], *rows)):
        raise errors.unread_tensors(job.checkpoint.path, left)


def rounded_anew(plan: Mapping[str, Any]) -> list[Finding]:
    """The plan's warnings that codes of the checkpoint are not kept."""
    return [Finding(**finding) for finding in plan["findings"] if finding["code"] == "quantised-anew"]


def announce(console: Console, plan: Mapping[str, Any], destination: Path) -> None:
    """The resolved plan, before any work."""
    model, cost = plan["model"], plan["build"]
    console.say(
        f"{model['name']} ({model['model_type']}, {model['parameters'] / 1e6:.0f}M parameters) for "
        f"{plan['target']['name']}: {plan['scheme']}, context {plan['context']}, about "
        f"{format_bytes(plan['bytes']['artifact'])}, {format_seconds(cost['seconds'])} -> {destination}"
    )


@dataclass(frozen=True)
class Built:
    """One component on its way through the walk: its canonical graph (one for each variant), how each weight is
    stored, and, once compiled, its artifact and the folder of its files."""

    models: tuple[CanonicalModel, ...]
    plan: QuantPlan
    codes: CodeStore | None = None
    """Integers that calibration chose."""
    smoothing: Smoothing = NOTHING
    """Outliers of activations that were moved into weights."""
    folder: Path | None = None
    artifact: Artifact | None = None
    known: Provenance | None = None
    """Where its integers come from, of a component that was read from a bundle."""

    @property
    def name(self) -> str:
        return self.models[0].component

    @property
    def files(self) -> tuple[Path, Artifact]:
        """The folder and the artifact, of a component that has been compiled."""
        assert self.folder is not None and self.artifact is not None, "compiled"
        return self.folder, self.artifact

    @property
    def provenance(self) -> Provenance:
        """Where most integers of 4 bits come from, those of multiplications before a table's."""
        if self.known is not None:
            return self.known
        packed = [name for name, fmt in self.plan.formats.items() if fmt.integer and fmt.bits == 4]
        linear = [name for name in packed if self.plan.classes[name] == "linear"] or packed
        found: Counter[Provenance] = Counter(
            "carried" if name in self.plan.carried
            else self.codes.entries[name].provenance if self.codes is not None and name in self.codes
            else "rounded"
            for name in linear
        )  # fmt: skip
        return found.most_common(1)[0][0] if found else "rounded"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight, by the canonical graph's names."""
        return {name: ref.shape for name, ref in self.models[0].weights.items()}


def decoder_of(parts: Sequence[Built]) -> Built:
    """The component that every model has."""
    return next(part for part in parts if part.name == DECODER)


def trace(job: Job, cache: Cache, console: Console) -> list[Built]:
    """Every component's canonical graphs, traced or from the cache. The weights are hashed meanwhile on the other
    core."""
    components = job.family.components(job.checkpoint, job.context, job.target.shapes)
    models: dict[str, list[CanonicalModel]] = {}
    stop = Stop()
    with threads.pool(1) as pool, stop:
        hashing = pool.submit(job.hash_weights, stop.check)
        with console.step(f"Tracing {job.checkpoint.name}"):
            for component in components:
                models.setdefault(component.name, []).append(_traced(job, component, cache, console))
        hashing.result()
    return [Built(tuple(variants), plan_weights(job, variants)) for variants in models.values()]


def _traced(job: Job, component: Component, cache: Cache, console: Console) -> CanonicalModel:
    traced: list[CanonicalModel] = []
    title = f"Tracing {component.name} {component.variant}".rstrip()

    def fill(folder: Path) -> None:
        from edgeexport.canonical import store
        from edgeexport.canonical.trace import trace as trace_component

        with console.progress(title, unit="steps") as progress:
            traced.append(trace_component(component, job.checkpoint.tensors, progress))
        store.save(traced[0], folder)

    folder, cached = cache.folder("trace", key(job.trace_key, component.name, component.variant), fill)
    if cached:
        from edgeexport.canonical import store

        return store.load(folder, component, job.checkpoint.tensors)
    return traced[0]


def plan_weights(job: Job, models: Sequence[CanonicalModel]) -> QuantPlan:
    """Which weight gets which format, by its use in the graph."""
    from edgeexport.canonical.dialect import classes

    weights = models[0].weights
    shapes = {name: ref.shape for name, ref in weights.items()}
    traits = backends.load(job.target.backend).TRAITS
    encodings = {name: ref.encoding for name, ref in weights.items()}
    kinds = classes(models[0].graph, weights, models[0].component)
    chosen = job.choice.tensors if job.choice is not None else None
    return quant.plan(shapes, kinds, job.scheme, traits, encodings, chosen)


def check(job: Job, parts: Sequence[Built]) -> None:
    """Raise LoweringError with every node that the backend refuses, before a weight is read."""
    backend = backends.load(job.target.backend)
    findings = [
        finding for part in parts for model in part.models for finding in backend.check(model, job.target, part.plan)
    ]
    refused = [finding for finding in findings if finding.severity == "error"]
    if refused:
        raise errors.LoweringError(*refused)


def tokens_of(job: Job, text: Path) -> Array:
    """A text file's token ids, int64 [T]. Raises: UsageError `text-unreadable`."""
    try:
        if text.stat().st_size > MAX_TEXT_BYTES:
            raise errors.text_unreadable(text, f"it has more than {MAX_TEXT_BYTES >> 10} KiB")
        written = text.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise errors.text_unreadable(text, str(problem)) from problem
    tokens = job.tokenizer.encode(written)
    if len(tokens) < 2:
        raise errors.text_unreadable(text, "it has fewer than two tokens")
    return np.array(tokens, np.int64)


def compile(job: Job, parts: Sequence[Built], reader: WeightReader, cache: Cache, console: Console) -> list[Built]:
    """Every component's artifact, in a folder of the cache."""
    return [_compiled(job, part, reader, cache, console) for part in parts]


def _compiled(job: Job, part: Built, reader: WeightReader, cache: Cache, console: Console) -> Built:
    def fill(folder: Path) -> None:
        source = PlannedWeights(
            reader, part.models[0].weights, part.plan, _samples(job, part.name), part.codes, part.smoothing
        )
        backend = backends.load(job.target.backend)
        with console.progress(f"Writing weights of {part.name}", unit="steps") as progress:
            artifact = backend.compile(part.models, job.target, part.plan, source, folder, progress)
        (folder / "artifact.json").write_bytes(msgspec.json.encode(artifact))

    with console.step(f"Compiling {part.name} for {job.target.name}"):
        chosen = part.codes.digest if part.codes is not None else ""
        named = key(job.compile_key, part.name, chosen, part.smoothing.digest)
        folder, _ = cache.folder("compile", named, fill)
    return replace(
        part, folder=folder, artifact=msgspec.json.decode((folder / "artifact.json").read_bytes(), type=Artifact)
    )


def _samples(job: Job, component: str) -> Callable[[str], Iterable[Mapping[str, Array]]]:
    """What the user gave to calibrate a component by."""
    samples, contract = job.samples, job.contract
    if samples is None or contract is None:
        return no_samples
    return lambda variant: samples.inputs(contract, component, variant)


def climb(
    job: Job, parts: Sequence[Built], shown: Mapping[str, Shown], reader: WeightReader, console: Console
) -> Climb:
    """Climb the parity ladder over the files that were written."""
    from edgeexport.backends.storage import read_rows
    from edgeexport.parity import examples, ladder
    from edgeexport.parity.evidence import Part, Subject

    tensors = job.checkpoint.tensors
    runner = backends.load_runner(job.target.backend)
    places = {
        ref.name: (*part.files, name, part.smoothing) for part in parts for name, ref in part.models[0].weights.items()
    }  # a tied tensor that two components store is the same in both

    def checkpoint_rows(name: str, start: int, stop: int) -> Array:
        return reader.rows(tensors[name], start, stop)

    def stored_rows(name: str, start: int, stop: int) -> Array:
        shape = tensors[name].shape
        folder, artifact, initializer, smoothing = places[name]
        rows = read_rows(folder, artifact.weights[initializer], start, stop)
        rows = rows.reshape(-1, *shape[1:]) if len(shape) > 1 else rows.reshape(-1)
        return smoothing.restored(initializer, start, rows)

    def smoothed(name: str, start: int, rows: Array) -> Array:
        _, _, initializer, smoothing = places[name]
        return smoothing.smoothed(initializer, start, rows)

    @contextmanager
    def watch(title: str) -> Iterator[Progress]:
        with console.step(title), console.progress(title, unit="steps") as progress:
            yield progress

    def signature_of(part: Built) -> Callable[[str], Mapping[str, Any]]:
        return lambda variant: read_signature(*part.files, variant)

    vocab = job.family.geometry(job.checkpoint.config).vocab
    tokenizer = job.tokenizer
    by_name = {part.name: part.files for part in parts}
    half = job.target.precision == "float16"
    subject = Subject(
        parts={part.name: Part(part.models, part.plan, signature_of(part), half, part.provenance) for part in parts},
        contract=job.contract,
        tensors=tensors,
        unused=job.family.unused(job.checkpoint),
        checkpoint_rows=checkpoint_rows,
        stored_rows=stored_rows,
        smoothed=smoothed,
        open=lambda *, exact=False: OpenArtifacts(lambda name: by_name[name], exact=exact),
        oracle=lambda: job.family.oracle(job.checkpoint.config),
        prompts=examples.texts(job.tokenizer_files["tokenizer.json"], vocab, job.context)[:PROMPTS],
        questions=examples.questions(job.tokenizer_files["tokenizer.json"], job.chat_template, vocab, job.context),
        decode=lambda tokens: tokenizer.decode(tokens, skip_special_tokens=False),
        shown={name: case.example for name, case in shown.items()},
        answer_tokens=ANSWER_TOKENS,
        stop_ids=frozenset(job.special_tokens.stop_ids),
        overrides=_gates(job),
        probe=_probe(job, parts, shown, console),
        stand_in=getattr(runner, "STAND_IN", None),
        loads=sum(size_of(*part.files) for part in parts),
    )
    return ladder.climb(subject, job.parity, watch)


def _gates(job: Job) -> Mapping[str, Mapping[str, Any]]:
    """The target's own gates; the KL that was asked for at most is one, whatever the default."""
    own = job.target.gates(job.scheme)
    asked = job.choice.asked_kl if job.choice is not None else None
    return own if asked is None else {**own, "L5": {**own["L5"], "kl": asked}}


def _probe(job: Job, parts: Sequence[Built], shown: Mapping[str, Shown], console: Console) -> Probe | None:
    """A small picture for L2, where the built ones would cost more than `PROBE_WORK`; None where they do not."""
    from edgeexport.parity.evidence import Probe

    if job.contract is None or not job.contract.grids:
        return None
    tokens = sum(len(case.example.tokens) for case in shown.values())
    patches = sum(rows * columns for rows, columns in job.contract.grids)
    rows = {part.name: tokens if part.name == DECODER else patches for part in parts if part.name != "embed"}
    weights = {part.name: sum(ref.elements for ref in part.models[0].weights.values()) for part in parts}
    work = 2.0 * sum(2 * weights[name] * count for name, count in rows.items())  # the graph and the original
    if work <= PROBE_WORK:
        return None
    shapes = {**job.target.shapes, "vision": {"screens": [list(PROBE_SCREEN)], "max_pixels": math.prod(PROBE_SCREEN)}}
    components = job.family.components(job.checkpoint, job.context, shapes)
    cache = Cache()
    models = tuple(_traced(job, part, cache, console) for part in components if part.variant)
    contract = job.family.preprocess(job.checkpoint, shapes)
    assert contract is not None, "the model has one for other grids"
    small = _asked(job, contract)
    return Probe(models, {name: case.example for name, case in small.items()}, work)


def shown(job: Job) -> dict[str, Shown]:
    """The ladder's prompts with pictures and sound, by name; none for a model of text alone."""
    return _asked(job, job.contract) if job.contract is not None else {}


def _asked(job: Job, contract: Preprocess) -> dict[str, Shown]:
    from edgeexport.parity import examples

    vocab = job.family.geometry(job.checkpoint.config).vocab
    text = job.tokenizer_files["tokenizer.json"]
    return examples.shown(contract, text, job.chat_template, vocab, job.context, job.family.questions)


def write_canonical(
    models: Sequence[CanonicalModel], out: Path, reader: WeightReader, console: Console, *, reference_weights: bool
) -> list[Path]:
    """The canonical graphs as ONNX in the folder `out`."""
    from edgeexport.canonical import store

    def rows(ref: TensorRef, start: int, stop: int) -> Array:
        plain = ref.encoding in ("F32", "F16", "BF16") and ref.transform is None
        return reader.raw(ref, start, stop) if plain else reader.rows(ref, start, stop)

    with outputs.gathered(out) as place:
        if reference_weights:
            return [out / store.write_reference_onnx(model, place).name for model in models]
        with console.step("Writing the canonical graph"), console.progress("Writing weights", unit="steps") as progress:
            return [out / store.write_onnx(model, place, rows, progress).name for model in models]


def memory_findings(max_rss: int | None) -> list[Finding]:
    """A warning when the build needed more than it was allowed: the estimate was wrong, and that should be known."""
    peak = peak_rss_of_all()
    return [errors.max_rss_exceeded(max_rss, peak)] if max_rss is not None and peak > max_rss else []


def size_findings(max_size: int | None, size: int) -> list[Finding]:
    """A warning when the artifacts are larger than they were to be: the share kept for graphs was too small."""
    return [errors.max_size_exceeded(max_size, size)] if max_size is not None and size > max_size else []
