"""The steps that choose how weights are stored: each matrix's format within a budget, and the integers of 4 bits by
what they are fed. Between the canonical graph and the compiler; cached, narrated, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from edgeexport import backends, errors, quant
from edgeexport.bundle.cache import Cache, key
from edgeexport.checkpoint import WeightReader
from edgeexport.console import Console
from edgeexport.core import Array, Example, QuantPlan
from edgeexport.job import Job, code_digest, tool_versions
from edgeexport.memory import give_back
from edgeexport.quant import budget
from edgeexport.quant.budget import PROBE, Budget, Choice
from edgeexport.quant.calibration import LENGTH, METHODS, TOKENS, Calibration, Document, default_method
from edgeexport.quant.codes import CodeStore, load_index, write_whole
from edgeexport.quant.schemes import AUTO
from edgeexport.quant.smoothing import FILE as SMOOTHING
from edgeexport.quant.smoothing import Smoothing
from edgeexport.session.audio import read_wav
from edgeexport.session.image_file import read_image
from edgeexport.session.inputs import Inputs
from edgeexport.session.runner import Call
from edgeexport.steps import DECODER, Built, decoder_of, plan_weights, shown
from edgeexport.units import format_bytes

if TYPE_CHECKING:
    from edgeexport import sensitivity
    from edgeexport.canonical.streaming import Rows

UNITS = "units.json"
SHORT_TOKENS = 64
SHORT_WORK = 2e13
"""What a measurement of formats feeds each variant of a model: sequences of so many tokens, six or fewer; weights times
tokens of all variants, some half an hour on two cores."""


def calibration(plan: Mapping[str, Any], path: Path | None, method: str | None, device: str) -> Calibration:
    """How a build chooses integers: as it is told, else by the model's size. Raises: UsageError `unknown-method`,
    `calibration-unusable`; ToolError `no-gpu`."""
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise errors.no_gpu(f"PyTorch {torch.__version__} finds none", "leave --device out, or go where a GPU is")
    chosen = method or default_method(plan["model"]["parameters"])
    if chosen not in METHODS:
        raise errors.unknown_method(chosen, METHODS)
    return Calibration.of(chosen, path, device)


def choose(
    job: Job, parts: Sequence[Built], reader: WeightReader, cache: Cache, console: Console
) -> tuple[Job, list[Built]]:
    """The formats of a job that asks for a choice: those given, else the best within its budget by what each loses.

    Raises: UsageError `budget-too-small`, `plan-unusable`."""
    if job.scheme != AUTO.name:
        return job, list(parts)
    if job.choice is None:
        job = replace(job, choice=_chosen(job, parts, reader, cache, console))
        parts = [replace(part, plan=plan_weights(job, part.models)) for part in parts]
    assert job.choice is not None, "chosen above, or given"
    strangers = job.choice.tensors.keys() - {name for part in parts for name in part.plan.formats}
    if strangers:
        raise errors.plan_unusable(budget.FILE, f"the model has no {', '.join(sorted(strangers)[:3])}")
    console.say(
        f"Formats: {', '.join(f'{count} {name}' for name, count in budget.summary(job.choice).items())}; "
        f"{format_bytes(job.choice.bytes)}, expected KL {job.choice.expected_kl:.2g}"
    )
    return job, list(parts)


def _chosen(job: Job, parts: Sequence[Built], reader: WeightReader, cache: Cache, console: Console) -> Choice:
    """The best choice within the budget; where none was given, within the bytes of the target's own scheme."""
    from edgeexport import sensitivity

    decoder = decoder_of(parts)
    model, traits = decoder.models[0], backends.load(job.target.backend).TRAITS
    task = sensitivity.Task(model, decoder.plan.classes, traits)
    texts = job.calibration if job.calibration.sources else Calibration.of("search", None)
    takes = asdict(replace(traits, package=None))
    chosen = texts.method == "gptq", texts.digest
    named = key("sensitivity", model.digest, job.weights_digest, takes, chosen, tool_versions(), code_digest())

    def fill(folder: Path) -> None:
        found = priced(replace(job, calibration=texts), parts, task, reader, work, console)
        write_whole(folder, UNITS, msgspec.json.encode(found).decode())

    title = f"Measuring what each matrix of {job.checkpoint.name} loses"
    with console.step(title), cache.workplace("sensitivity", named) as work:
        folder, _ = cache.folder("sensitivity", named, fill)
    units = _read_units(folder)
    elsewhere = [part for part in parts if part.name != DECODER]
    units = [_everywhere(unit, elsewhere) for unit in units]
    own = {name for unit in units for name in unit.options[0].formats}
    rest = [(fmt, part.shapes()[name]) for part in parts for name, fmt in part.plan.formats.items() if name not in own]
    limits = job.budget
    if limits == Budget():
        preset = replace(job, scheme=job.target.quant)
        limits = Budget(sum(plan_weights(preset, part.models).ideal_bytes(part.shapes()) for part in parts))
    return budget.choose(units, sum(fmt.nbytes(shape) for fmt, shape in rest), limits)


