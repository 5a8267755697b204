"""Decide for every tensor how it is stored. Pure: names and shapes in, a QuantPlan out; no weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from edgeexport.core import PALETTE, Format, QuantPlan, TensorClass
from edgeexport.quant.schemes import BLOCKS, FORMATS, FP16, INT8_CHANNEL, Scheme, find


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
    *,
    positive: bool = False,
) -> QuantPlan:
    """The plan for tensors of these shapes and classes (same keys), with `positive` scales where the runtime wants
    them. Raises `unknown-scheme`."""
    preset = find(scheme) if isinstance(scheme, str) else scheme
    formats = {name: _format_of(preset.formats[classes[name]], classes[name], shape) for name, shape in shapes.items()}
    if positive:
        formats = {name: replace(fmt, positive=True) if fmt.integer else fmt for name, fmt in formats.items()}
    return QuantPlan(preset.name, {name: classes[name] for name in shapes}, formats)


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


def plan_from_names(shapes: Mapping[str, tuple[int, ...]], scheme: str, tied: bool) -> QuantPlan:
    """The plan as far as names and headers tell it, before anything is traced. Raises `unknown-scheme`.

    Where `tied`, a copy of the embedding that the checkpoint stores as lm_head is left out: it is not stored again.
    """
    classes = {name: classify(name, shape) for name, shape in shapes.items()}
    kept = {name for name, kind in classes.items() if not (tied and kind == "lm_head")}
    return plan({name: shape for name, shape in shapes.items() if name in kept}, classes, scheme)
