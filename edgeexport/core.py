"""The frozen values that pass between the steps of a build.

This module knows nothing else of ours and imports neither torch nor a vendor's SDK: every step can be
understood by reading what it takes and what it gives here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Severity = Literal["error", "warning", "note"]

BITS: Mapping[str, int] = {
    "float64": 64, "float32": 32, "float16": 16, "bfloat16": 16,
    "int64": 64, "int32": 32, "int16": 16, "int8": 8, "uint8": 8, "bool": 8, "int4": 4,
}  # fmt: skip
"""Bits of one element, by the dtype names used throughout (numpy's, plus bfloat16 and int4)."""


class Verdict(StrEnum):
    """The outcome of one comparison. NOT_RUN carries its reason in the note and is never shown as green."""

    PASS = "PASS"
    FAIL = "FAIL"
    AMBIGUOUS = "AMBIGUOUS"
    NOT_RUN = "NOT_RUN"


LEVELS = ("L1", "L2", "L3", "L4", "L5")
"""The rungs of the parity ladder, in the order they are climbed."""


QUOTED = 4000
"""Characters of one part of a finding: a path of the longest that systems take fits."""


def shortened(text: str) -> str:
    """The text, or the beginning and end of one that a hostile file made long: what errors quote may be megabytes."""
    if len(text) <= QUOTED:
        return text
    return f"{text[: QUOTED - 400]} [... {len(text)} characters in all ...] {text[-300:]}"


@dataclass(frozen=True)
class Finding:
    """One thing the user should know: an error, a warning or a note.

    `code` is kebab-case and permanent. `fix` has no default: its author must say what to do, or that nothing can
    be done and whose bug it is.
    """

    severity: Severity
    code: str
    what: str
    where: str
    why: str
    fix: str

    def __post_init__(self) -> None:
        for part in ("what", "where", "why", "fix"):
            object.__setattr__(self, part, shortened(getattr(self, part)))


@dataclass(frozen=True)
class Dim:
    """A symbolic dimension and its inclusive bounds."""

    name: str
    min: int
    max: int


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of a graph's input or output; a `Dim` where the size is symbolic."""

    name: str
    dtype: str
    shape: tuple[int | Dim, ...]


@dataclass(frozen=True)
class RopeUnpermute:
    """Undo llama.cpp's reordering of q/k rows (pairs interleaved within each head) to the half-split layout.

    Source: `LlamaModel.permute` in llama.cpp's converter: `w.reshape(heads, 2, d/2, ...).swapaxes(1, 2)`.
    """

    heads: int


@dataclass(frozen=True)
class Packing:
    """How a matrix [N, K] that comes quantised lies in a checkpoint: its codes where its `TensorRef` says, its scales
    and the rest in tensors of their own, all of whose shapes have been checked. weight = scale * (code - zero point).

    `layout` of the codes, `bits` each:

        "gptq"   int32 [K * bits / 32, N]: a word holds consecutive k, the first in its low bits
        "awq"    int32 [K, N * bits / 32]: a word holds consecutive n, in the order 0 2 4 6 1 3 5 7 from its low bits on
        "words"  int32 [N, ceil(K * bits / 32)]: a word holds consecutive k, the first in its low bits
        "bytes"  int8 or, where `float8`, float8 e4m3 [N, K]

    Codes in words are 2 ** (bits - 1) more than the integers that they stand for, and so are zero points. `group`
    elements of a row share a scale, and so do `tall` rows. Of "gptq" and "awq", scales are [groups, N] and zero points
    int32 [groups, N * bits / 32]; of the others scales are [ceil(N / tall), groups] or one number, and zero points
    int32 [ceil(N * bits / 32), groups] or int8 [N, groups]. `groups` int32 or int64 [K] is the group of each k where
    those are not K / group runs of equal length. `one_less`: words of zero points were stored less one for each of them
    (GPTQ's first format). `centred`: its maker promises zero points of 2 ** (bits - 1) alone.
    """

    layout: Literal["gptq", "awq", "words", "bytes"]
    bits: int
    group: int
    scales: TensorRef
    zeros: TensorRef | None = None
    groups: TensorRef | None = None
    tall: int = 1
    float8: bool = False
    one_less: bool = False
    centred: bool = False

    @property
    def parts(self) -> tuple[TensorRef, ...]:
        """The tensors beside the codes."""
        return tuple(part for part in (self.scales, self.zeros, self.groups) if part is not None)


@dataclass(frozen=True)
class TensorRef:
    """A weight that has not been read: where its bytes lie, and what they mean.

    `encoding` is the safetensors dtype ("F32", "F16", "BF16", ...) or the ggml type ("Q4_1", "Q6_K", ...); of a matrix
    that comes quantised, which `packing` describes, it says what a plan must know of it (checkpoint/packed.py).
    `shape` is the logical shape, row-major, outermost first. `transform` is applied to rows after decoding.
    """

    name: str
    file: Path
    offset: int
    nbytes: int
    encoding: str
    shape: tuple[int, ...]
    transform: RopeUnpermute | None = None
    packing: Packing | None = None

    @property
    def elements(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64)) if self.shape else 1

    @property
    def stored_bytes(self) -> int:
        """Bytes in the checkpoint, scales and the like included."""
        return self.nbytes + sum(part.nbytes for part in (self.packing.parts if self.packing else ()))


