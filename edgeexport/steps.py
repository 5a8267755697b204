"""The steps of the walk, each between two of the house's rooms: cached where that pays, narrated, and nothing else."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from edgeexport import backends, errors, quant, targets
from edgeexport.bench import peak_rss
from edgeexport.bundle import manifest as manifests
from edgeexport.bundle.bundle import open_bundle
from edgeexport.bundle.cache import Cache, key
from edgeexport.bundle.writer import BundleWriter
from edgeexport.checkpoint import WeightReader, content_digest, open_checkpoint
from edgeexport.console import Console
from edgeexport.core import (
    LEVELS,
    Array,
    Artifact,
    CanonicalModel,
    Checkpoint,
    Finding,
    ParityResult,
    Progress,
    QuantPlan,
    StoredWeight,
    Target,
    TensorRef,
    worst,
)
from edgeexport.families.decoder import DecoderFamily
from edgeexport.quant.source import PlannedWeights
from edgeexport.session.tokenizer import SpecialTokens, special_tokens
from edgeexport.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from edgeexport.parity.ladder import Climb

PROMPTS = 4
ANSWER_TOKENS = 16
"""The ladder's greedy answers: PROMPTS texts, ANSWER_TOKENS each. `benchmarks/` asks for more."""

TOOLS = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")
"""Packages whose version may change an artifact."""


@dataclass(frozen=True)
class Job:
    """What is to be built, settled before anything is read."""

    checkpoint: Checkpoint
    target: Target
    scheme: str
    context: int
    parity: str
    family: DecoderFamily

    @cached_property
    def tokenizer_files(self) -> Mapping[str, bytes]:
        """The tokenizer's files; a second's work for a GGUF, so done once."""
        return self.checkpoint.read_tokenizer()

    @cached_property
    def special_tokens(self) -> SpecialTokens:
        """Special tokens and stop ids, from the tokenizer's files; config.json stands in for a generation config that
        is missing, as in transformers."""
        stand_in = {"eos_token_id": self.checkpoint.config.get("eos_token_id")}
        return special_tokens({"generation_config.json": json.dumps(stand_in).encode(), **self.tokenizer_files})

    @cached_property
    def weights_digest(self) -> str:
        """sha256 over the checkpoint's bytes; remembered between builds by the files' identity."""
        return content_digest(self.checkpoint)

    @cached_property
    def trace_key(self) -> str:
        """Names the canonical graph: the config and tensor index, the context, our code and torch's version."""
        return key("trace", self.checkpoint.header_digest, self.context, code_digest(), tool_versions())

    @cached_property
    def compile_key(self) -> str:
        """Names the artifact: the graph, the weights' bytes, the target and the scheme."""
        return key("compile", self.trace_key, self.weights_digest, self.target.source, self.target.name, self.scheme)

    @cached_property
    def build_key(self) -> str:
        """Names the bundle: the artifact, the tokenizer and how far the ladder was climbed."""
        files = {name: hashlib.sha256(data).hexdigest() for name, data in self.tokenizer_files.items()}
        return key("bundle", self.compile_key, files, self.parity)


def tool_versions() -> dict[str, str]:
    """Versions of `TOOLS` from their metadata: importing them takes seconds."""
    found = {}
    for name in TOOLS:
        try:
            found[name] = version(name)
        except PackageNotFoundError as problem:
            raise errors.missing_package(name, "build") from problem
    return found


def code_digest() -> str:
    """sha256 over this package's own sources: another compiler, another result."""
    state = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        state.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return state.hexdigest()


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
    """Raise what is wrong with the tokenizer now, not after minutes of work on the weights; returns remarks."""
    return [] if job.special_tokens.stop_ids else [errors.no_stop_token(job.checkpoint.path)]


def announce(console: Console, plan: Mapping[str, Any], destination: Path) -> None:
    """The resolved plan, before any work."""
    model, cost = plan["model"], plan["build"]
    console.say(
        f"{model['name']} ({model['model_type']}, {model['parameters'] / 1e6:.0f}M parameters) for "
        f"{plan['target']['name']}: {plan['scheme']}, context {plan['context']}, about "
        f"{format_bytes(plan['bytes']['artifact'])}, {format_seconds(cost['seconds'])} -> {destination}"
    )


