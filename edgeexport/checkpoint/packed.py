"""Read rows of matrices that come quantised: their codes, scales and zero points as they are, or as float32.

What the layouts mean, from the tools that write them:

    gptq   `QuantLinear.pack` and `forward` of AutoGPTQ, qlinear_cuda.py (https://github.com/AutoGPTQ/AutoGPTQ):
           weight[n, k] = scales[g_idx[k], n] * (q[k, n] - zero[g_idx[k], n]). Its first format stores zero - 1, taken
           off words of zero points as if they were 32-bit numbers: GPTQModel's `convert_gptq_v1_to_v2_format` adds it
           again, carries included, and so do we. (Readers that add 1 to each integer differ where one is 15.)
    awq    `WQLinear_GEMM.from_linear` of AutoAWQ (https://github.com/casper-hansen/AutoAWQ)
    words, bytes   `pack_to_int32` and `dequantize` of compressed-tensors (https://github.com/vllm-project/compressed-tensors);
           float8 with a scale per block is transformers' `finegrained_fp8`

GPTQ and AWQ hold the transposed matrix, so that rows of it are columns of the file. Where the rest of such a line costs
more than a call, each line of the file is one `pread` of what is wanted; else whole lines are read, a window of them at
a time, and cut. So r rows cost K calls (GPTQ at 4 bits: K / 8), or N / r times their bytes in copies from the system's
cache: see docs/quantisation.md for what that takes. In memory are the codes of the asked rows and one window.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgeexport import errors
from edgeexport.core import Array, Packing, TensorRef
from edgeexport.packing import from_float8, unpack_int4, unpack_int8

Float32 = npt.NDArray[np.float32]
Int8 = npt.NDArray[np.int8]
UInt8 = npt.NDArray[np.uint8]

Fetch = Callable[[TensorRef, int, Array], None]
"""Fills an array with a tensor's bytes from a place on. Raises `weights-truncated`, `file-unreadable`."""

