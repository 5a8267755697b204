"""The last step: all that was made and measured, as one bundle; and a bundle read back as the job it came from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from edgeexport import backends, errors, families, stored, targets
from edgeexport.bundle import conformance
from edgeexport.bundle import manifest as manifests
from edgeexport.bundle.bundle import Bundle, open_bundle
from edgeexport.bundle.verify import verify
from edgeexport.bundle.writer import BundleWriter
from edgeexport.core import BITS, LEVELS, Artifact, ParityResult, StoredWeight, worst
from edgeexport.job import Job, tool_versions
from edgeexport.quant import budget
from edgeexport.quant.smoothing import FILE as SMOOTHING
from edgeexport.quant.smoothing import NOTHING, Smoothing
from edgeexport.session import preprocess
from edgeexport.steps import DECODER, Built, decoder_of

if TYPE_CHECKING:
    from edgeexport.parity.examples import Shown
    from edgeexport.parity.ladder import Climb

MAX_SMOOTHING_BYTES = 64 << 20
TEXT = "text"
"""The ladder's name for its prompt of text alone."""


def up_to_date(
    job: Job, destination: Path, *, force: bool
) -> tuple[int, int, list[ParityResult], list[Mapping[str, Any]]] | None:
    """(size, ideal size, parity rows, answers) of the bundle already there when it is this very build's, every byte of
    it, else None. Raises: UsageError `output-exists` for one that was damaged and is not to be replaced."""
    try:
        bundle = open_bundle(destination)
    except errors.BundleError:
        return None
    if bundle.manifest.build_key != job.build_key:
        return None
    damage = verify(destination, golden=False).findings
    if damage and not force:
        raise errors.output_exists(destination, f"it is this build's bundle, and damaged: {damage[0].what}")
    if damage:
        return None
    from edgeexport.parity import report_file

    report = report_file.read(bundle.read(report_file.FILE, report_file.MAX_BYTES), destination / report_file.FILE)
    extra = report.extra()
    sizes = [extra["sizes"].get(name, 0) for name in ("artifact_bytes", "ideal_bytes")]
    if not all(math.isfinite(size) for size in sizes):
        raise errors.parity_report_bad(destination / report_file.FILE, "a size is not finite")
    return int(sizes[0]), int(sizes[1]), report.rows(), list(extra["answers"])


def sizes(parts: Sequence[Built]) -> tuple[int, int]:
    """(bytes of the artifacts' graphs and weights, bytes the scheme needs by arithmetic). A twin, `.ort` or `.engine`,
    is not counted twice."""
    size = sum(
        (folder / name).stat().st_size
        for folder, artifact in (part.files for part in parts)
        for name in artifact.files
        if not name.endswith((".ort", ".engine"))
    )
    return size, sum(part.plan.ideal_bytes(part.shapes()) for part in parts)


