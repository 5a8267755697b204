"""Decide for every tensor how it is stored. Pure: names and shapes in, a QuantPlan out; no weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from edgeexport import errors
from edgeexport.checkpoint.packed import held_in
from edgeexport.core import PALETTE, Format, QuantPlan, TensorClass, Traits
from edgeexport.quant import prequantised
from edgeexport.quant.budget import FILE, Chosen, candidates
from edgeexport.quant.repack import ENCODINGS
from edgeexport.quant.schemes import BLOCKS, FORMATS, FP16, INT8_CHANNEL, SCHEMES, SUFFIXES, Scheme, find

PLAIN = Traits()


def resolve(fmt: Format, width: int) -> Format:
    """The format that rows of `width` elements really get.

    A block that does not divide the width would need padding, which kernels treat differently; so the next smaller
    block that divides it is taken, and fp16 where none does. That holds for one scale per row too, since kernels
    read such rows in blocks that repeat it (the 1,176 numbers of a vision patch are 73.5 of the smallest).
    """
    if not fmt.integer or fmt.palette or (fmt.block and width % fmt.block == 0):
        return fmt
    fitting = [block for block in BLOCKS if width % block == 0]
    if not fmt.block:
        return fmt if fitting else FP16
    fitting = [block for block in fitting if block < fmt.block]
    return FORMATS[f"int{fmt.bits}-b{max(fitting)}"] if fitting else FP16


def _in_groups(fmt: Format, shape: tuple[int, ...]) -> Format:
    """A palette's format where the rows make whole groups, else a scale per row in 8 bits."""
    whole = len(shape) == 2 and shape[0] % PALETTE == 0
    return fmt if whole or not fmt.palette else INT8_CHANNEL


def _format_of(fmt: Format, kind: TensorClass, shape: tuple[int, ...]) -> Format:
    """What a tensor of this class and shape really gets. No kernel reads a convolution's rows in blocks."""
    return fmt if kind == "convolution" else resolve(_in_groups(fmt, shape), shape[-1] if shape else 1)


def plan(
    shapes: Mapping[str, tuple[int, ...]],
    classes: Mapping[str, TensorClass],
    scheme: str | Scheme,
    traits: Traits = PLAIN,
    encodings: Mapping[str, str] | None = None,
    chosen: Mapping[str, Chosen] | None = None,
) -> QuantPlan:
    """The plan for tensors of these shapes and classes (same keys), as far as a runtime with these `traits` takes it.
    A multiplication whose integers the checkpoint holds already, as `encodings` by name tell, keeps them where a format
    can hold them. `chosen` formats go before the scheme's. Raises: UsageError `unknown-scheme`, `plan-unusable`."""
    preset = find(scheme) if isinstance(scheme, str) else scheme
    formats: dict[str, Format] = {}
    carried = set()
    for name, shape in shapes.items():
        kind = classes[name]
        encoding = (encodings or {}).get(name)
        if chosen is not None and name in chosen:
            formats[name] = _given(name, chosen[name], options(name, kind, shape, traits, encoding))
            carried |= {name} if chosen[name].carried else set()
            continue
        wanted = preset.value if preset.value is not None and kind == "linear" and is_value(name) else None
        formats[name] = fmt = _format_of(wanted or preset.formats[kind], kind, shape)
        own = _own_lattice(preset, kind, encoding, traits, shape)
        if own is not None:
            carried.add(name)
            formats[name] = own
        else:
            formats[name] = _with_zero_points(fmt, kind, traits)
    if traits.positive_scales:
        formats = {name: replace(fmt, positive=True) if fmt.integer else fmt for name, fmt in formats.items()}
    return QuantPlan(preset.name, {name: classes[name] for name in shapes}, formats, frozenset(carried))


ZERO_POINTS = frozenset({"linear"})
"""Classes whose 4-bit blocks get a zero point where the runtime takes it for free."""


def _with_zero_points(fmt: Format, kind: TensorClass, traits: Traits) -> Format:
    free = fmt.bits == 4 and fmt.block and not fmt.shift and "zero" in traits.shifts and kind in ZERO_POINTS
    return FORMATS[f"{fmt.name}-{SUFFIXES['zero']}"] if free else fmt


