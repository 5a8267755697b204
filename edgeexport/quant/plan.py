"""Decide for every tensor how it is stored. Pure: names and shapes in, a QuantPlan out; no weight is read."""

from __future__ import annotations

from collections.abc import Mapping

from edgeexport.core import Format, QuantPlan, TensorClass, TensorRef
from edgeexport.quant.schemes import BLOCKS, FORMATS, FP16, Scheme, find


def resolve(fmt: Format, width: int) -> Format:
    """The format that rows of `width` elements really get.

    A block that does not divide the width would need padding, which kernels treat differently; so the next smaller
    block that divides it is taken, and fp16 where none does.
    """
    if not fmt.integer or fmt.block == 0 or width % fmt.block == 0:
        return fmt
    fitting = [block for block in BLOCKS if block < fmt.block and width % block == 0]
    return FORMATS[f"int{fmt.bits}-b{max(fitting)}"] if fitting else FP16


def plan(shapes: Mapping[str, tuple[int, ...]], classes: Mapping[str, TensorClass], scheme: str | Scheme) -> QuantPlan:
    """The plan for tensors of these shapes and classes (same keys). Raises `unknown-scheme`."""
    preset = find(scheme) if isinstance(scheme, str) else scheme
    formats = {
        name: resolve(preset.formats[classes[name]], shape[-1] if shape else 1) for name, shape in shapes.items()
    }
    return QuantPlan(preset.name, {name: classes[name] for name in shapes}, formats)


def classify(name: str, shape: tuple[int, ...]) -> TensorClass:
    """The class of a decoder's tensor, by the names `transformers` gives."""
    if len(shape) != 2 or not name.endswith(".weight"):
        return "other"
    stem = name.removesuffix(".weight")
    if stem.rpartition(".")[2] == "embed_tokens":
        return "embedding"
    return "lm_head" if stem.rpartition(".")[2] == "lm_head" else "linear"


def plan_from_names(tensors: Mapping[str, TensorRef], scheme: str, tied: bool) -> QuantPlan:
    """The plan as far as names and headers tell it, before anything is traced. Raises `unknown-scheme`.

    Where `tied`, a copy of the embedding that the checkpoint stores as lm_head is left out: it is not stored again.
    """
    classes = {name: classify(name, ref.shape) for name, ref in tensors.items()}
    kept = {name for name, kind in classes.items() if not (tied and kind == "lm_head")}
    return plan({name: ref.shape for name, ref in tensors.items() if name in kept}, classes, scheme)
