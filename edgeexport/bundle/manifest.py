"""manifest.json: what a bundle holds, as typed structs, written and read strictly (schema edgeexport.bundle/1)."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Struct

from edgeexport import core, errors, strict_json
from edgeexport.core import Verdict
from edgeexport.limits import UNTRUSTED

SCHEMA: Final = "edgeexport.bundle/1"
FILE = "manifest.json"
DIGEST_FILE = "manifest.json.sha256"
"""Holds the hex sha256 of manifest.json and a newline, since the manifest cannot hold its own."""
MAX_BYTES = 16 << 20

Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Positive = Annotated[int, Meta(ge=1, le=2**63 - 1)]
Text = Annotated[str, Meta(min_length=1, max_length=4096)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Gate = Annotated[float, Meta(ge=0.0, le=1e4)]
"""Beyond this a gate says nothing; gate_bounds.py has what a scheme's may be."""


class FileEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """Size in bytes and hex sha256 of one file."""

    size: Count
    sha256: Sha256


class Dim(Struct, frozen=True, forbid_unknown_fields=True):
    """A symbolic dimension and its inclusive bounds."""

    name: Text
    min: Count
    max: Count


class Tensor(Struct, frozen=True, forbid_unknown_fields=True):
    """Name, dtype and shape of an input or output."""

    name: Text
    dtype: Text
    shape: tuple[Count | Dim, ...]


class Signature(Struct, frozen=True, forbid_unknown_fields=True):
    """One callable of an artifact: the file that holds it is one of the component's."""

    name: Text
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    file: str = ""


class KVLayout(Struct, frozen=True, forbid_unknown_fields=True):
    """The cache: per layer a key and a value [1, kv_heads, context, head_dim] of `dtype`."""

    layers: Positive
    kv_heads: Positive
    head_dim: Positive
    context: Positive
    dtype: Text

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values that one token adds over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * core.BITS[self.dtype] // 8


class WeightClass(Struct, frozen=True, forbid_unknown_fields=True):
    """How many tensors of one class are stored in one format, and their bytes with scales."""

    tensor_class: core.TensorClass
    format: Text
    count: Count
    bytes: Count


class Component(Struct, frozen=True, forbid_unknown_fields=True):
    """A part of the model and its artifact. `state` pairs each cache input with the output that replaces it."""

    name: Text
    backend: Text
    files: tuple[Text, ...]
    signatures: tuple[Signature, ...]
    state: tuple[tuple[Text, Text], ...] = ()
    kv: KVLayout | None = None
    weights: tuple[WeightClass, ...] = ()


class Target(Struct, frozen=True, forbid_unknown_fields=True):
    """The target the bundle was built for."""

    name: Text
    platform: Text
    title: str
    options: dict[str, Any] = {}
    limits: dict[str, Any] = {}


class Model(Struct, frozen=True, forbid_unknown_fields=True):
    """The model; `parameters` counts weights' elements, tied ones once."""

    name: Text
    model_type: Text
    parameters: Count
    checkpoint_digest: Text


class TextContract(Struct, frozen=True, forbid_unknown_fields=True):
    """Ids that end an answer, and the special tokens that chat templates may name (bos_token and the like)."""

    stop_ids: tuple[Count, ...] = ()
    special_tokens: dict[str, str] = {}


class Gates(Struct, frozen=True, forbid_unknown_fields=True):
    """`max_abs`: largest difference of logits from the artifact's on the build host. `kl`: largest mean KL divergence,
    in nats, of the artifact's next-token distribution from the reference's."""

    max_abs: Gate | None = None
    kl: Gate | None = None


class GoldenMedium(Struct, frozen=True, forbid_unknown_fields=True):
    """A picture or a sound that a prompt of the golden vectors shows."""

    kind: Literal["image", "audio"]
    file: Text


class GoldenCase(Struct, frozen=True, forbid_unknown_fields=True):
    """Golden vectors of a prompt with pictures or sound, in the order in which the prompt has them."""

    name: Text
    file: Text
    media: tuple[GoldenMedium, ...]


class Golden(Struct, frozen=True, forbid_unknown_fields=True):
    """Golden vectors and the gates they must pass, or the reason why there are none. `file` is a prompt of text alone;
    `shown` are those of the other modalities, `chat` conversations with their text and tokens."""

    file: str | None = None
    chat: str | None = None
    shown: tuple[GoldenCase, ...] = ()
    gates: Gates = Gates()
    not_run: str = ""