@dataclass(frozen=True)
class Target:
    """One file of targets/*.toml: a deployable platform, its artifact, and what is expected of it."""

    name: str
    title: str
    platform: str
    backend: str
    artifact: str
    precision: str
    quant: str
    context: int
    shapes: Mapping[str, Any]
    limits: Mapping[str, Any]
    parity: Mapping[str, Any]
    options: Mapping[str, Any]
    devices: Mapping[str, Mapping[str, Any]]
    requires: tuple[str, ...]
    source: str
    """The TOML text it was read from, for digests and error positions."""

    def gates(self, scheme: str) -> Mapping[str, Mapping[str, Any]]:
        """Its own gates by level: those for one scheme over those for all."""
        own = self.parity.get(scheme, {})
        return {level: {**self.parity.get(level, {}), **own.get(level, {})} for level in LEVELS}


@dataclass(frozen=True)
class Checkpoint:
    """A model as found on disk: configuration and a tensor index. No weight has been read.

    `read_tokenizer` gives the tokenizer files ({"tokenizer.json": bytes, "chat_template.jinja": bytes, ...});
    it is a function because a GGUF file's tokenizer takes a second to build and `plan` does not need it.
    `header_digest` covers configuration and tensor index; `checkpoint.digest` covers the weights' bytes as well.
    """

    path: Path
    name: str
    format: Literal["safetensors", "gguf"]
    model_type: str
    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    tensors: Mapping[str, TensorRef]
    files: tuple[Path, ...]
    processor: Mapping[str, Any]
    """preprocessor_config.json, empty where there is none."""
    read_tokenizer: Callable[[], Mapping[str, bytes]]
    header_digest: str
    remarks: tuple[Finding, ...] = ()
    """What is odd about it, and was decided as transformers does."""
    identities: tuple[tuple[str | int, ...], ...] = ()
    """What changes when a weight file does (`checkpoint.digest.identities`), from before anything was read."""


@dataclass(frozen=True)
class Geometry:
    """The numbers of a decoder that sizes, memory and rooflines follow from; from config.json alone."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_context: int
    tied: bool

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """Bytes of K and V that one token adds over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * element_bytes


@dataclass(frozen=True)
class Stage:
    """One traceable piece of a component. Stages of the same `kind` share one trace, stamped once per stage.

    `module` is a torch module whose forward takes `inputs` in order and returns `outputs` in order; both name
    values of the component's graph, so that a stage's output feeds the next stage's input of the same name.
    `parameters` maps each parameter of `module` (its own state_dict name) to the checkpoint's tensor name.
    """

    name: str
    kind: str
    module: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: Mapping[str, str]


