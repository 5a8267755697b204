"""LiteRT (TensorFlow Lite): the canonical graph to one `.tflite`, its signatures over the same weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeexport import errors
from edgeexport.backends.litert_names import (
    COUNT,
    DECODE,
    PREFILL,
    STEP,
    WINDOW,
    given_name,
    length_of,
    slice_name,
    window_of,
)
from edgeexport.backends.litert_ops import OPS
from edgeexport.backends.optable import OpTable
from edgeexport.backends.tools import versions_of
from edgeexport.canonical.dialect import MULTIPLIED
from edgeexport.core import (
    Artifact,
    CanonicalModel,
    Dim,
    Finding,
    Progress,
    QuantPlan,
    Signature,
    Target,
    TensorSpec,
    Traits,
    WeightSource,
    no_progress,
)

if TYPE_CHECKING:
    from edgeexport.backends.litert_file import ModelFile, Tensor

NAME = "litert"
__all__ = ["NAME", "OPS", "OPTIONS", "TRAITS", "check", "compile", "versions"]

LEAST_WINDOW = 128
"""Slots below which a smaller window saves nothing."""
FORMAT_FIX = "choose --quant int8"


@dataclass(frozen=True)
class Options:
    """[options] of a target for this backend."""

    prefill: int = 256
    """Tokens of the longest piece of a prompt."""
    prefill_short: int = 64
    """Tokens of a shorter one, for what remains; 0 for none."""
    windows: bool = True
    """Also write signatures that attend to the first slots of the cache alone, which are all that a short conversation
    fills: multiplying by a cache of 2048 slots takes more of a small model's time than multiplying by its weights."""
    features: int = 512
    """Most features of pictures and sounds that one prompt's text attends to, where a model attends to them."""
    litertlm: bool = False
    """Also write `.litertlm`, for LiteRT-LM's engine: one file with tokenizer and chat template. Text models only."""
    gpu: bool = False
    """Keep to what LiteRT's GPU delegate takes whole: no blocks of int4, no looked-up table in float16."""

    def __post_init__(self) -> None:
        if not 2 <= self.prefill <= 4096 or not (self.prefill_short == 0 or 2 <= self.prefill_short < self.prefill):
            raise ValueError("prefill is 2 to 4096 tokens, and prefill_short is 0 or less than it")
        if not 1 <= self.features <= 8192:
            raise ValueError("features are 1 to 8192")

    @property
    def pieces(self) -> tuple[int, ...]:
        """Lengths of the prefill signatures, the longest last."""
        return tuple(size for size in (self.prefill_short, self.prefill) if size)


OPTIONS = Options


def versions() -> dict[str, str]:
    """Versions of the tools that shape the artifact's bytes. Raises: ToolError `missing-package`."""
    return versions_of("tflite", "ai-edge-litert", "flatbuffers", "onnx", "onnx-ir")


def check(model: CanonicalModel, target: Target, plan: QuantPlan) -> list[Finding]:
    """Every node that the table refuses or does not know, and every weight in a format that the target's runtime does
    not take, all at once. Pure; no SDK."""
    return [*OPS.check(model.graph.graph), *refused_formats(plan, NAME, gpu=Options(**target.options).gpu)]


def refused_formats(plan: QuantPlan, backend: str, *, gpu: bool = False) -> list[Finding]:
    """One finding for each reason to refuse weights' formats."""
    refused: dict[tuple[str, str], list[str]] = {}
    for name, fmt in plan.formats.items():
        if fmt.block and (gpu or fmt.bits != 4):
            why = "the GPU delegate takes no blocks" if gpu else "the runtime shares scales in blocks of int4 alone"
            refused.setdefault((f"weights in {fmt.name}", why), []).append(name)
        elif fmt.shift and (fmt.shift != "int8" or plan.classes[name] not in MULTIPLIED):
            why = "blocks have int8 offsets alone beside a scale, and those of multiplications alone"
            refused.setdefault((f"weights in {fmt.name}", why), []).append(name)
        elif gpu and fmt.name == "fp16" and plan.classes[name] == "embedding":
            why = "the GPU delegate looks up no float16 rows"
            refused.setdefault((f"a table in {fmt.name}", why), []).append(name)
    return [
        errors.op_not_lowered(
            backend, what, names[0] + (f" and {len(names) - 1} more" if names[1:] else ""), why, FORMAT_FIX
        )
        for (what, why), names in refused.items()
    ]


def compile(
    models: Sequence[CanonicalModel],
    target: Target,
    plan: QuantPlan,
    source: WeightSource,
    work: Path,
    progress: Progress = no_progress,
) -> Artifact:
    """Write `<component>.tflite` into `work`: a signature for each variant, or, over tokens, for one token and for each
    length of a prompt's pieces.

    Raises: UsageError `output-not-writable`; LoweringError `op-not-lowered`; CheckpointError for weights that cannot be
    stored.
    """
    from edgeexport.backends.litert_file import ModelFile

    tools, options = versions(), Options(**target.options)
    component = models[0].component
    file = ModelFile(f"{component}.tflite")
    signatures = [
        sign(file, model, plan, name, options.features)
        for model in models
        for name in signature_names(model, options.pieces, windows=options.windows)
    ]
    state = tuple((given(models[0], past), given(models[0], present)) for past, present in models[0].state)
    weights = file.write(work, source, progress)
    return Artifact(component, NAME, (file.name,), tuple(signatures), state, weights, tools)