def up_to_date(job: Job, destination: Path, console: Console) -> tuple[int, int, list[ParityResult]] | None:
    """(size, ideal size, parity rows) of the bundle already there when it is this very build's, else None."""
    try:
        bundle = open_bundle(destination)
    except errors.BundleError:
        return None
    if bundle.manifest.build_key != job.build_key:
        return None
    from edgeexport.parity.report import read_results

    report = json.loads((destination / "parity.json").read_bytes())
    sizes = report["sizes"]
    return int(sizes["artifact_bytes"]), int(sizes["ideal_bytes"]), read_results(report)


def trace(job: Job, cache: Cache, console: Console) -> CanonicalModel:
    """The decoder's canonical graph, traced or from the cache. The weights are hashed meanwhile on the other core."""
    component = job.family.components(job.checkpoint, job.context)[0]
    hashing = threading.Thread(target=lambda: job.weights_digest, daemon=True)
    hashing.start()
    traced: list[CanonicalModel] = []

    def fill(folder: Path) -> None:
        from edgeexport.canonical import store
        from edgeexport.canonical.trace import trace as trace_component

        with console.progress("Tracing", unit="steps") as progress:
            traced.append(trace_component(component, job.checkpoint.tensors, progress))
        store.save(traced[0], folder)

    with console.step(f"Tracing {job.checkpoint.name}"):
        folder, cached = cache.folder("trace", job.trace_key, fill)
    hashing.join()
    if cached:
        from edgeexport.canonical import store

        return store.load(folder, component, job.checkpoint.tensors)
    return traced[0]


def plan_weights(job: Job, model: CanonicalModel) -> QuantPlan:
    """Which weight gets which format, by its use in the graph."""
    from edgeexport.canonical.dialect import classes

    shapes = {name: ref.shape for name, ref in model.weights.items()}
    return quant.plan(shapes, classes(model.graph, model.weights), job.scheme)


def check(job: Job, model: CanonicalModel, storage: QuantPlan) -> None:
    """Raise LoweringError with every node that the backend refuses, before a weight is read."""
    findings = backends.load(job.target.backend).check(model, job.target, storage)
    refused = [finding for finding in findings if finding.severity == "error"]
    if refused:
        raise errors.LoweringError(*refused)


def compile(
    job: Job, model: CanonicalModel, storage: QuantPlan, reader: WeightReader, cache: Cache, console: Console
) -> tuple[Path, Artifact]:
    """The artifact's folder in the cache, and what it holds."""

    def fill(folder: Path) -> None:
        source = PlannedWeights(reader, model.weights, storage)
        backend = backends.load(job.target.backend)
        with console.progress("Writing weights", unit="steps") as progress:
            artifact = backend.compile(model, job.target, storage, source, folder, progress)
        (folder / "artifact.json").write_bytes(msgspec.json.encode(artifact))

    with console.step(f"Compiling {model.component} for {job.target.name}"):
        folder, _ = cache.folder("compile", job.compile_key, fill)
    return folder, msgspec.json.decode((folder / "artifact.json").read_bytes(), type=Artifact)