@dataclass(frozen=True)
class Component:
    """A part of a model that becomes one graph and one artifact (decoder, embed, vision, audio).

    `stages` builds the torch modules under fake tensors when it is called, so that a Component costs nothing.
    `values` gives dtype and shape of every value that crosses a stage border; `constants` their fixed tensors
    (rotary tables). `state` pairs each cache input with the output that replaces it.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    state: tuple[tuple[str, str], ...]
    stages: Callable[[], list[Stage]]
    values: Mapping[str, TensorSpec] = field(default_factory=dict)
    constants: Callable[[], Mapping[str, Array]] = dict
    variant: str = ""


@dataclass(frozen=True)
class CanonicalModel:
    """A component in the canonical dialect. Weights in `graph` are references (`TensorRef` in each tensor's
    `.ref`); every node's metadata names the stage it came from, but for the Casts of weights, which belong to all."""

    component: str
    graph: Any  # onnx_ir.Model; onnx-ir is not imported by core
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    state: tuple[tuple[str, str], ...]
    weights: Mapping[str, TensorRef]
    """Initializer name to the checkpoint tensor it stands for. Tied weights are one initializer."""
    stages: tuple[str, ...]
    digest: str
    variant: str = ""


PALETTE = 16
"""Rows that share a palette, and numbers in it."""


Shift = Literal["", "zero", "zero16", "int8", "half"]
"""How the blocks of an integer format are moved off 0, see `Format.shift`."""