class Calibration(Struct, frozen=True, forbid_unknown_fields=True):
    """How the decoder's integers of 4 bits were chosen: where most of them come from, the method, and sha256 of the
    texts and of the integers. Equal codes give equal files; another type of processor may choose a few of them
    otherwise."""

    provenance: core.Provenance
    method: Literal["none", "search", "gptq"] = "none"
    texts: str = ""
    codes: str = ""


class Manifest(Struct, frozen=True, forbid_unknown_fields=True):
    """All of manifest.json. `files` lists every file but the manifest and its digest file, by POSIX path;
    `preprocess` names the contract of pictures and sound, where the model takes them."""

    edgeexport: Text
    build_key: Text
    model: Model
    target: Target
    quantisation: Text
    components: tuple[Component, ...]
    files: dict[str, FileEntry]
    golden: Golden
    text: TextContract | None = None
    preprocess: str | None = None
    calibration: Calibration | None = None
    tools: dict[str, str] = {}
    parity: dict[Literal["L1", "L2", "L3", "L4", "L5"], Verdict] = {}
    schema: Literal["edgeexport.bundle/1"] = SCHEMA

    def component(self, name: str) -> Component | None:
        """The component of this name, or None."""
        return next((component for component in self.components if component.name == name), None)


def schema() -> dict[str, Any]:
    """The JSON schema document of manifest.json."""
    document = msgspec.json.schema(Manifest)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": SCHEMA, **document}


def to_json(manifest: Manifest) -> bytes:
    """The one text of this manifest: ASCII, sorted keys, two spaces, a newline at the end.

    Raises bundle-bad-manifest when `from_json` would refuse it, so that no bundle is written that cannot be read.
    """
    _refuse_contradictions(manifest, FILE)
    plain = msgspec.to_builtins(manifest)
    try:
        text = json.dumps(plain, sort_keys=True, indent=2, allow_nan=False)
    except ValueError as error:
        raise errors.bundle_bad_manifest(FILE, f"a number is not finite: {error}") from error
    return f"{text}\n".encode("ascii")


def from_json(data: bytes, where: object = FILE) -> Manifest:
    """Read a manifest that anyone may have written.

    Raises bundle-too-new for another version of the schema, bundle-bad-manifest for everything else that is wrong.
    """
    if len(data) > MAX_BYTES:
        raise errors.bundle_bad_manifest(where, f"it has {len(data)} bytes, more than {MAX_BYTES}")
    try:
        found = strict_json.parse(data)
    except ValueError as error:
        raise errors.bundle_bad_manifest(where, f"it is not strict JSON: {error}") from error
    named = found.get("schema") if isinstance(found, dict) else None
    if not isinstance(named, str):
        raise errors.bundle_bad_manifest(where, f'it does not say "schema": "{SCHEMA}"')
    if named != SCHEMA:
        if named.startswith("edgeexport.bundle/"):
            raise errors.bundle_too_new(where, named[:80], SCHEMA)
        raise errors.bundle_bad_manifest(where, f"its schema is {errors.shown(named)}, not {SCHEMA}")
    try:
        manifest = msgspec.convert(found, Manifest)
    except (msgspec.ValidationError, OverflowError) as error:
        raise errors.bundle_bad_manifest(where, str(error)[:400]) from error
    _refuse_contradictions(manifest, where)
    return manifest


def signatures_of(artifact: core.Artifact) -> tuple[Signature, ...]:
    """An artifact's signatures as the manifest writes them."""
    return tuple(
        Signature(signature.name, _tensors(signature.inputs), _tensors(signature.outputs), signature.file)
        for signature in artifact.signatures
    )


def weight_classes(plan: core.QuantPlan, shapes: dict[str, tuple[int, ...]]) -> tuple[WeightClass, ...]:
    """Count and bytes of a plan's tensors per class and format, in the order of their names."""
    sums: dict[tuple[core.TensorClass, str], tuple[int, int]] = {}
    for name, form in plan.formats.items():
        key = (plan.classes[name], form.name)
        count, total = sums.get(key, (0, 0))
        sums[key] = (count + 1, total + form.nbytes(shapes[name]))
    return tuple(WeightClass(*key, *sums[key]) for key in sorted(sums))