def write_bundle(
    job: Job, parts: Sequence[Built], climb: Climb, shown: Mapping[str, Shown], destination: Path, *, force: bool
) -> None:
    """Put everything into OUT/<model>-<target>/, at once or not at all."""
    from edgeexport.parity.report import Extra, write_html, write_json

    geometry = job.family.geometry(job.checkpoint.config)
    size, ideal = sizes(parts)
    extra = Extra(
        model=job.checkpoint.name,
        target=job.target.name,
        scheme=job.scheme,
        drift=climb.drift,
        weights=climb.weights,
        answers=climb.answers,
        sizes={
            "artifact_bytes": size,
            "ideal_bytes": ideal,
            "artifact_to_ideal": size / ideal,
            "kv_cache_bytes": geometry.kv_bytes_per_token(BITS[job.target.precision] // 8) * job.context,
        },
    )
    cache = manifests.KVLayout(geometry.layers, geometry.kv_heads, geometry.head_dim, job.context, job.target.precision)
    with BundleWriter(destination, force=force) as writer:
        for part in parts:
            folder, artifact = part.files
            for name in artifact.files:
                writer.add_file(name, folder / name)
            writer.add_bytes(f"{artifact.component}.weights.json", pretty(artifact.weights))
            if part.smoothing:
                writer.add_bytes(f"{artifact.component}.{SMOOTHING}", part.smoothing.to_json())
        for name, data in sorted(job.tokenizer_files.items()):
            writer.add_bytes(f"tokenizer/{name}", data)
        for path, data in sorted(job.text_tables[0].items()):
            writer.add_bytes(path, data)
        _add_package(job, parts, writer)
        if job.choice is not None:
            writer.add_bytes(budget.FILE, budget.written(job.choice))
        if job.contract is not None:
            writer.add_bytes(preprocess.FILE, preprocess.to_json(job.contract))
        golden = _write_golden(job, climb, shown, writer)
        writer.add_bytes("parity.json", write_json(climb.results, extra))
        writer.add_bytes("parity.html", write_html(climb.results, extra))
        writer.commit(
            manifests.Manifest(
                edgeexport=_own_version(),
                build_key=job.build_key,
                model=manifests.Model(
                    job.checkpoint.name, job.checkpoint.model_type, _parameters(parts), job.weights_digest
                ),
                target=manifests.Target(
                    job.target.name,
                    job.target.platform,
                    job.target.title,
                    dict(job.target.options),
                    dict(job.target.limits),
                ),
                quantisation=job.scheme,
                components=tuple(_component(part, cache) for part in parts),
                files=writer.files,
                golden=golden,
                text=manifests.TextContract(job.special_tokens.stop_ids, dict(job.special_tokens.names)),
                preprocess=preprocess.FILE if job.contract is not None else None,
                calibration=_calibration(job, parts),
                tools={**tool_versions(), **{k: v for part in parts for k, v in part.files[1].tools.items()}},
                parity={
                    level: worst(row for row in climb.results if row.level == level)  # type: ignore[misc]
                    for level in LEVELS
                },
            )
        )


def _add_package(job: Job, parts: Sequence[Built], writer: BundleWriter) -> None:
    """The file that a runtime's own engine wants besides, where the backend writes one and the target asks for it."""
    write = backends.load(job.target.backend).TRAITS.package
    if write is None:
        return
    folder, artifact = decoder_of(parts).files
    with TemporaryDirectory() as temporary:
        made = write(
            job.target, artifact, folder, job.tokenizer_files, job.special_tokens.stop_ids, job.context, Path(temporary)
        )
        if made is not None:
            writer.add_file(made.name, made)


def _calibration(job: Job, parts: Sequence[Built]) -> manifests.Calibration | None:
    """How the decoder's integers were chosen; None where it has none of 4 bits."""
    decoder = decoder_of(parts)
    if not any(fmt.integer and fmt.bits == 4 for fmt in decoder.plan.formats.values()):
        return None
    if decoder.codes is None:
        return manifests.Calibration(decoder.provenance)
    how = job.calibration
    return manifests.Calibration(decoder.provenance, how.method, how.digest, decoder.codes.digest)


def _component(part: Built, cache: manifests.KVLayout) -> manifests.Component:
    _, artifact = part.files
    return manifests.Component(
        artifact.component,
        artifact.backend,
        artifact.files,
        manifests.signatures_of(artifact),
        artifact.state,
        cache if part.name == DECODER else None,
        manifests.weight_classes(part.plan, part.shapes()),
    )


def _parameters(parts: Sequence[Built]) -> int:
    """Elements of all weights, one that two components use counted once."""
    refs = {ref.name: ref for part in parts for ref in part.models[0].weights.values()}
    return sum(int(np.prod(ref.shape, dtype=np.int64)) for ref in refs.values())


def _write_golden(job: Job, climb: Climb, shown: Mapping[str, Shown], writer: BundleWriter) -> manifests.Golden:
    from safetensors.numpy import save

    if not climb.golden:
        return manifests.Golden(not_run=f"--parity {job.parity} runs no reference")
    files = {name: f"golden/{name}.safetensors" for name in climb.golden}
    for name, vectors in climb.golden.items():
        made = dict(vectors)
        if job.contract is not None and name in shown:
            example = shown[name].example
            made |= conformance.prepared(job.contract, example.tokens, example.encoder_inputs)
        writer.add_bytes(files[name], save(made))
    cases = []
    for name, case in shown.items():
        if name not in files:  # where the ladder ends at a level that asks a smaller picture instead
            continue
        media = []
        for kind, file, data in case.media:
            if f"golden/{file}" not in writer.files:
                writer.add_bytes(f"golden/{file}", data)
            media.append(manifests.GoldenMedium(kind, f"golden/{file}"))
        cases.append(manifests.GoldenCase(name, files[name], tuple(media)))
    chat = _write_chat(job, writer)
    return manifests.Golden(files[TEXT], chat, tuple(cases), manifests.Gates(**climb.golden_gates))


def _write_chat(job: Job, writer: BundleWriter) -> str | None:
    """Conversations with their tokens, for a model that has a chat template; gives the file's name."""

    template = job.chat_template
    if template is None or "strftime_now" in template.source:  # a text with today's date is another one tomorrow
        return None
    tokenizer = job.tokenizer
    pictures = job.contract is not None and job.contract.joining == "splice"
    writer.add_bytes(conformance.CHAT, pretty(conformance.chat_turns(template, tokenizer, pictures=pictures)))
    return conformance.CHAT


def job_of_bundle(folder: Path, model: str, level: str) -> Job:
    """The job that made a bundle, to climb its ladder again. Raises `bundle-of-another-model`."""
    bundle = open_bundle(folder)
    manifest, decoder = bundle.manifest, bundle.component(DECODER)
    checkpoint, family = families.open_model(model)
    context = decoder.kv.context if decoder.kv else 0
    choice = None
    if budget.FILE in manifest.files:
        bundle.check(budget.FILE)
        choice = budget.read(folder / budget.FILE)
    if manifest.target.name not in targets.names():  # `load` would take a path, too, and a bundle names none
        raise errors.unknown_target(manifest.target.name, targets.names())
    aim = targets.load(manifest.target.name)
    job = Job(checkpoint, aim, manifest.quantisation, context, level, family, choice=choice)
    if job.weights_digest != manifest.model.checkpoint_digest:
        raise errors.bundle_of_another_model(folder, manifest.model.checkpoint_digest, job.weights_digest)
    return job


def artifacts_of_bundle(folder: Path, parts: Sequence[Built]) -> list[Built]:
    """The components with the artifacts that a bundle holds of them."""
    bundle = open_bundle(folder)
    found = []
    for part in parts:
        component = bundle.component(part.name)
        weights = stored_weights(bundle, part.name, part.shapes())
        signatures: Any = component.signatures
        artifact = Artifact(part.name, component.backend, component.files, signatures, component.state, weights, {})
        how = bundle.manifest.calibration
        known = how.provenance if how is not None and part.name == DECODER else None
        smoothing = _smoothing_of(bundle, part)
        found.append(replace(part, folder=folder, artifact=artifact, known=known, smoothing=smoothing))
    return found


def _smoothing_of(bundle: Bundle, part: Built) -> Smoothing:
    """What was moved in a bundle's component. Raises: BundleError `bundle-bad-smoothing`."""
    name = f"{part.name}.{SMOOTHING}"
    if name not in bundle.manifest.files:
        return NOTHING
    try:
        found = Smoothing.from_json(bundle.read(name, MAX_SMOOTHING_BYTES))
        if not found.fit(part.shapes()):
            raise ValueError("it names weights that the model does not have, or of another shape")
    except (OSError, ValueError) as problem:
        raise errors.bundle_bad_smoothing(bundle.path / name, str(problem)) from problem
    return found


def stored_weights(bundle: Bundle, component: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, StoredWeight]:
    """Where a bundle's artifact keeps each of the weights of `shapes`, by the canonical graph's names. Raises:
    BundleError `bundle-bad-weights`."""
    name = f"{component}.weights.json"
    files = {file: bundle.manifest.files[file].size for file in bundle.component(component).files}
    return stored.from_json(bundle.read(name, stored.MAX_BYTES), bundle.path / name, files, shapes)


def dump(folder: Path, parts: Sequence[Built]) -> None:
    """Every step's result without its weights: the canonical graphs, the plans, the lowered graphs."""
    from edgeexport.canonical import store

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for part in parts:
            for model in part.models:
                store.save(model, folder)
                stem = f"{model.component}.{model.variant}" if model.variant else model.component
                (folder / store.GRAPH_FILE).rename(folder / f"{stem}.canonical.onnx")
            (folder / f"{part.name}.plan.json").write_bytes(pretty(asdict(part.plan)))
            compiled, artifact = part.files
            for name in artifact.files:
                if name.endswith(".onnx"):
                    (folder / f"{name.removesuffix('.onnx')}.lowered.onnx").write_bytes((compiled / name).read_bytes())
    except OSError as problem:
        raise errors.output_not_writable(folder, str(problem)) from problem


def pretty(value: Any) -> bytes:
    """A value as JSON for people, always the same bytes."""
    return msgspec.json.format(msgspec.json.encode(value, order="deterministic"), indent=1) + b"\n"


def _own_version() -> str:
    from edgeexport import __version__

    return __version__
