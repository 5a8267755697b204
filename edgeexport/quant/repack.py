"""Carry a checkpoint's own integers over into ours, without rounding them a second time.

A ggml block is 32 weights (a superblock 256) with float16 scales; what it stands for, from ggml's
`ggml-common.h` and `dequantize_row_*` (https://github.com/ggml-org/ggml):

    Q4_0   d (q - 8)                       4 bits, exactly
    Q4_1   d q + m  = d (q - 8) + (m + 8 d)    4 bits and an offset for each block
    Q4_K   (d s) q - (dmin z)              the same; d s is rounded to float16, a relative error below 2^-11
    Q5_0   d (q - 16)                      8 bits, exactly
    Q8_0   d q                             8 bits, exactly
    Q6_K   (d s) (q - 32), 16 weights each     8 bits; d s is rounded to float16

Q5_1 and Q5_K have an offset and more than 4 bits, which no format of ours has: they are rounded to 8 bits, as the
others of more than 4 bits are where the runtime has no 8-bit blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgeexport import errors
from edgeexport.checkpoint.weights import WeightReader
from edgeexport.core import Array, Codes, Format, TensorRef

UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]


class Lattice(NamedTuple):
    """Blocks as the checkpoint holds them: int8 integers [R, K], float32 scales [R, K / block], and the float32 number
    that each block is moved by, None where it is by none. weight = scale * integer + offset."""

    integers: Array
    scales: Float32
    offsets: Float32 | None


@dataclass(frozen=True)
class Encoding:
    """One ggml type: bits and block of the format that holds it, whether blocks are moved, and how it is unpacked."""

    bits: int
    block: int
    shifted: bool
    unpack: Callable[[UInt8], Lattice]


def _half(raw: UInt8) -> Float32:
    """float16 of the last two bytes' axis: [..., 2 n] to [..., n]."""
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def _nibbles(packed: UInt8) -> UInt8:
    """[..., n] bytes to [..., 2 n]: all low nibbles, then all high ones, as ggml has them within a block."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _rows(parts: Array, count: int) -> Array:
    return np.ascontiguousarray(parts).reshape(count, -1)


def _q4_0(raw: UInt8) -> Lattice:
    blocks = raw.reshape(len(raw), -1, 18)
    return Lattice(_rows(_nibbles(blocks[..., 2:]).astype(np.int8) - 8, len(raw)), _half(blocks[..., :2])[..., 0], None)


def _q4_1(raw: UInt8) -> Lattice:
    blocks = raw.reshape(len(raw), -1, 20)
    scales, least = np.moveaxis(_half(blocks[..., :4]), -1, 0)
    integers = _rows(_nibbles(blocks[..., 4:]).astype(np.int8) - 8, len(raw))
    return Lattice(integers, np.ascontiguousarray(scales), least + 8 * scales)


def _q5_0(raw: UInt8) -> Lattice:
    blocks = raw.reshape(len(raw), -1, 22)
    fifth = np.unpackbits(np.ascontiguousarray(blocks[..., 2:6]), axis=-1, bitorder="little")
    integers = (_nibbles(blocks[..., 6:]) | (fifth << 4)).astype(np.int8) - 16
    return Lattice(_rows(integers, len(raw)), _half(blocks[..., :2])[..., 0], None)


def _q8_0(raw: UInt8) -> Lattice:
    blocks = raw.reshape(len(raw), -1, 34)
    integers = np.ascontiguousarray(blocks[..., 2:]).view(np.int8)
    return Lattice(_rows(integers, len(raw)), _half(blocks[..., :2])[..., 0], None)


def _q4_k(raw: UInt8) -> Lattice:
    blocks = raw.reshape(len(raw), -1, 144)
    d, dmin = np.moveaxis(_half(blocks[..., :4]), -1, 0)
    six = blocks[..., 4:16]
    scale = np.concatenate([six[..., :4] & 63, (six[..., 8:] & 15) | ((six[..., :4] >> 6) << 4)], axis=-1)
    least = np.concatenate([six[..., 4:8] & 63, (six[..., 8:] >> 4) | ((six[..., 4:8] >> 6) << 4)], axis=-1)
    halves = blocks[..., 16:].reshape(*blocks.shape[:-1], 4, 32)
    integers = np.stack([halves & 15, halves >> 4], axis=-2).astype(np.int8) - 8
    scales = d[..., None] * scale
    offsets = 8 * scales - dmin[..., None] * least
    return Lattice(_rows(integers, len(raw)), _rows(scales, len(raw)), _rows(offsets, len(raw)))


def _q6_k(raw: UInt8) -> Lattice:
    blocks = raw.reshape(len(raw), -1, 210)
    low = blocks[..., :128].reshape(*blocks.shape[:-1], 2, 1, 64) >> np.array([[0], [4]], np.uint8)
    high = blocks[..., 128:192].reshape(*blocks.shape[:-1], 2, 1, 32) >> np.array([[0], [2], [4], [6]], np.uint8)
    integers = (low & 15).reshape(*blocks.shape[:-1], 2, 4, 32) | ((high & 3) << 4)
    scales = np.ascontiguousarray(blocks[..., 192:208]).view(np.int8) * _half(blocks[..., 208:])
    return Lattice(_rows(integers.astype(np.int8) - 32, len(raw)), _rows(scales, len(raw)), None)


ENCODINGS: Mapping[str, Encoding] = {
    "Q4_0": Encoding(4, 32, False, _q4_0),
    "Q4_1": Encoding(4, 32, True, _q4_1),
    "Q4_K": Encoding(4, 32, True, _q4_k),
    "Q5_0": Encoding(8, 32, False, _q5_0),
    "Q6_K": Encoding(8, 16, False, _q6_k),
    "Q8_0": Encoding(8, 32, False, _q8_0),
}
"""What can be carried. A matrix's rows are whole blocks in all of them."""