def climb(
    job: Job,
    model: CanonicalModel,
    storage: QuantPlan,
    folder: Path,
    artifact: Artifact,
    reader: WeightReader,
    console: Console,
) -> Climb:
    """Climb the parity ladder over the files in `folder`."""
    from edgeexport.backends.storage import read_rows
    from edgeexport.parity import ladder, prompts

    tensors = job.checkpoint.tensors
    initializers = {ref.name: name for name, ref in model.weights.items()}
    runner = backends.load_runner(job.target.backend)

    def checkpoint_rows(name: str, start: int, stop: int) -> Array:
        return reader.rows(tensors[name], start, stop)

    def stored_rows(name: str, start: int, stop: int) -> Array:
        shape = tensors[name].shape
        rows = read_rows(folder, artifact.weights[initializers[name]], start, stop)
        return rows.reshape(-1, *shape[1:]) if len(shape) > 1 else rows.reshape(-1)

    def open_runner(*, exact: bool = False) -> Any:
        return runner.open_decoder(folder, artifact, threads=None, exact=exact)

    @contextmanager
    def watch(title: str) -> Iterator[Progress]:
        with console.step(title), console.progress(title, unit="steps") as progress:
            yield progress

    vocab = job.family.geometry(job.checkpoint.config).vocab
    subject = ladder.Subject(
        model=model,
        plan=storage,
        config=job.checkpoint.config,
        tensors=tensors,
        unused=job.family.unused(job.checkpoint),
        checkpoint_rows=checkpoint_rows,
        stored_rows=stored_rows,
        read_signature=lambda: runner.read_signature(folder, artifact),
        open_runner=open_runner,
        prompts=prompts.encode(job.tokenizer_files["tokenizer.json"], vocab, job.context)[:PROMPTS],
        answer_tokens=ANSWER_TOKENS,
        overrides=job.target.parity,
    )
    return ladder.climb(subject, job.parity, watch)


def sizes(folder: Path, artifact: Artifact, model: CanonicalModel, storage: QuantPlan) -> tuple[int, int]:
    """(bytes of the artifact's graph and weights, bytes the scheme needs by arithmetic). An `.ort` twin is not counted
    twice."""
    files = [name for name in artifact.files if not name.endswith(".ort")]
    ideal = storage.ideal_bytes({name: ref.shape for name, ref in model.weights.items()})
    return sum((folder / name).stat().st_size for name in files), ideal


def write_bundle(
    job: Job, storage: QuantPlan, folder: Path, artifact: Artifact, climb: Climb, destination: Path, *, force: bool
) -> None:
    """Put everything into OUT/<model>-<target>/, at once or not at all."""
    from safetensors.numpy import save

    from edgeexport.parity.report import Extra, write_html, write_json

    geometry = job.family.geometry(job.checkpoint.config)
    shapes = {name: weight.shape for name, weight in artifact.weights.items()}
    size = sum((folder / name).stat().st_size for name in artifact.files if not name.endswith(".ort"))
    ideal = storage.ideal_bytes(shapes)
    extra = Extra(
        model=job.checkpoint.name,
        target=job.target.name,
        scheme=job.scheme,
        drift=climb.drift,
        weights=climb.weights,
        sizes={
            "artifact_bytes": size,
            "ideal_bytes": ideal,
            "artifact_to_ideal": size / ideal,
            "kv_cache_bytes": geometry.kv_bytes_per_token(4) * job.context,
        },
    )
    with BundleWriter(destination, force=force) as writer:
        for name in artifact.files:
            writer.add_file(name, folder / name)
        writer.add_bytes(f"{artifact.component}.weights.json", _pretty(artifact.weights))
        for name, data in sorted(job.tokenizer_files.items()):
            writer.add_bytes(f"tokenizer/{name}", data)
        golden = manifests.Golden(not_run=f"--parity {job.parity} runs no reference")
        if climb.golden:
            writer.add_bytes("golden/golden.safetensors", save(dict(climb.golden)))
            golden = manifests.Golden("golden/golden.safetensors", manifests.Gates(**climb.golden_gates))
        writer.add_bytes("parity.json", write_json(climb.results, extra))
        writer.add_bytes("parity.html", write_html(climb.results, extra))
        writer.commit(
            manifests.Manifest(
                edgeexport=_own_version(),
                build_key=job.build_key,
                model=manifests.Model(
                    job.checkpoint.name,
                    job.checkpoint.model_type,
                    sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes.values()),
                    job.weights_digest,
                ),
                target=manifests.Target(
                    job.target.name,
                    job.target.platform,
                    job.target.title,
                    dict(job.target.options),
                    dict(job.target.limits),
                ),
                quantisation=job.scheme,
                components=(
                    manifests.Component(
                        artifact.component,
                        artifact.backend,
                        artifact.files,
                        manifests.signatures_of(artifact),
                        artifact.state,
                        manifests.KVLayout(
                            geometry.layers, geometry.kv_heads, geometry.head_dim, job.context, "float32"
                        ),
                        manifests.weight_classes(storage, shapes),
                    ),
                ),
                files=writer.files,
                golden=golden,
                text=manifests.TextContract(job.special_tokens.stop_ids, dict(job.special_tokens.names)),
                tools=tool_versions(),
                parity={
                    level: worst(row for row in climb.results if row.level == level)  # type: ignore[misc]
                    for level in LEVELS
                },
            )
        )