def options(
    name: str, kind: TensorClass, shape: tuple[int, ...], traits: Traits, encoding: str | None
) -> dict[tuple[str, bool], Format]:
    """The formats that a matrix may be given one by one, by (name, whether they hold the checkpoint's integers); none
    for what no budget is about."""
    if kind not in CHOSEN or len(shape) != 2:
        return {}
    found = {}
    for fmt in candidates(kind, traits):
        real = _with_zero_points(_format_of(fmt, kind, shape), kind, traits)
        if real.integer:
            found[real.name, False] = real
    for scheme in ("int4-b32", "int8"):
        own = _own_lattice(SCHEMES[scheme], kind, encoding, traits, shape)
        if own is not None:
            found[own.name, True] = own
    return {key: replace(fmt, positive=traits.positive_scales) for key, fmt in found.items()}


CHOSEN: frozenset[TensorClass] = frozenset({"linear", "embedding", "lm_head"})
"""Classes that a budget chooses formats for: what the decoder reads for every token."""


def _given(name: str, wanted: Chosen, known: Mapping[tuple[str, bool], Format]) -> Format:
    fmt = known.get((wanted.format, wanted.carried))
    if fmt is None:
        listed = ", ".join(f"{each} (the checkpoint's own)" if own else each for each, own in known)
        what = f"{wanted.format}, the checkpoint's own integers," if wanted.carried else wanted.format
        raise errors.plan_unusable(FILE, f"{name} cannot be {what} here: it can be {listed or 'as the scheme says'}")
    return fmt


def _own_lattice(
    preset: Scheme, kind: TensorClass, encoding: str | None, traits: Traits, shape: tuple[int, ...]
) -> Format | None:
    """The format that carries a multiplication's integers over from this encoding; None where there is none, or where
    the scheme asks for fewer bits than they have or for other blocks."""
    asked = preset.linear
    packed = held_in(encoding or "")
    if packed is not None:
        return prequantised.own_format(packed, preset.formats[kind], kind, shape, traits)
    held = ENCODINGS.get(encoding or "")
    if held is None or kind != "linear" or not asked.integer or asked.palette or asked.float8:
        return None
    if held.bits == 8:
        fits = (asked.bits == 8 or encoding != "Q8_0") and traits.int8_blocks
        return FORMATS[f"int8-b{held.block}"] if fits else None
    if asked.bits != 4 or asked.block != held.block:
        return None
    if not held.shifted and not traits.positive_scales:
        return FORMATS[f"int4-b{held.block}"]
    shift = next((shift for shift in traits.shifts if shift != "zero"), None)
    return FORMATS[f"int4-b{held.block}-{SUFFIXES[shift]}"] if shift is not None else None


def is_value(name: str) -> bool:
    """Whether a matrix makes attention's values: most of what 4 bits cost is lost there, on a twentieth of the
    weights."""
    return "v_proj" in name.split(".")


ENCODERS = frozenset({"visual", "vision", "audio", "align", "fusion"})
"""Parts of a tensor's name that put it outside the decoder."""


def classify(name: str, shape: tuple[int, ...]) -> TensorClass:
    """The class of a tensor, by the names `transformers` gives."""
    if len(shape) > 2:
        return "convolution"
    if len(shape) != 2 or not name.endswith(".weight") or "position" in name:
        return "other"
    if ENCODERS & set(name.split(".")):
        return "encoder"
    stem = name.removesuffix(".weight")
    if stem.rpartition(".")[2] == "embed_tokens":
        return "embedding"
    return "lm_head" if stem.rpartition(".")[2] == "lm_head" else "linear"


def plan_from_names(
    shapes: Mapping[str, tuple[int, ...]],
    scheme: str,
    tied: bool,
    traits: Traits = PLAIN,
    encodings: Mapping[str, str] | None = None,
    chosen: Mapping[str, Chosen] | None = None,
) -> QuantPlan:
    """The plan as far as names and headers tell it, before anything is traced. Raises `unknown-scheme`.

    Where `tied`, a copy of the embedding that the checkpoint stores as lm_head is left out: it is not stored again.
    """
    classes = {name: classify(name, shape) for name, shape in shapes.items()}
    kept = {name for name, kind in classes.items() if not (tied and kind == "lm_head")}
    stored = {name: shape for name, shape in shapes.items() if name in kept}
    return plan(stored, classes, scheme, traits, encodings, chosen)