def write_package(
    target: Target,
    artifact: Artifact,
    folder: Path,
    tokenizer_files: Mapping[str, bytes],
    stop_ids: Sequence[int],
    context: int,
    work: Path,
) -> Path | None:
    """`<component>.litertlm` in the folder `work`, of the decoder in `folder`; None where the target does not ask for
    it, and where the decoder is fed embeddings, which one file cannot look up.

    Raises: ToolError `missing-package`; UsageError `output-not-writable`.
    """
    from edgeexport.backends.litert_package import Speech, write_litertlm

    by_id = all(spec.name != "embeddings" for each in artifact.signatures for spec in each.inputs)
    if not Options(**target.options).litertlm or not by_id:
        return None
    template = tokenizer_files.get("chat_template.jinja", b"").decode("utf-8")
    made = work / f"{artifact.component}.litertlm"
    speech = Speech(tokenizer_files["tokenizer.json"], template, tuple(stop_ids), context)
    write_litertlm(folder / artifact.files[0], speech, made)
    return made


def _tokens(model: CanonicalModel) -> Dim | None:
    """The dimension of a graph's tokens; None where its shapes are fixed."""
    return next((size for spec in model.inputs for size in spec.shape if isinstance(size, Dim)), None)


def given(model: CanonicalModel, name: str) -> str:
    """The file's name of an input or output: LiteRT-LM's for graphs over tokens, the canonical one for others."""
    return given_name(name, dict(model.state)) if _tokens(model) else name


def signature_names(model: CanonicalModel, pieces: Sequence[int], *, windows: bool) -> list[str]:
    """The names of a graph's signatures, which say what they are for: one for a token, one for each of the lengths
    `pieces` of a prompt's parts, and with `windows` those that attend to the first slots alone."""
    tokens = _tokens(model)
    if tokens is None:
        return [model.variant or STEP]
    sizes = dict.fromkeys(min(size, tokens.max) for size in pieces)
    names = [DECODE, *(f"{PREFILL}{size}" for size in sizes if size > 1)]
    if not model.state or not windows:
        return names
    quarter, sixteenth = tokens.max // 4, tokens.max // 16
    narrow = [f"{WINDOW}_{size}_{DECODE}" for size in (sixteenth, quarter) if size >= LEAST_WINDOW]
    narrow += [f"{WINDOW}_{quarter}_{name}" for name in names[1:] if quarter >= max(LEAST_WINDOW, length_of(name))]
    return names + narrow


def sign(
    file: ModelFile, model: CanonicalModel, plan: QuantPlan, name: str, features: int, table: OpTable = OPS,
    *, slices: bool = False,
) -> Signature:  # fmt: skip
    """Lower one graph by a table's rows, as its signature's name says. What else has a free size is padded to
    `features`, and how many of them count is an input of its own. With `slices` the caches' outputs are what a call
    adds to them, and so are their names."""
    from edgeexport.backends.litert_lowering import Lowering

    length = length_of(name) if _tokens(model) else 0
    lowering, tokens = Lowering(model, plan, table, file, name), _tokens(model)
    inputs: dict[str, Tensor] = {}
    for spec in model.inputs:
        free = [size for size in spec.shape if isinstance(size, Dim) and size != tokens]
        sizes = [length if size == tokens else features if isinstance(size, Dim) else size for size in spec.shape]
        called = given(model, spec.name)
        dtype = {"int64": "int32"}.get(spec.dtype, spec.dtype)
        if called == "input_pos":  # one for each token, of which the first is the canonical graph's
            inputs[called] = lowering.graph.tensor((length,), dtype, called)
            lowering.bind(spec.name, lowering.slice(inputs[called], 0, 0, 1))
        else:
            inputs[called] = lowering.graph.tensor(sizes, dtype, called)
            lowering.bind(spec.name, inputs[called])
        if free:
            lowering.count = inputs[called + COUNT] = lowering.graph.tensor((1,), "int32", called + COUNT)
    lowering.window = window_of(name)
    made = lowering.run()
    left_out = {"logits"} if length > 1 else set()
    outputs = {given(model, key): tensor for key, tensor in made.items() if key not in left_out}
    if slices:
        outputs = {slice_name(key): tensor for key, tensor in outputs.items()}
    file.sign(lowering.graph, inputs, outputs)
    return Signature(name, specs(inputs), specs(outputs), file.name)


def specs(tensors: Mapping[str, Tensor]) -> tuple[TensorSpec, ...]:
    """What a signature says of its inputs or outputs."""
    return tuple(TensorSpec(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items())


TRAITS = Traits(positive_scales=True, shifts=("int8",), package=write_package, token_scales=True)
