"""Core ML: the canonical graph to one .mlpackage per component, a function for each shape, written on any computer.

A decoder has two functions, `decode` of one token and `prefill` of several, over the same weights and the same states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgeexport import errors
from edgeexport.backends.coreml_channels import MULTIPLE
from edgeexport.backends.coreml_mil import identifier
from edgeexport.backends.coreml_ops import OPS
from edgeexport.backends.tools import versions_of
from edgeexport.core import (
    Artifact,
    CanonicalModel,
    Dim,
    Finding,
    Progress,
    QuantPlan,
    Signature,
    StoredWeight,
    Target,
    TensorSpec,
    Traits,
    WeightSource,
    no_progress,
)

NAME = "coreml"
DECODE, PREFILL = "decode", "prefill"
"""Functions of a component whose number of tokens is symbolic."""
STEP = "step"
"""Name of the signature of a component that has no variants, and of its function."""
TOKENS = "T"
"""The symbolic dimension of tokens, in the canonical graphs."""
LAST = "last"
"""The input of a function of several tokens that says which is the last valid one: prompts are padded to its size."""
FLOAT = "float16"
"""What is computed in. Inputs and outputs of the model are float32."""
HOST_TYPES = {"float32": "float32", "int64": "int32"}
"""Element type of the model's inputs and outputs to that of the program's: Core ML takes no int64."""
__all__ = ["NAME", "OPS", "OPTIONS", "TRAITS", "check", "compile", "versions"]


@dataclass(frozen=True)
class Options:
    """[options] of a target for this backend."""

    prefill: int = 64
    """Tokens that `prefill` takes at a time; a shorter rest of a prompt is padded."""

    features: int = 1024
    """Features of pictures and sounds, together, that tokens may look at in a component `fusion`; fewer are padded."""

    layout: Literal["tokens", "channels"] = "tokens"
    """Of activations: [1, T, C] and multiplications as `linear`, or [1, C, 1, T] and convolutions of 1 x 1, which the
    Neural Engine wants; then prefill, cache and heads should be multiples of 32."""

    def __post_init__(self) -> None:
        if not 2 <= self.prefill <= 1024:
            raise ValueError(f"prefill is {self.prefill}; 2 to 1024 tokens are possible")
        if not 1 <= self.features <= 8192:
            raise ValueError(f"features is {self.features}; 1 to 8192 are possible")
        if self.layout == "channels" and (self.prefill % MULTIPLE or self.features % MULTIPLE):
            raise ValueError(f"prefill and features must be multiples of {MULTIPLE} in this layout")


OPTIONS = Options
TRAITS = Traits(
    schemes=("palette4",),
    shifts=("zero16", "zero"),
    int8_blocks=True,
    splits=True,
    widens=1 << 30,  # coreml_interpreter.ROOM
)


def versions() -> dict[str, str]:
    """Versions of the tools that shape the artifact's bytes. Raises: ToolError `missing-package`."""
    return versions_of("coreml", "coremltools", "onnx-ir")


def check(model: CanonicalModel, target: Target, plan: QuantPlan) -> list[Finding]:
    """Every node that the table refuses or does not know, and a cache that the layout does not take, all at once.
    Pure; no SDK."""
    found = OPS.check(model.graph.graph)
    pasts = {past for past, _ in model.state}
    slots = {size for spec in model.inputs if spec.name in pasts for size in spec.shape[2:3] if isinstance(size, int)}
    if Options(**target.options).layout == "channels":
        found += [errors.cache_not_aligned(target.name, size, MULTIPLE) for size in slots if size % MULTIPLE]
    return found