@dataclass(frozen=True)
class Format:
    """How one tensor is stored. `block` counts elements along the last axis that share a scale; 0 means one
    scale per row (output channel). Integer formats have float16 scales, which are above zero in a `positive` one, whose
    runtime refuses others. In a `palette` one integers of 4 bits are places in a palette of 16
    float16 numbers, which 16 rows share: a weight is one of them times its row's scale. In a `float8` one the 8 bits
    are those of a float8 (e4m3: OCP OFP8, without infinity), which is multiplied by its scale all the same.

    `shift` tells what else a block of 4-bit integers has:

        ""        nothing: weight = scale * integer
        "zero"    a zero point, itself an integer of 4 bits: weight = scale * (integer - zero point)
        "zero16"  a zero point in float16
        "int8"    an offset, int8 times a float16 that the row's blocks share: weight = scale * integer + offset
        "half"    an offset in float16: weight = scale * integer + offset

    An "int8" offset reaches the product through the sums of the input's blocks, so that any runtime with a symmetric
    multiplication can hold it: x @ W.T = x @ (scale * integer).T + blocksum(x) @ offset.T."""

    name: str
    bits: int
    integer: bool
    block: int = 0
    positive: bool = False
    palette: bool = False
    float8: bool = False
    shift: Shift = ""

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of this shape: elements at `bits` each, plus its float16 scales, palettes and offsets. A
        row is what the first axis holds."""
        elements = int(np.prod(shape, dtype=np.int64)) if shape else 1
        if not self.integer:
            return elements * self.bits // 8
        rows, width = shape[0], elements // shape[0]
        blocks = -(-width // self.block) if self.block else 1
        scales = 2 * (2 if self.palette else blocks)
        return rows * (-(-width * self.bits // 8) + scales + self.shift_bytes(blocks))

    def shift_bytes(self, blocks: int) -> int:
        """Bytes of one row's zero points or offsets, where it has so many blocks."""
        return {"": 0, "zero": -(-blocks // 2), "int8": blocks + 2}.get(self.shift, 2 * blocks)


Provenance = Literal["rounded", "searched", "gptq", "carried"]
"""Where a weight's integers come from: rounded to a scale that clips nothing; rounded to the scale of least error
weighted by what its input is like; chosen one after the other (GPTQ); or those of the checkpoint."""


@dataclass(frozen=True)
class Codes:
    """Some rows of a weight in an integer format: int8 `integers` [rows, width] and float16 `scales` [rows, blocks], of
    a format with palettes [rows, 2] (quant/palettes.py). `offsets` [rows, blocks] are int8 zero points where the
    format's shift is "zero", and float32 where it is another: what is added to `scale * integer`, not rounded yet. One
    with float16 zero points has no scale of zero."""

    integers: Array
    scales: Array
    offsets: Array | None = None


TensorClass = Literal["linear", "encoder", "embedding", "lm_head", "convolution", "other"]
"""What a weight is for: a multiplication of the decoder, one of another component (vision, audio), a looked-up table,
the last multiplication, a convolution's kernel, or none of these (norms, biases)."""


@dataclass(frozen=True)
class QuantPlan:
    """Which tensor gets which format. `classes` and `formats` have the same keys: initializer names."""

    scheme: str
    classes: Mapping[str, TensorClass]
    formats: Mapping[str, Format]
    carried: frozenset[str] = frozenset()
    """Tensors whose integers are the checkpoint's own."""

    def ideal_bytes(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """The arithmetic size of all tensors in their formats: the yardstick for artifacts' sizes."""
        return sum(fmt.nbytes(shapes[name]) for name, fmt in self.formats.items())


@dataclass(frozen=True)
class StoredWeight:
    """Where an artifact keeps one weight, so that anyone can read it back: file (relative to the artifact's
    folder), byte offsets of data and scales, format, and the logical [rows, width] shape. `signed` integers lie in
    two's complement; others are offset by half their range, as ONNX Runtime takes them. Scales are float16, or, where
    the file's own format wants them so, widened to float32 (`scale_bits`). Zero points or offsets, where the format has
    them, lie at `shift_offset`, zero points two a byte and offset by 8 where the values are; the float16 scales of int8
    offsets at `shift_scales_offset`. Where they are `paired`, float16 offsets lie among the scales instead, each before
    its own; where they are `dense`, a row of an odd number of zero points ends within a byte, and the next begins
    there. `order` is that of the axes in the file,
    where it is not the shape's: where that begins with the first axis, a row stays a row. `high_first`: of two int4
    values in a byte, the first is in the high bits. The float16 palettes of a format that has them lie at
    `palettes_offset`."""

    file: str
    offset: int
    scales_offset: int
    format: Format
    shape: tuple[int, ...]
    signed: bool = False
    scale_bits: int = 16
    order: tuple[int, ...] = ()
    high_first: bool = False
    palettes_offset: int = -1
    shift_offset: int = -1
    shift_scales_offset: int = -1
    paired: bool = False
    dense: bool = False


@dataclass(frozen=True)
class Signature:
    """One callable of an artifact: the file that holds it, exact input and output names, dtypes and shapes. Its name
    is the component's variant, or "step" where there is only one."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    file: str = ""


@dataclass(frozen=True)
class Artifact:
    """What a backend wrote for one component. `files` are relative to the folder it was told to write to."""

    component: str
    backend: str
    files: tuple[str, ...]
    signatures: tuple[Signature, ...]
    state: tuple[tuple[str, str], ...]
    weights: Mapping[str, StoredWeight]
    tools: Mapping[str, str]
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class ParityResult:
    """One row of parity.json."""

    component: str
    level: str
    output: str
    metrics: Mapping[str, float | int]
    gate: Mapping[str, float | int]
    verdict: Verdict
    note: str = ""
    stand_in: bool = False
    """Whether something else ran in the artifact's place, as `note` says: a FAIL counts, and a PASS proves nothing of
    the artifact."""


@dataclass(frozen=True)
class StandIn:
    """What runs on this machine in place of an artifact that cannot: `opens` and `runs` say what, `why` says why."""

    opens: str
    runs: str
    why: str


@dataclass(frozen=True)
class EncoderInput:
    """A picture or a sound as its encoder takes it: the component, which variant of it, and its inputs by name.

    `grid` is the (rows, columns) of a picture's features where M-RoPE counts them. `remarks` say what the model does
    not see or hear of what was given.
    """

    component: str
    variant: str
    inputs: Mapping[str, Array]
    grid: tuple[int, int] | None = None
    remarks: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class Example:
    """One input of a whole model: token ids int64 [T], placeholders repeated, and its pictures and sounds in order."""

    tokens: Array
    encoder_inputs: tuple[EncoderInput, ...] = ()


@dataclass(frozen=True)
class OracleModel:
    """The unmodified torch model that parity is measured against, on the meta device: shapes without storage, but for
    buffers that are no weights, which are real.

    `logits` runs it on examples and gives, for each, float32 [V] rows from its token `first` on; `layers` are the
    decoder's; `encoders` gives, for each component without state, the torch module that it stands for and what of that
    module's output is the component's, call by call. `read_by` names, for a module
    whose weights another one reads without calling it, that other one.
    """

    model: Any
    layers: tuple[Any, ...]
    logits: Callable[[Sequence[Example], Sequence[int]], list[Array]]
    encoders: Mapping[str, tuple[Any, Callable[[Any], Iterable[Any]]]] = field(default_factory=dict)
    read_by: Mapping[Any, Any] = field(default_factory=dict)


class WeightSource(Protocol):
    """The weights of one canonical model in the formats of its plan, row block by row block."""

    def float_rows(self, name: str, start: int, stop: int) -> Array:
        """Rows as they go into a float artifact: float32 or float16 by the tensor's format."""

    def quantized_rows(self, name: str, start: int, stop: int) -> Codes:
        """Rows of an integer format. Of one with palettes, from a whole group of 16 rows to another."""

    def samples(self, variant: str) -> Iterable[Mapping[str, Array]]:
        """Inputs like those to come, by name, for one variant of the component: what activations are calibrated by.
        None where the user gave none."""


Package = Callable[["Target", "Artifact", Path, Mapping[str, bytes], Sequence[int], int, Path], Path | None]
"""Writes the one file that a runtime's own engine wants beside a decoder: (target, artifact, its folder, the
tokenizer's files, stop ids, slots of the cache, the folder to write to) to the file, or None where the target does not
ask for it."""


@dataclass(frozen=True)
class Traits:
    """What the steps around a backend must know of it."""

    schemes: tuple[str, ...] = ()
    """Presets that it takes beside those of every backend."""
    positive_scales: bool = False
    """Its runtime refuses a scale that is zero or below."""
    shifts: tuple[Shift, ...] = ()
    """What its 4-bit blocks may have beside a scale, the one to prefer first."""
    int8_blocks: bool = False
    """Its runtime multiplies by 8-bit integers with a scale per block, too."""
    least_block: int = 16
    """The least 4-bit integers that may share a scale."""
    splits: bool = False
    """Where a decoder's weights are more than `limits.max_file_bytes`, it writes several files."""
    widens: int = 0
    """Bytes of float32 weights that its host runner holds at most while the ladder compares."""
    compiler: float = 0.0
    """What its compiler, a process of its own, holds at most, as a multiple of the artifact's bytes."""
    package: Package | None = None
    token_scales: bool = False
    """Its kernels round what integers are multiplied by to int8 with one scale for all channels of a token, so that
    outliers are worth moving into weights."""


Progress = Callable[[int, int], None]
"""Called with (done, total) in bytes or steps, often; must be cheap."""


def no_progress(done: int, total: int) -> None:
    """The `Progress` of those who do not watch."""


def worst(results: Iterable[ParityResult]) -> Verdict:
    """The verdict of several rows together: FAIL over PASS over AMBIGUOUS over NOT_RUN.

    AMBIGUOUS alone means that nothing could be decided; beside a PASS it is counted, not feared. Where something else
    ran in the artifact's place, a level has passed when the artifact itself has.
    """
    rows = list(results)
    levels = {row.level for row in rows if row.stand_in}
    if levels and not any(row.verdict is Verdict.FAIL for row in rows):
        rows = [row for row in rows if row.level in levels and not row.stand_in]
    verdicts = {row.verdict for row in rows}
    for verdict in (Verdict.FAIL, Verdict.PASS, Verdict.AMBIGUOUS):
        if verdict in verdicts:
            return verdict
    return Verdict.NOT_RUN