def path_problem(path: str) -> str | None:
    """Why a path must not be in a manifest, or None. Paths are relative, POSIX, and stay inside the bundle."""
    if not path or len(path) > 1024:
        return "is empty or longer than 1024 characters"
    if not path.isprintable() or "\\" in path or ":" in path:
        return "has a control character, a backslash or a colon"
    # file systems take names of up to 255 bytes; isprintable has ruled out lone surrogates
    if any(len(part.encode("utf-8")) > 255 for part in path.split("/")):
        return "has a part longer than 255 bytes"
    if path.startswith("/"):
        return "is absolute"
    if any(part in {"", ".", ".."} for part in path.split("/")):
        return "has an empty part, . or .."
    if path.count("/") >= UNTRUSTED.path_parts:
        return f"goes through {UNTRUSTED.path_parts} folders or more"
    return None


def _tensors(specs: Iterable[core.TensorSpec]) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(
            spec.name,
            spec.dtype,
            tuple(Dim(dim.name, dim.min, dim.max) if isinstance(dim, core.Dim) else dim for dim in spec.shape),
        )
        for spec in specs
    )


def _refuse_contradictions(manifest: Manifest, where: object) -> None:
    """What the types cannot say. Raises bundle-bad-manifest with the first problem."""
    problem = next(_contradictions(manifest), None)
    if problem is not None:
        raise errors.bundle_bad_manifest(where, problem)


def _contradictions(manifest: Manifest) -> Iterator[str]:
    yield from _path_contradictions(manifest.files)
    names = [component.name for component in manifest.components]
    if len(set(names)) != len(names):
        yield "two components have the same name"
    for component in manifest.components:
        yield from _component_contradictions(component, manifest.files)
    if manifest.preprocess is not None and manifest.preprocess not in manifest.files:
        yield f"preprocess names a file that is not listed: {manifest.preprocess!r}"
    golden = manifest.golden
    if golden.file is None and not golden.not_run:
        yield "golden has neither a file nor a reason in not_run"
    if golden.file is not None:
        if golden.file not in manifest.files:
            yield f"golden names a file that is not listed: {golden.file!r}"
        if golden.not_run:
            yield "golden has a file and a reason why there is none"
        if golden.chat is not None and golden.chat not in manifest.files:
            yield f"golden names a file that is not listed: {golden.chat!r}"
        for case in golden.shown:
            for path in (case.file, *(medium.file for medium in case.media)):
                if path not in manifest.files:
                    yield f"golden names a file that is not listed: {path!r}"
        if golden.gates.max_abs is None and golden.gates.kl is None:
            yield "golden has a file but no gate"


def _path_contradictions(files: dict[str, FileEntry]) -> Iterator[str]:
    # macOS and Windows take names that differ in case or Unicode form for the same file
    taken = {FILE: FILE, DIGEST_FILE: DIGEST_FILE}
    for path in files:
        problem = path_problem(path)
        if problem is not None:
            yield f"the path {path!r} {problem}"
            continue
        folded = _folded(path)
        if folded in taken:
            yield f"the paths {path!r} and {taken[folded]!r} are the same file on some systems"
        taken[folded] = path
    for path in files:
        parts = _folded(path).split("/")
        if any("/".join(parts[:depth]) in taken for depth in range(1, len(parts))):
            yield f"the path {path!r} goes through a file"


def _component_contradictions(component: Component, files: dict[str, FileEntry]) -> Iterator[str]:
    for path in component.files:
        if path not in files:
            yield f"component {component.name} names a file that is not listed: {path!r}"
    if component.kv is not None and component.kv.dtype not in core.BITS:
        yield f"component {component.name} has a cache of unknown dtype {component.kv.dtype!r}"
    inputs: set[str] = set()
    outputs: set[str] = set()
    own = {"", *component.files}
    for signature in component.signatures:
        if signature.file not in own:
            yield f"signature {signature.name} is in a file that is not the component's: {signature.file!r}"
        for tensors, seen in ((signature.inputs, inputs), (signature.outputs, outputs)):
            names = [tensor.name for tensor in tensors]
            if len(set(names)) != len(names):
                yield f"signature {signature.name} has two values of the same name"
            seen.update(names)
            for tensor in tensors:
                if tensor.dtype not in core.BITS:
                    yield f"{tensor.name} has an unknown dtype {tensor.dtype!r}"
                if any(isinstance(dim, Dim) and dim.min > dim.max for dim in tensor.shape):
                    yield f"{tensor.name} has a dimension whose min is above its max"
    for source, replacement in component.state:
        if source not in inputs or replacement not in outputs:
            yield f"component {component.name} has a state that is no input and output: {source!r}, {replacement!r}"


def _folded(path: str) -> str:
    return unicodedata.normalize("NFC", path).casefold()
