"""Bytes of small numbers: how int4, int8 and float8 values lie in an artifact. No state."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgeexport import errors
from edgeexport.plainfile import open_plain

Float32 = npt.NDArray[np.float32]
Int8 = npt.NDArray[np.int8]
UInt8 = npt.NDArray[np.uint8]


def read_bytes(path: Path, offset: int, size: int) -> UInt8:
    """Bytes of a file of ours. Raises: BundleError `artifact-truncated` when the file ends early; OSError."""
    with open_plain(path, follow=True) as file:
        file.seek(offset)
        data: UInt8 = np.empty(size, np.uint8)
        got = file.readinto(data.data) if size else 0
    if got != size:
        raise errors.artifact_truncated(path, offset + size)
    return data


def pack_int4(values: Int8, zero_point: int = 8) -> UInt8:
    """Two values a byte: int8 [R, K] in -8..7 to uint8 [R, K / 2], `value + zero_point`, element 2i in the low
    nibble. With `zero_point` 8 this is MatMulNBits' layout; with 0 it is ONNX's INT4 (two's complement)."""
    if values.shape[-1] % 2:
        raise ValueError("rows of an odd width cannot be packed two a byte")
    nibbles = np.add(np.ascontiguousarray(values).view(np.uint8), np.uint8(zero_point))
    if zero_point != 8:
        np.bitwise_and(nibbles, np.uint8(15), out=nibbles)
    pairs = nibbles.view("<u2")  # low byte: element 2i; high byte: element 2i + 1
    packed: UInt8 = np.bitwise_or(pairs, pairs >> 4).astype(np.uint8)
    return packed


def unpack_int4(packed: UInt8, zero_point: int = 8) -> Int8:
    """The inverse of `pack_int4`: uint8 [R, K / 2] to int8 [R, K]."""
    pairs = packed.astype("<u2")
    np.bitwise_or(pairs, np.left_shift(pairs, 4), out=pairs)  # the high nibble is the second byte's low one
    nibbles = pairs.view(np.uint8)
    np.bitwise_and(nibbles, np.uint8(15), out=nibbles)
    if zero_point != 8:  # two's complement: bit 3 is the sign
        np.bitwise_xor(nibbles, np.uint8(8), out=nibbles)
    return np.subtract(nibbles, np.uint8(8), out=nibbles).view(np.int8)


def pack_int8(values: Int8) -> UInt8:
    """int8 to uint8 as value + 128: what 8-bit MatMulNBits and GatherBlockQuantized store."""
    return np.bitwise_xor(values.view(np.uint8), np.uint8(128))


def unpack_int8(packed: UInt8) -> Int8:
    """The inverse of `pack_int8`."""
    return np.bitwise_xor(packed, np.uint8(128)).view(np.int8)


def round_offsets(offsets: Float32) -> tuple[Int8, npt.NDArray[np.float16]]:
    """Float32 offsets [R, blocks] as int8 of the same shape and one float16 scale for each row [R]: the row's largest
    magnitude / 127, and above zero, since LiteRT refuses another, in a row of zeros, too. Raises ValueError for what is
    not finite, and where a scale does not fit float16."""
    peaks = np.abs(offsets).max(axis=1, initial=0.0)
    if not peaks.max(initial=0.0) <= 127 * 65504.0:
        raise ValueError("offsets beyond float16")
    scales = np.maximum((peaks / np.float32(127)).astype(np.float16), np.float16(2**-24))
    units = offsets / scales.astype(np.float32)[:, None]
    return np.clip(np.rint(units), -127, 127).astype(np.int8), scales


def zero_points(offsets: Float32, scales: npt.NDArray[np.float16]) -> npt.NDArray[np.float16]:
    """The float16 zero points that stand for these offsets: scale * (integer - zero point) = scale * integer + offset.
    No scale may be zero."""
    with np.errstate(over="raise", divide="raise"):
        return (-offsets / scales.astype(np.float32)).astype(np.float16)


def to_float8(values: Float32) -> Int8:
    """The bits of the float8 e4m3 nearest to each number, ties to even; none may be beyond 448, the largest."""
    import ml_dtypes

    return values.astype(ml_dtypes.float8_e4m3fn).view(np.int8)


def from_float8(bits: Int8) -> Float32:
    """The inverse of `to_float8`."""
    import ml_dtypes

    numbers: Float32 = bits.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return numbers


def swap_nibbles(packed: UInt8) -> UInt8:
    """Bytes with their two int4 values in the other order: the inverse of itself."""
    swapped: UInt8 = np.bitwise_or(packed << 4, packed >> 4)
    return swapped