def compile(
    models: Sequence[CanonicalModel],
    target: Target,
    plan: QuantPlan,
    source: WeightSource,
    work: Path,
    progress: Progress = no_progress,
) -> Artifact:
    """Write `<component>.mlpackage` into `work`: a function for each variant, or for one and for several tokens. Where
    the weights are more than one file may hold, they are several packages, `<component>.1.mlpackage` and so on.

    Raises: UsageError `output-not-writable`; CheckpointError for weights that cannot be stored; LoweringError
    `coreml-unsafe-program`, `artifact-too-large`.
    """
    from edgeexport.backends import coreml_lints, coreml_lowering, coreml_package, coreml_parts

    options, limit = Options(**target.options), target.limits.get("max_file_bytes")
    component = models[0].component
    parts = coreml_parts.cut(models[0], plan, limit, target.name) if len(models) == 1 else [None]
    files: list[str] = []
    signatures: list[Signature] = []
    stored: dict[str, StoredWeight] = {}
    for number, part in enumerate(parts, start=1):
        name = f"{component}.{number}.mlpackage" if len(parts) > 1 else f"{component}.mlpackage"
        layout = coreml_package.BlobLayout(f"{name}/{coreml_package.WEIGHTS}")
        weights = coreml_lowering.Weights(layout)
        functions = []
        for model in models:
            for signature, sizes in _functions(model, options):
                named = function_name(signature)
                lowered = coreml_lowering.Lowering(model, plan, weights, OPS, named, sizes, part, options.layout).run()
                functions.append(lowered)
                label = f"{signature}.{number}" if len(parts) > 1 else signature
                signatures.append(_signature(model, label, lowered[1], f"{name}/{coreml_package.MANIFEST}"))
        program = coreml_lowering.program(functions)
        if found := coreml_lints.unsafe(program):
            raise errors.LoweringError(*found)
        if limit is not None and layout.size > limit:
            raise errors.artifact_too_large(target.name, layout.size, limit)
        files += coreml_package.write(work, name, program, layout, source, progress)
        stored |= layout.weights
    return Artifact(
        component=component,
        backend=NAME,
        files=tuple(files),
        signatures=tuple(signatures),
        state=models[0].state,
        weights=stored,
        tools=versions(),
        findings=(errors.coreml_interpreted(f"{component}.mlpackage"),),
    )


def function_name(signature: str) -> str:
    """The function of a signature: a variant's name may begin with a digit, which a function's may not."""
    return identifier(signature or STEP)


def _functions(model: CanonicalModel, options: Options) -> list[tuple[str, dict[str, int]]]:
    """(signature, size of each symbolic dimension) of the functions of one variant."""
    symbolic = {size.name: size for spec in model.inputs for size in spec.shape if isinstance(size, Dim)}
    if not symbolic:
        return [(model.variant or STEP, {})]
    sizes = {name: min(options.features, size.max) for name, size in symbolic.items() if name != TOKENS}
    piece = min(options.prefill, symbolic[TOKENS].max)
    found = [(DECODE, {**sizes, TOKENS: 1}), (PREFILL, {**sizes, TOKENS: piece})]
    return found if piece > 1 else found[:1]


def _signature(model: CanonicalModel, name: str, description: Any, file: str) -> Signature:
    """A function as the package describes it, its values by the canonical graph's names where they have one."""
    names = {identifier(spec.name): spec.name for spec in (*model.inputs, *model.outputs)}
    presents = dict(model.state)

    def spec(feature: Any, array: Any, own: str = "") -> TensorSpec:
        kind = array.ArrayDataType.Name(array.dataType).lower()
        return TensorSpec(own or names.get(feature.name, feature.name), kind, tuple(int(size) for size in array.shape))

    states = [(each, each.type.stateType.arrayType) for each in description.state]
    return Signature(
        name,
        tuple([spec(each, each.type.multiArrayType) for each in description.input] + [spec(*each) for each in states]),
        tuple(
            [spec(each, each.type.multiArrayType) for each in description.output]
            + [spec(*each, presents[names[each[0].name]]) for each in states]
        ),
        file,
    )


def sized(spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a value in a function with these sizes."""
    return tuple(sizes[size.name] if isinstance(size, Dim) else size for size in spec.shape)


def added_inputs(model: CanonicalModel, sizes: Mapping[str, int]) -> list[str]:
    """The inputs int32 [1] that a function has beside the model's: which token is the last valid one, and how many
    valid features there are."""
    last = [LAST] if sizes.get(TOKENS, 1) > 1 and model.state else []
    padded = (
        spec for spec in model.inputs if any(isinstance(size, Dim) and size.name != TOKENS for size in spec.shape)
    )
    return last + [count_of(spec.name) for spec in padded]


def count_of(name: str) -> str:
    """The input that says how much of another one is valid."""
    return f"{name}_count"