READ_THROUGH = 32 << 10
"""Bytes of a line that may be read in vain: copying them from the system's cache costs less than one more call of
preadv from Python. With a quarter of it GPTQ's 4096 x 4096 at 4 bits came at 540 million weights a second, with it at
1,100."""
WINDOW = 1 << 18
"""Bytes of whole lines that are read at a time."""
STEP = 1 << 20
"""Elements that are decoded to float32 at a time."""

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word the n-th integer is: the inverse of the order 0 2 4 6 1 3 5 7."""

FLOATS = {"F16": np.float16, "BF16": np.uint16, "F32": np.float32}
"""Encodings of scales, and what their bytes are viewed in."""


class Packed(NamedTuple):
    """Some rows: int8 `codes` [R, K], centred at zero, or the bits of float8; float32 `scales` [R, groups]; int8
    `zeros` [R, groups], centred as the codes are, None where all are zero; `groups` int64 [K], None where group g is
    the g-th run of K / groups elements. weight = scale * (code - zero)."""

    codes: Int8
    scales: Float32
    zeros: Int8 | None
    groups: npt.NDArray[np.int64] | None


class Held(NamedTuple):
    """What an encoding says: the bits of a code, how many elements of a row share a scale, and whether there are zero
    points other than the middle. `scattered`: groups are not runs of equal length. A `float8` has no group where its
    scales are of blocks that span rows."""

    bits: int
    group: int
    zeros: bool = False
    scattered: bool = False
    float8: bool = False


def encoding_of(how: Packing, width: int) -> str:
    """The name of a packing in plans, for rows of `width`: "int4-g128", "int8-g4096-zero", "int4-g128-scattered",
    "e4m3-g4096", "e4m3-128x128"."""
    if how.float8:
        of_rows = how.tall == 1 or how.group == width
        return f"e4m3-g{how.group}" if of_rows else f"e4m3-{how.tall}x{how.group}"
    scattered = how.groups is not None or width % how.group
    zeros = how.zeros is not None and not how.centred
    return f"int{how.bits}-g{how.group}{'-zero' if zeros else ''}{'-scattered' if scattered else ''}"


def held_in(encoding: str) -> Held | None:
    """What `encoding_of` put into the name; None for the name of another encoding."""
    found = re.fullmatch(r"(int4|int8|e4m3)-(?:g(\d+)|\d+x\d+)(-zero)?(-scattered)?", encoding)
    if found is None:
        return None
    kind, group, zeros, scattered = found.groups()
    return Held(4 if kind == "int4" else 8, int(group or 0), bool(zeros), bool(scattered), kind == "e4m3")


def read_packed(fetch: Fetch, ref: TensorRef, start: int, stop: int) -> Packed:
    """Rows `start` to `stop` of a matrix that comes quantised, as the checkpoint has them.

    Raises: CheckpointError `bad-quantised-weight` where group numbers or promised zero points are others than those
    that its index was made from; `weights-truncated`, `file-unreadable`."""
    how = _how(ref)
    codes = _codes(fetch, ref, how, start, stop)
    scales = _scales(fetch, ref, how, start, stop)
    zeros = _zeros(fetch, ref, how, start, stop)
    if how.centred and zeros is not None:
        if zeros.any():
            row, group = np.argwhere(zeros)[0]
            found = int(zeros[row, group]) + 2 ** (how.bits - 1)
            raise errors.bad_quantised_weight(
                ref.file, ref.name, f"config.json promises symmetric codes, but row {start + row} has a zero point "
                f"of {found}, not {2 ** (how.bits - 1)}"
            )  # fmt: skip
        zeros = None
    width = ref.shape[1]
    groups = None
    if how.groups is not None:
        groups = read_groups(fetch, how.groups, scales.shape[1], ref.name)
    elif width % how.group:
        groups = np.arange(width, dtype=np.int64) // how.group
    return Packed(codes, scales, zeros, groups)


def float_rows(fetch: Fetch, ref: TensorRef, start: int, stop: int, out: Float32) -> None:
    """Rows of a matrix that comes quantised as float32, into `out` [stop - start, K]. Raises as `read_packed`."""
    step = max(1, STEP // max(1, ref.shape[1]))
    for begin in range(start, stop, step):
        end = min(stop, begin + step)
        part = read_packed(fetch, ref, begin, end)
        rows = out[begin - start : end - start]
        with np.errstate(all="ignore"):  # a damaged scale gives NaN, which is reported by those who use the weight
            numbers = from_float8(part.codes) if _how(ref).float8 else part.codes.astype(np.float32)
            if part.groups is not None:
                if part.zeros is not None:
                    numbers -= part.zeros[:, part.groups]
                np.multiply(numbers, part.scales[:, part.groups], out=rows)
                continue
            blocks = numbers.reshape(end - begin, part.scales.shape[1], -1)
            if part.zeros is not None:
                blocks -= part.zeros[:, :, None].astype(np.float32)
            np.multiply(blocks, part.scales[:, :, None], out=rows.reshape(blocks.shape))


def read_groups(fetch: Fetch, ref: TensorRef, count: int, name: str) -> npt.NDArray[np.int64]:
    """The group of each k of the matrix `name`, which has `count`: int64 [K]. Raises `bad-quantised-weight` for one
    out of range."""
    raw = np.empty(ref.shape, np.int32 if ref.encoding == "I32" else np.int64)
    fetch(ref, 0, raw)
    if raw.size and (raw.min() < 0 or raw.max() >= count):
        worst = int(raw.min()) if raw.min() < 0 else int(raw.max())
        raise errors.bad_quantised_weight(
            ref.file, name, f"{ref.name} has the group {worst}; there are {count}, counted from 0"
        )
    return raw.astype(np.int64)


def _how(ref: TensorRef) -> Packing:
    assert ref.packing is not None, f"{ref.name} comes quantised"
    return ref.packing


def _codes(fetch: Fetch, ref: TensorRef, how: Packing, start: int, stop: int) -> Int8:
    """int8 [stop - start, K]."""
    rows, width = ref.shape
    if how.layout == "bytes":
        held = np.empty((stop - start, width), np.int8)
        fetch(ref, start * width, held)
        return held
    if how.layout == "words":
        words = -(-width * how.bits // 32)
        raw = np.empty((stop - start, 4 * words), np.uint8)
        fetch(ref, 4 * words * start, raw)
        return _unpack(raw, how.bits)[:, :width]
    if how.layout == "gptq":
        raw = _columns(fetch, ref, width * how.bits // 32, 4 * rows, 4 * start, 4 * stop)
        turned = np.ascontiguousarray(raw.view(np.uint32).T)
        return _unpack(turned.view(np.uint8), how.bits)
    return np.ascontiguousarray(_from_words(fetch, ref, how, (width, rows), start, stop).T)


def _scales(fetch: Fetch, ref: TensorRef, how: Packing, start: int, stop: int) -> Float32:
    """float32 [stop - start, groups]."""
    part, kind, count = how.scales, FLOATS[how.scales.encoding], stop - start
    item = np.dtype(kind).itemsize
    if part.elements == 1:
        one = np.empty(1, kind)
        fetch(part, 0, one)
        return np.repeat(_widened(one)[None], count, axis=0)
    if how.layout in ("gptq", "awq"):
        raw = _columns(fetch, part, part.shape[0], item * part.shape[1], item * start, item * stop)
        return np.ascontiguousarray(_widened(raw.view(kind)).T)
    groups = part.elements // part.shape[0]
    first, last = start // how.tall, -(-stop // how.tall)
    held = np.empty((last - first, groups), kind)
    fetch(part, item * groups * first, held)
    return _widened(held)[np.arange(start, stop) // how.tall - first] if how.tall > 1 else _widened(held)


def _zeros(fetch: Fetch, ref: TensorRef, how: Packing, start: int, stop: int) -> Int8 | None:
    """int8 [stop - start, groups]."""
    part = how.zeros
    if part is None:
        return None
    groups = part.elements // part.shape[0]
    if part.encoding == "I8":
        held = np.empty((stop - start, groups), np.int8)
        fetch(part, groups * start, held)
        return held
    if how.layout in ("gptq", "awq"):
        return np.ascontiguousarray(_from_words(fetch, part, how, (part.shape[0], ref.shape[0]), start, stop).T)
    each = 32 // how.bits
    first, last = start // each, -(-stop // each)
    raw = np.empty((last - first, groups), np.uint32)
    fetch(part, 4 * groups * first, raw)
    integers = _unpack(np.ascontiguousarray(raw.T).view(np.uint8), how.bits)
    return np.ascontiguousarray(integers.T[start - first * each : stop - first * each])


def _from_words(fetch: Fetch, part: TensorRef, how: Packing, shape: tuple[int, int], start: int, stop: int) -> Int8:
    """int8 [lines, stop - start] of a tensor [lines, N] whose words hold consecutive n."""
    lines, width = shape
    each = 32 // how.bits
    first, last = start // each, -(-stop // each)
    raw = _columns(fetch, part, lines, 4 * (width // each), 4 * first, 4 * last)
    if how.one_less:
        words = raw.view(np.uint32)
        words += np.uint32(sum(1 << at for at in range(0, 32, how.bits)))
    integers = _unpack(raw, how.bits)
    if how.layout == "awq":
        integers = integers.reshape(lines, -1, each)[:, :, AWQ_ORDER].reshape(lines, -1)
    return integers[:, start - first * each : stop - first * each]


def _unpack(raw: UInt8, bits: int) -> Int8:
    """Bytes of little-endian words [R, 4 words] to the integers in them, less the middle: int8 [R, 32 words / bits]."""
    return unpack_int4(raw) if bits == 4 else unpack_int8(raw)


def _widened(numbers: Array) -> Float32:
    """float32 of float16, float32, or bfloat16 viewed as uint16."""
    if numbers.dtype == np.uint16:
        return (numbers.astype(np.uint32) << 16).view(np.float32)
    return numbers.astype(np.float32)


def _columns(fetch: Fetch, ref: TensorRef, lines: int, line: int, begin: int, end: int) -> UInt8:
    """Bytes `begin` to `end` of each of a tensor's lines of `line` bytes: uint8 [lines, end - begin]."""
    out = np.empty((lines, end - begin), np.uint8)
    if line - (end - begin) > READ_THROUGH:
        for at in range(lines):
            fetch(ref, at * line + begin, out[at])
        return out
    for at, count in _windows(lines, max(1, WINDOW // max(1, line))):
        whole = np.empty((count, line), np.uint8)
        fetch(ref, at * line, whole)
        out[at : at + count] = whole[:, begin:end]
    return out


def _windows(total: int, step: int) -> Iterator[tuple[int, int]]:
    for at in range(0, total, step):
        yield at, min(step, total - at)