def carried_rows(reader: WeightReader, ref: TensorRef, fmt: Format, start: int, stop: int) -> Codes:
    """Rows of a matrix in a format that `format_for` gave, as the checkpoint's integers.

    Raises: CheckpointError `weights-truncated`, `file-unreadable`; `nonfinite-weight` and `weight-too-large` for a
    damaged scale."""
    lattice = ENCODINGS[ref.encoding].unpack(reader.blocks(ref, start, stop))
    return to_codes(lattice, fmt, name=ref.name, first_row=start)


def to_codes(lattice: Lattice, fmt: Format, *, name: str = "weight", first_row: int = 0) -> Codes:
    """Blocks in our format. Where it wants scales above zero, a block of negative scale is turned about, and one of
    scale zero holds zeros. Raises as `carried_rows`."""
    integers, scales, offsets = lattice
    worst = np.maximum(np.abs(scales), np.abs(offsets) if offsets is not None else 0)
    if not np.isfinite(worst).all():
        row, block = (int(each) for each in np.argwhere(~np.isfinite(worst))[0])
        raise errors.nonfinite_weight(name, (first_row + row, block * fmt.block), float(worst[row, block]))
    if worst.max(initial=0.0) > np.finfo(np.float16).max:
        row = int(worst.max(axis=1).argmax())
        raise errors.weight_too_large(name, first_row + row, float(worst[row].max()), fmt.name)
    if fmt.shift and offsets is None:
        offsets = np.zeros_like(scales)
    least = np.float32(2**-24)
    if fmt.positive:
        blocks = integers.reshape(*scales.shape, -1).astype(np.int16)
        negative = (scales < 0)[..., None]
        if fmt.bits == 4:  # -8..7 turned about is -7..8: one less, and the offset one scale more
            assert offsets is not None or not negative.any(), "4 bits of either sign want an offset"
            blocks = np.where(negative, -1 - blocks, blocks)
            offsets = np.where(scales < 0, offsets - scales, offsets) if offsets is not None else None
        else:
            blocks = np.where(negative, np.minimum(-blocks, 127), blocks)
        integers = blocks.astype(np.int8).reshape(integers.shape)
        scales = np.abs(scales)
    if fmt.positive or fmt.shift == "zero16":
        flat = np.abs(scales) < least
        if fmt.shift == "zero16" and offsets is not None:  # a zero point beyond float16
            flat |= np.abs(scales) * np.float32(2**15) < np.abs(offsets)
        integers = np.where(flat[..., None], 0, integers.reshape(*scales.shape, -1)).reshape(integers.shape)
        stand_in = np.abs(offsets) if fmt.shift == "zero16" and offsets is not None else np.float32(0)
        scales = np.where(flat, np.maximum(stand_in, least), scales)
    return Codes(integers.astype(np.int8, copy=False), scales.astype(np.float16), offsets)
