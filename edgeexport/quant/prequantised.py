"""Carry over the codes of checkpoints that come quantised by GPTQ, AWQ, compressed-tensors or float8.

    int4, symmetric      int4 blocks of the checkpoint's own group, whichever blocks the scheme asks for: the same
                         integers with the fewest scales. A group larger than any block of ours repeats its scale.
    int4, zero points    the same and zero points, exactly, where the runtime has them (ONNX Runtime, Core ML); else
                         offsets -scale * zero, rounded to float16 (MNN) or to int8 (LiteRT, TensorRT)
    int8, symmetric      one scale per row, or int8 blocks where the runtime multiplies by such
    float8, one scale per row or matrix    the same bits in the scheme `fp8`

Scales become float16: a relative error below 2^-11 where they were float32 or bfloat16, nothing else. What no format
holds is read as floats: groups that are not runs of columns (act-order), 8 bits with zero points, float8 with scales of
blocks, groups that no block of ours divides.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgeexport import errors
from edgeexport.checkpoint.packed import Held, held_in
from edgeexport.checkpoint.weights import WeightReader
from edgeexport.core import Codes, Finding, Format, QuantPlan, TensorClass, TensorRef, Traits
from edgeexport.quant.repack import Lattice, to_codes
from edgeexport.quant.schemes import BLOCKS, FORMATS, INT4_CHANNEL, INT8_CHANNEL, SUFFIXES

NAN8 = 0x7F
"""The bits of float8 e4m3's NaN, the sign apart."""
LEAST = np.float32(2**-24)
"""The least float16 above zero."""


def own_format(held: Held, asked: Format, kind: TensorClass, shape: tuple[int, ...], traits: Traits) -> Format | None:
    """The format that carries these codes over where the scheme asks for `asked`; None where there is none, or where
    the scheme asks for other bits. A multiplication's may have the checkpoint's groups and zero points; a table's or
    lm_head's only what was asked for, since no other is sure to be looked up in."""
    width = shape[-1]
    if held.scattered or asked.palette or not asked.integer or held.float8 != asked.float8 or held.bits != asked.bits:
        return None
    if held.float8:
        return asked if held.group == width else None
    fitting = [size for size in BLOCKS if held.group % size == 0]
    whole_row = held.group == width and not held.zeros
    if not fitting or (held.zeros and held.bits == 8):
        return None
    if kind != "linear":
        fits = whole_row if not asked.block else held.group % asked.block == 0
        return asked if fits and not held.zeros and not asked.shift else None
    if held.bits == 8:
        return INT8_CHANNEL if whole_row else FORMATS[f"int8-b{max(fitting)}"] if traits.int8_blocks else None
    if not asked.block:  # one scale per row is asked for by delegates that take nothing else
        return INT4_CHANNEL if whole_row else None
    shift = "zero" if "zero" in traits.shifts else next(iter(traits.shifts), None)
    fitting = [size for size in fitting if size >= traits.least_block]
    if not held.zeros:
        return FORMATS[f"int4-b{max(fitting)}"] if fitting else None
    return FORMATS[f"int4-b{max(fitting)}-{SUFFIXES[shift]}"] if fitting and shift is not None else None