def priced(
    job: Job, parts: Sequence[Built], task: sensitivity.Task, reader: WeightReader, work: Path, console: Console
) -> list[budget.Unit]:
    """What each unit of the decoder may be stored as, and costs: measured with the nearest integers and, where GPTQ is
    to choose those of 4 bits, by the share of their error that it leaves. `work` is nobody else's."""
    from edgeexport import calibrate as calibration
    from edgeexport import sensitivity

    model = decoder_of(parts).models[0]
    rows = calibration.rows_of(model, reader.rows)
    listed = sensitivity.units(task)
    measured = work / UNITS  # a killed run's, that ended among GPTQ's stages
    if measured.is_file():
        units = _read_units(work)
    else:
        with console.progress(f"Measuring {job.checkpoint.name}", unit="steps") as progress:
            calls = short_calls(job, parts, reader, len(listed))
            units = sensitivity.measure(task, calls, rows, work / "kl", progress)
        write_whole(work, UNITS, msgspec.json.encode(units).decode())
    if job.calibration.method != "gptq":
        return units
    formats = {name: task.probe(name) for names in listed for name in names}
    plan = QuantPlan(PROBE, task.classes, formats)
    probe = calibration.Task(model, plan, "gptq", calibration.wanted(model, plan), job.calibration.device)
    with console.progress(f"Calibrating {job.checkpoint.name}", unit="steps") as progress:
        store = calibration.run(probe, partial(calibration_calls, job, parts, reader), rows, work / "gptq", progress)
    shares = {name: entry.share for name, entry in store.entries.items() if entry.share is not None}
    return sensitivity.by_gptq(units, shares)


def _read_units(folder: Path) -> list[budget.Unit]:
    return msgspec.json.decode((folder / UNITS).read_bytes(), type=list[budget.Unit])


def _everywhere(unit: budget.Unit, parts: Sequence[Built]) -> budget.Unit:
    """A unit with the bytes of its matrices in other components, too: a tied table's."""

    def more(option: budget.Option) -> int:
        return sum(
            quant.FORMATS[fmt].nbytes(part.shapes()[name])
            for name, fmt in option.formats.items() for part in parts if name in part.plan.formats
        )  # fmt: skip

    return budget.Unit(tuple(msgspec.structs.replace(each, bytes=each.bytes + more(each)) for each in unit.options))


def short_calls(job: Job, parts: Sequence[Built], reader: WeightReader, units: int) -> list[Mapping[str, Array]]:
    """A few short sequences of different kinds, fewer for a model so large that they would take long."""
    weights = sum(math.prod(shape) for shape in decoder_of(parts).shapes().values())
    count = max(2, min(6, int(SHORT_WORK / (units * weights * SHORT_TOKENS))))
    calls = calibration_calls(job, parts, reader, tokens=1, length=SHORT_TOKENS, shows=False)
    step = len(calls) / min(count, len(calls))
    return [calls[int(at * step)] for at in range(min(count, len(calls)))]


def smooth(job: Job, parts: Sequence[Built], reader: WeightReader, cache: Cache, console: Console) -> list[Built]:
    """Move outliers of the decoder's activations into its weights, where the target's runtime rounds activations to
    int8 with a scale per token and the job calibrates. A GPU's do not round them."""
    from edgeexport import calibrate as calibration
    from edgeexport import smooth as smoothing

    method, decoder = job.calibration.method, decoder_of(parts)
    model = decoder.models[0]
    rounds = backends.load(job.target.backend).TRAITS.token_scales and not job.target.options.get("gpu", False)
    if method == "none" or not rounds or not smoothing.sites(model, decoder.plan):
        return list(parts)
    stored = {name: (fmt.name, name in decoder.plan.carried) for name, fmt in sorted(decoder.plan.formats.items())}
    chosen = method, job.calibration.digest
    named = key("smoothing", model.digest, job.weights_digest, stored, chosen, tool_versions(), code_digest())

    def fill(folder: Path) -> None:
        with console.progress(f"Smoothing {job.checkpoint.name}", unit="steps") as progress:
            calls = calibration_calls(job, parts, reader)
            found = smoothing.run(model, decoder.plan, calls, calibration.rows_of(model, reader.rows), progress)
        (folder / SMOOTHING).write_bytes(found.to_json())

    with console.step(f"Smoothing {job.checkpoint.name}"):
        folder, _ = cache.folder("smoothing", named, fill)
    found = Smoothing.from_json((folder / SMOOTHING).read_bytes())
    return [replace(part, smoothing=found) if part.name == DECODER else part for part in parts]