def job_of_bundle(folder: Path, model: str, level: str) -> tuple[Job, Artifact]:
    """The job that made a bundle, to climb its ladder again. Raises `bundle-of-another-model`."""
    from edgeexport import families

    bundle = open_bundle(folder)
    manifest, component = bundle.manifest, bundle.manifest.components[0]
    checkpoint = open_checkpoint(model)
    context = component.kv.context if component.kv else 0
    job = Job(
        checkpoint,
        targets.load(manifest.target.name),
        manifest.quantisation,
        context,
        level,
        families.find(checkpoint.model_type),
    )
    if job.weights_digest != manifest.model.checkpoint_digest:
        raise errors.bundle_of_another_model(folder, manifest.model.checkpoint_digest, job.weights_digest)
    weights = msgspec.json.decode(
        (folder / f"{component.name}.weights.json").read_bytes(), type=dict[str, StoredWeight]
    )
    return job, Artifact(component.name, component.backend, component.files, (), component.state, weights, {})


def stored_weights(bundle: Path, component: str = "decoder") -> dict[str, StoredWeight]:
    """Where a bundle's artifact keeps each weight, by the canonical graph's names."""
    return msgspec.json.decode((bundle / f"{component}.weights.json").read_bytes(), type=dict[str, StoredWeight])


def write_canonical(
    model: CanonicalModel, out: Path, reader: WeightReader, console: Console, *, reference_weights: bool
) -> Path:
    """The canonical graph as ONNX in the folder `out`."""
    from edgeexport.canonical import store

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise errors.output_not_writable(out, str(problem)) from problem
    if reference_weights:
        return store.write_reference_onnx(model, out)

    def rows(ref: TensorRef, start: int, stop: int) -> Array:
        plain = ref.encoding in ("F32", "F16", "BF16") and ref.transform is None
        return reader.raw(ref, start, stop) if plain else reader.rows(ref, start, stop)

    with console.step("Writing the canonical graph"), console.progress("Writing weights", unit="steps") as progress:
        return store.write_onnx(model, out, rows, progress)


def dump(folder: Path, model: CanonicalModel, storage: QuantPlan, compiled: Path, artifact: Artifact) -> None:
    """Every step's result without its weights: the canonical graph, the plan, the lowered graph."""
    from edgeexport.canonical import store

    try:
        folder.mkdir(parents=True, exist_ok=True)
        store.save(model, folder)
        (folder / store.GRAPH_FILE).rename(folder / f"{model.component}.canonical.onnx")
        (folder / "plan.json").write_bytes(_pretty(asdict(storage)))
        for name in artifact.files:
            if name.endswith(".onnx"):
                (folder / f"{artifact.component}.lowered.onnx").write_bytes((compiled / name).read_bytes())
    except OSError as problem:
        raise errors.output_not_writable(folder, str(problem)) from problem


def memory_findings(max_rss: int | None) -> list[Finding]:
    """A warning when the build needed more than it was allowed: the estimate was wrong, and that should be known."""
    peak = peak_rss()
    return [errors.max_rss_exceeded(max_rss, peak)] if max_rss is not None and peak > max_rss else []


def _pretty(value: Any) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value, order="deterministic"), indent=1) + b"\n"


def _own_version() -> str:
    from edgeexport import __version__

    return __version__