def carried_rows(reader: WeightReader, ref: TensorRef, fmt: Format, start: int, stop: int) -> Codes:
    """Rows of a matrix in a format that `own_format` gave, as the checkpoint's codes.

    Raises: CheckpointError `bad-quantised-weight` for a negative scale that the runtime cannot be given;
    `nonfinite-weight` and `weight-too-large` for a damaged scale; `weights-truncated`, `file-unreadable`."""
    integers, scales, zeros, _ = reader.packed(ref, start, stop)
    if fmt.float8:
        return _float8(ref, fmt, integers, scales, start)
    blocks = ref.shape[1] // (fmt.block or ref.shape[1])
    scales = np.repeat(scales, blocks // scales.shape[1], axis=1)
    if zeros is None:
        _refuse_turning(ref, fmt, integers, scales, start)
        return to_codes(Lattice(integers, scales, None), fmt, name=ref.name, first_row=start)
    zeros = np.repeat(zeros, blocks // zeros.shape[1], axis=1)
    if fmt.shift != "zero":
        offsets = -zeros.astype(np.float32) * scales
        return to_codes(Lattice(integers, scales, offsets), fmt, name=ref.name, first_row=start)
    assert not fmt.positive, "no runtime with zero points wants scales above zero"
    plain = to_codes(Lattice(integers, scales, None), FORMATS[f"int4-b{fmt.block}"], name=ref.name, first_row=start)
    return Codes(plain.integers, plain.scales, zeros)


def _refuse_turning(ref: TensorRef, fmt: Format, integers: np.ndarray, scales: np.ndarray, start: int) -> None:
    """A block of negative scale is turned about for a runtime that wants them above zero, but for its least integer,
    which has no opposite. No known quantiser writes one."""
    if not fmt.positive or scales.min(initial=0.0) >= 0:
        return
    least = integers.reshape(*scales.shape, -1).min(axis=-1) == -(2 ** (fmt.bits - 1))
    stuck = np.argwhere((scales < 0) & (least if fmt.bits == 8 else True))
    if len(stuck):
        raise errors.bad_quantised_weight(
            ref.file, ref.name, f"row {start + int(stuck[0][0])} has a negative scale, which the runtime does not take"
        )


def _float8(ref: TensorRef, fmt: Format, bits: np.ndarray, scales: np.ndarray, start: int) -> Codes:
    """Bits as they are, their signs turned about where a scale is negative and must not be."""
    broken = np.argwhere(bits & NAN8 == NAN8)
    if len(broken):
        raise errors.nonfinite_weight(ref.name, (start + int(broken[0][0]), int(broken[0][1])), float("nan"))
    ordinary = to_codes(Lattice(np.zeros(scales.shape, np.int8), scales, None), INT8_CHANNEL, name=ref.name)
    if not fmt.positive:
        return Codes(bits, ordinary.scales)
    flat = np.abs(scales) < LEAST
    bits = np.where(flat, np.int8(0), np.where(scales < 0, bits ^ np.int8(-128), bits)).astype(np.int8)
    return Codes(bits, np.where(flat, LEAST, np.abs(scales)).astype(np.float16))


def findings(tensors: Mapping[str, TensorRef], plan: QuantPlan, traits: Traits) -> list[Finding]:
    """A warning for each reason why matrices that come quantised are rounded a second time."""
    packed = {name: held_in(tensors[name].encoding) for name in plan.formats}
    total = sum(held is not None for held in packed.values())
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, held in packed.items():
        fmt = plan.formats[name]
        if held is None or name in plan.carried or not fmt.integer:
            continue
        reasons.setdefault(_why_not(held, plan, name, traits), []).append(name)
    return [
        errors.quantised_anew(tensors[names[0]].file, len(names), total, f"{why} (first: {names[0]})", fix)
        for (why, fix), names in reasons.items()
    ]


def _why_not(held: Held, plan: QuantPlan, name: str, traits: Traits) -> tuple[str, str]:
    """Why a matrix is not carried over, and what to do."""
    fmt = plan.formats[name]
    best = "int4-b32" if held.bits == 4 else "int8"
    if held.scattered:
        return (
            "their groups are not runs of columns (act-order), and a runtime's blocks are nothing else",
            "use a checkpoint that was quantised without act-order (desc_act false), or `--quant int8`, which rounds "
            "less than 4 bits do",
        )
    if held.float8:
        return (
            "they are float8, which integers cannot hold; of the schemes only fp8 can, for TensorRT, and only with a "
            "scale per row or matrix",
            "`--quant int8` is the closest of the integer schemes; `--quant fp16` rounds to 11 bits",
        )
    if held.bits == 8 and held.zeros:
        return "they have 8 bits and zero points, which no format has", "use a symmetric checkpoint, or `--quant fp16`"
    if plan.classes[name] != "linear":
        return (
            f"a table, lm_head or encoder is stored as the scheme says, {fmt.name}, which holds other codes",
            "use a checkpoint that leaves them unquantised",
        )
    if held.bits == 8 and fmt.bits == 8 and not traits.int8_blocks:
        return (
            "their scales are of groups, and this runtime multiplies by 8-bit integers of one scale per row alone",
            "use a checkpoint with a scale per channel, or another target",
        )
    if fmt.bits == held.bits and fmt.block:
        return (
            f"no block that the runtime takes divides their groups of {held.group}",
            "use a checkpoint with groups of 32, 64 or 128",
        )
    return (
        f"they have {held.bits} bits in groups of {held.group}, which the scheme {plan.scheme} does not keep",
        f"use `--quant {best}`",
    )