def calibrate(job: Job, parts: Sequence[Built], reader: WeightReader, cache: Cache, console: Console) -> list[Built]:
    """Choose the integers of the decoder's 4-bit weights by what they are fed, where the job asks for it."""
    from edgeexport import calibrate as calibration

    method = job.calibration.method
    decoder = decoder_of(parts)
    model = decoder.models[0]
    names = calibration.wanted(model, decoder.plan)
    if method == "none" or not names:
        return list(parts)
    formats = {name: decoder.plan.formats[name] for name in sorted(names)}
    chosen = method, job.calibration.digest, job.calibration.device, decoder.smoothing.digest
    named = key("codes", model.digest, job.weights_digest, formats, chosen, tool_versions(), code_digest())

    def fill(folder: Path) -> None:
        task = calibration.Task(model, decoder.plan, method, names, job.calibration.device)
        with console.progress(f"Calibrating {job.checkpoint.name}", unit="steps") as progress:
            smoothed = _smoothed(calibration.rows_of(model, reader.rows), decoder.smoothing)
            calls = partial(calibration_calls, job, parts, reader)
            calibration.run(task, calls, smoothed, work, progress).move(folder)

    # two builds of one model calibrate it once: the second waits, and finds the codes filed
    with console.step(f"Calibrating {job.checkpoint.name} by {method}"), cache.workplace("calibrate", named) as work:
        folder, _ = cache.folder("codes", named, fill)
    store = CodeStore(folder, load_index(folder))
    return [replace(part, codes=store) if part.name in (DECODER, "embed") else part for part in parts]


def _smoothed(rows: Rows, smoothing: Smoothing) -> Rows:
    """Weights as they are stored but for their rounding: their activations are those that the artifact will have."""
    return lambda name, start, stop: smoothing.smoothed(name, start, rows(name, start, stop))


def calibration_calls(
    job: Job, parts: Sequence[Built], reader: WeightReader, *, tokens: int = TOKENS, length: int = LENGTH,
    shows: bool = True,
) -> list[Mapping[str, Array]]:  # fmt: skip
    """What a decoder is fed while it is calibrated: about `tokens` of the calibration's texts in sequences of `length`
    at most and, where the model sees or hears and this `shows` it any, the conversations with pictures and sounds and
    the ladder's own, through the model's own encoders. Raises: UsageError `calibration-unusable`, and what is wrong
    with a picture or a sound."""
    from edgeexport.calibrate import rows_of
    from edgeexport.canonical.streaming import StreamedGraph
    from edgeexport.quant import calibration

    vocab = job.family.geometry(job.checkpoint.config).vocab

    def encode(document: calibration.Document) -> list[int]:
        text = document.text
        if document.messages:
            if job.chat_template is not None:
                text = job.chat_template.render(document.messages, add_generation_prompt=False)
            else:
                text = "\n\n".join(str(message["content"]) for message in document.messages)
        return [token for token in job.tokenizer.encode(text) if token < vocab]

    found = calibration.sequences(job.calibration.sources, encode, job.context, tokens, length)
    examples = [Example(each) for each in found]
    if job.contract is None:
        strangers = [each.where for each in _with_media(job.calibration)]
        if strangers:
            raise errors.calibration_unusable(Path(strangers[0]), f"{job.checkpoint.name} neither sees nor hears")
        return [Call(each.tokens, 0).inputs() for each in examples]

    graphs: dict[tuple[str, str], StreamedGraph] = {}

    def run(component: str, variant: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        part = next(part for part in parts if part.name == component)
        model = next(each for each in part.models if each.variant == variant)
        graph = graphs.setdefault((component, variant), StreamedGraph(model))
        return graph.run([inputs], rows_of(model, reader.rows)).outputs[0]

    calls: list[Mapping[str, Array]] = []
    inputs = Inputs(job.contract, run)
    if shows:
        examples += [_seen(document, encode(document), inputs, job) for document in _with_media(job.calibration)]
        examples += [case.example for case in shown(job).values()]
    for each in examples:
        fed = inputs.feed(each.tokens, [inputs.encode(prepared) for prepared in each.encoder_inputs], 0)
        calls.append(Call(fed.embeds, 0, fed.rope).inputs())
    give_back()
    return calls


def _with_media(chosen: Calibration) -> list[Document]:
    """The conversations that show a picture or a sound."""
    return [document for source in chosen.sources for document in source.documents if document.media]


def _seen(document: Document, tokens: Sequence[int], inputs: Inputs, job: Job) -> Example:
    """A conversation with its pictures and sounds, as the model takes it."""
    prepared = [
        inputs.prepare_image(read_image(medium.data)) if medium.kind == "image"
        else inputs.prepare_audio(read_wav(medium.data))
        for medium in document.media
    ]  # fmt: skip
    expanded = inputs.expand(tokens, prepared)
    if len(expanded) > job.context:
        long = f"it takes {len(expanded)} tokens and the context has {job.context}"
        raise errors.calibration_unusable(Path(document.where), long)
    return Example(np.array(expanded, np.int64), tuple(prepared))
