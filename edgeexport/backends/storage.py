"""One file of weights, written in place: offsets are laid out first, then row blocks stream in from both cores."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edgeexport import errors
from edgeexport.core import PALETTE, Array, Codes, Format, Progress, StoredWeight, WeightSource
from edgeexport.packing import (
    from_float8,
    pack_int4,
    pack_int8,
    read_bytes,
    round_offsets,
    swap_nibbles,
    unpack_int4,
    unpack_int8,
    zero_points,
)

ALIGNMENT = 64
"""Bytes: a cache line, and what SIMD loads of the runtimes want."""

BLOCK_ELEMENTS = 1 << 20
"""Elements per streamed row block: 4 MB of float32, so that all temporaries stay far below any memory bar."""

THREADS = 2
"""On an EPYC core one alone writes int4-b128 from bfloat16 at 640 million elements per second, two at 760: calls of
numpy are short, and each ends with a wait for Python's lock. Two processes give 950, which the disk does not feed."""


@dataclass
class Layout:
    """Where each weight and each constant will lie in one file. Append in the order the runtime reads. `signed`
    and `dense` are how integers lie, as in `StoredWeight`."""

    file: str
    size: int = 0
    signed: bool = False
    dense: bool = False
    weights: dict[str, StoredWeight] = field(default_factory=dict)
    turned: dict[str, Array] = field(default_factory=dict)
    """Integer weights some of whose rows are stored with the other sign, as their scales are: bool [rows]."""
    constants: dict[str, tuple[int, Array]] = field(default_factory=dict)

    def add(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]], fmt: Format) -> tuple[int, int]:
        """Reserve one run of rows for these weights, one after the other, so that they read as one matrix.

        Returns the offsets of their data and of their scales (-1 for float formats).
        """
        widths = [shape[-1] if shape else 1 for shape in shapes]
        counts = [int(np.prod(shape[:-1], dtype=np.int64)) for shape in shapes]
        data = self._reserve(sum(n * row_bytes(w, fmt) for n, w in zip(counts, widths, strict=True)))
        scales = self._reserve(sum(2 * n * blocks(w, fmt) for n, w in zip(counts, widths, strict=True)))
        palettes = self._reserve(2 * sum(counts)) if fmt.palette else -1
        shift, shift_scales = self._reserve_shift(sum(counts), widths[0], fmt)
        at, at_scales, at_palettes = data, scales, palettes
        for name, shape, count, width in zip(names, shapes, counts, widths, strict=True):
            self.weights[name] = StoredWeight(
                self.file, at, at_scales if fmt.integer else -1, fmt, shape,
                signed=self.signed and not fmt.palette, palettes_offset=at_palettes,
                shift_offset=shift, shift_scales_offset=shift_scales, dense=self.dense and fmt.shift == "zero",
            )  # fmt: skip
            at_palettes += 2 * count if fmt.palette else 0
            shift += count * row_shift_bytes(width, fmt)
            shift_scales += 2 * count if fmt.shift == "int8" else 0
            at += count * row_bytes(width, fmt)
            at_scales += 2 * count * blocks(width, fmt)
        return data, scales if fmt.integer else -1

    def _reserve_shift(self, rows: int, width: int, fmt: Format) -> tuple[int, int]:
        """Room for zero points or offsets, and for the scales of int8 offsets: their places, -1 for none."""
        dense = self.dense and fmt.shift == "zero"
        size = -(-rows * blocks(width, fmt) // 2) if dense else rows * row_shift_bytes(width, fmt)
        shift = self._reserve(size) if fmt.shift else -1
        return shift, self._reserve(2 * rows) if fmt.shift == "int8" else -1

    def add_constant(self, name: str, array: Array) -> int:
        """Reserve room for a small array that is known already; returns its offset."""
        offset = self._reserve(array.nbytes)
        self.constants[name] = (offset, np.ascontiguousarray(array))
        return offset

    def _reserve(self, size: int) -> int:
        offset = -(-self.size // ALIGNMENT) * ALIGNMENT if size else self.size
        self.size = offset + size
        return offset


def row_bytes(width: int, fmt: Format) -> int:
    """Bytes of one row of `width` elements, scales apart."""
    return -(-width * fmt.bits // 8)


def row_shift_bytes(width: int, fmt: Format) -> int:
    """Bytes of one row's zero points or offsets, the scale of int8 offsets apart."""
    return fmt.shift_bytes(blocks(width, fmt)) - (2 if fmt.shift == "int8" else 0)


def blocks(width: int, fmt: Format) -> int:
    """Scales per row."""
    if not fmt.integer:
        return 0
    return width // fmt.block if fmt.block else 1


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write whole files by their names. Raises: UsageError `output-not-writable`."""
    try:
        for name, data in files.items():
            (folder / name).write_bytes(data)
    except OSError as problem:
        raise errors.output_not_writable(folder, str(problem)) from problem


def write(folder: Path, layout: Layout, source: WeightSource, progress: Progress) -> None:
    """Write the file that `layout` describes. Rows are quantised and packed as they pass; nothing is kept.

    Raises: UsageError `output-not-writable` when the disk is full or read-only; what `source` raises.
    """
    jobs = list(_blocks(layout.weights))
    total, done = sum(job.elements for job in jobs), 0
    try:
        descriptor = os.open(folder / layout.file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            if layout.size:
                os.posix_fallocate(descriptor, 0, layout.size)  # a full disk shows now, not after minutes
            for offset, array in layout.constants.values():
                _write_all(descriptor, array, offset)
            with ThreadPoolExecutor(THREADS) as pool:
                try:
                    for elements in pool.map(lambda job: _write_block(job, layout, descriptor, source), jobs):
                        done += elements
                        progress(done, total)
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
        finally:
            os.close(descriptor)
    except OSError as problem:
        raise errors.output_not_writable(folder, str(problem)) from problem


def read_rows(folder: Path, weight: StoredWeight, start: int, stop: int) -> Array:
    """Rows as the artifact holds them, as float32 [stop - start, width]: read back, unpacked and dequantised.

    A row of a vector is an element, one of a convolution is what its first axis holds.
    Raises: BundleError `artifact-truncated` when the file ends early.
    """
    fmt, (_, width) = weight.format, _matrix(weight.shape)
    size, count = row_bytes(width, fmt), stop - start
    path = folder / weight.file
    if _scattered(weight):  # small, and read whole
        whole = read_bytes(path, weight.offset, weight.shape[0] * size)
        dtype = {32: np.float32, 16: np.float16, 8: np.int8}[fmt.bits]
        held = whole.view(dtype).reshape([weight.shape[axis] for axis in weight.order])
        raw = np.ascontiguousarray(held.transpose(np.argsort(weight.order))[start:stop]).reshape(-1).view(np.uint8)
    else:
        raw = read_bytes(path, weight.offset + start * size, count * size)
    if not fmt.integer:
        dtype = np.float32 if fmt.bits == 32 else np.float16
        return _in_order(raw.view(dtype).astype(np.float32), weight, count).reshape(count, width)
    values = _in_order(_unpack(raw.reshape(count, size), weight), weight, count)
    per_row = blocks(width, fmt)
    each = _row_scale_bytes(weight)
    scales = read_bytes(path, weight.scales_offset + each * start, each * count).view(_scale_dtype(weight))
    if fmt.palette:
        values = _coloured(path, weight, values, start)
    scaled = values.reshape(count, per_row, -1)
    wide = scales.reshape(count, per_row, -1).astype(np.float32)
    np.multiply(scaled, wide[:, :, -1:], out=scaled)
    if fmt.shift:
        scaled += wide[:, :, :1] if weight.paired else _offsets(path, weight, start, wide[:, :, 0])[:, :, None]
    return scaled.reshape(count, width)


def misplaced(weight: StoredWeight, size: int) -> Iterator[str]:
    """Why `read_rows` could not read a weight from a file of `size` bytes; nothing where it can."""
    fmt, (rows, width) = weight.format, _matrix(weight.shape)
    per_row = blocks(width, fmt)
    if fmt.integer and (not per_row or width % per_row or (fmt.bits == 4 and width % 2)):
        yield f"rows of {width} do not divide into blocks of {fmt.block}"
        return
    runs = {"data": (weight.offset, rows * row_bytes(width, fmt))}
    if fmt.integer:
        runs["scales"] = (weight.scales_offset, rows * _row_scale_bytes(weight))
    if fmt.palette:
        runs["palettes"] = (weight.palettes_offset, 2 * PALETTE * -(-rows // PALETTE))
    if fmt.shift == "zero":
        runs["zero points"] = (weight.shift_offset, -(-rows * _row_zero_points(weight) // 2))
    elif fmt.shift and not weight.paired:
        runs["offsets"] = (weight.shift_offset, rows * row_shift_bytes(width, fmt))
    if fmt.shift == "int8":
        runs["scales of offsets"] = (weight.shift_scales_offset, 2 * rows)
    for what, (start, length) in runs.items():
        if not 0 <= start <= size - length:
            yield f"its {what} are bytes {start} to {start + length}; {weight.file} has {size}"


def _offsets(path: Path, weight: StoredWeight, start: int, scales: Array) -> Array:
    """What is added to each block of rows from `start` on, whose scales are float32 [rows, blocks]: of that shape."""
    (count, per_row), fmt, size = scales.shape, weight.format, row_shift_bytes(_matrix(weight.shape)[1], weight.format)
    if fmt.shift == "zero":
        return -_zero_points(path, weight, start, count, per_row).astype(np.float32) * scales
    raw = read_bytes(path, weight.shift_offset + start * size, count * size)
    if fmt.shift == "half":
        return raw.view(np.float16).reshape(count, per_row).astype(np.float32)
    if fmt.shift == "zero16":
        return -raw.view(np.float16).reshape(count, per_row).astype(np.float32) * scales
    shared = read_bytes(path, weight.shift_scales_offset + 2 * start, 2 * count).view(np.float16)
    return raw.view(np.int8).reshape(count, per_row).astype(np.float32) * shared.astype(np.float32)[:, None]


def _zero_points(path: Path, weight: StoredWeight, start: int, count: int, per_row: int) -> Array:
    """int8 [rows, blocks] of rows from `start` on."""
    stride = _row_zero_points(weight)
    first, last = start * stride, (start + count) * stride
    raw = read_bytes(path, weight.shift_offset + first // 2, -(-last // 2) - first // 2)
    values = unpack_int4(raw[None], 0 if weight.signed else 8)[0, first % 2 :][: last - first]
    return values.reshape(count, stride)[:, :per_row]


def _row_zero_points(weight: StoredWeight) -> int:
    """Zero points from one row's first to the next one's."""
    per_row = blocks(_matrix(weight.shape)[1], weight.format)
    return per_row if weight.dense else per_row + per_row % 2


def _row_scale_bytes(weight: StoredWeight) -> int:
    """Bytes of one row's scales, and of the offsets among them."""
    each = weight.scale_bits // 8 * blocks(_matrix(weight.shape)[1], weight.format)
    return 2 * each if weight.paired else each


def _scattered(weight: StoredWeight) -> bool:
    """Whether a row's elements lie apart, between those of others."""
    return bool(weight.order) and weight.order[0] != 0


def _in_order(rows: Array, weight: StoredWeight, count: int) -> Array:
    """Rows as the file holds them, with the axes of their shape."""
    if not weight.order or _scattered(weight):
        return rows
    held = rows.reshape(count, *(weight.shape[axis] for axis in weight.order[1:]))
    return np.ascontiguousarray(held.transpose(np.argsort(weight.order)))


def _coloured(path: Path, weight: StoredWeight, values: Array, start: int) -> Array:
    """The palettes' numbers at these places, float32 [rows, width]."""
    rows = np.arange(start, start + len(values)) // PALETTE
    first, last = int(rows[0]), int(rows[-1]) + 1
    raw = read_bytes(path, weight.palettes_offset + 2 * PALETTE * first, 2 * PALETTE * (last - first))
    palettes = raw.view(np.float16).astype(np.float32).reshape(-1, PALETTE)
    return palettes[(rows - first)[:, None], values.astype(np.intp) + 8]


@dataclass(frozen=True)
class _Block:
    """Rows start..stop of one weight."""

    name: str
    start: int
    stop: int
    elements: int


def _blocks(weights: Mapping[str, StoredWeight]) -> Iterator[_Block]:
    for name, weight in weights.items():
        rows, width = _matrix(weight.shape)
        step = max(1, BLOCK_ELEMENTS // max(1, width))
        if weight.format.palette:
            step = max(1, step // PALETTE) * PALETTE
        if _scattered(weight):
            step = rows
        if weight.dense:
            step += step % 2  # whole bytes of zero points
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            yield _Block(name, start, stop, (stop - start) * width)


def _write_block(job: _Block, layout: Layout, descriptor: int, source: WeightSource) -> int:
    """Returns the block's elements."""
    weight = layout.weights[job.name]
    fmt, (_, width) = weight.format, _matrix(weight.shape)
    if fmt.integer:
        codes = source.quantized_rows(job.name, job.start, job.stop)
        values, scales = codes.integers, codes.scales
        if fmt.shift and not weight.paired:
            _write_shift(job, weight, codes, descriptor)
        if fmt.palette:
            scales, palettes = scales.T
            _write_all(descriptor, palettes, weight.palettes_offset + 2 * job.start)
        else:  # a row's one scale, for each of the blocks that a runtime reads it in
            scales = np.repeat(scales, blocks(width, fmt) // scales.shape[1], axis=1)
        if job.name in layout.turned:
            sign = np.where(layout.turned[job.name][job.start : job.stop], -1, 1)[:, None]
            values, scales = (values * sign).astype(np.int8), (scales * sign).astype(scales.dtype)
        if weight.order:
            values = np.ascontiguousarray(values.reshape(-1, *weight.shape[1:]).transpose(weight.order))
        data = _pack(values, weight)
        if weight.paired:
            assert codes.offsets is not None, "a shifted format"
            scales = np.stack([codes.offsets.astype(np.float16), scales], axis=-1)
        at = weight.scales_offset + job.start * _row_scale_bytes(weight)
        _write_all(descriptor, scales.astype(_scale_dtype(weight), copy=False), at)
    else:
        data = source.float_rows(job.name, job.start, job.stop)
        if weight.order:
            data = data.reshape(-1, *weight.shape[1:]).transpose(weight.order)
    _write_all(descriptor, data, weight.offset + job.start * row_bytes(width, fmt))
    return job.elements


def _write_shift(job: _Block, weight: StoredWeight, codes: Codes, descriptor: int) -> None:
    """Zero points, two a byte, or offsets of a block's rows."""
    fmt, offsets = weight.format, codes.offsets
    assert offsets is not None, "a shifted format"
    data: Array
    at = weight.shift_offset + job.start * row_shift_bytes(_matrix(weight.shape)[1], fmt)
    if fmt.shift == "zero":
        stride = _row_zero_points(weight)
        flat = np.pad(offsets, ((0, 0), (0, stride - offsets.shape[1]))).reshape(1, -1)
        data = pack_int4(np.pad(flat, ((0, 0), (0, flat.size % 2))), 0 if weight.signed else 8)
        at = weight.shift_offset + job.start * stride // 2
    elif fmt.shift == "half":
        data = offsets.astype(np.float16)
    elif fmt.shift == "zero16":
        data = zero_points(offsets, codes.scales)
    else:
        data, scales = round_offsets(offsets)
        _write_all(descriptor, scales, weight.shift_scales_offset + 2 * job.start)
    _write_all(descriptor, data, at)


def _pack(values: Array, weight: StoredWeight) -> Array:
    """int8 values [rows, width] as the file holds them, uint8."""
    if weight.format.bits == 4:
        packed = pack_int4(values, 0 if weight.signed else 8)
        return swap_nibbles(packed) if weight.high_first else packed
    return values.view(np.uint8) if weight.signed or weight.format.float8 else pack_int8(values)


def _unpack(raw: Array, weight: StoredWeight) -> Array:
    """The inverse of `_pack`, as float32."""
    if weight.format.float8:
        return from_float8(raw.view(np.int8))
    if weight.format.bits == 4:
        values = unpack_int4(swap_nibbles(raw) if weight.high_first else raw, 0 if weight.signed else 8)
    else:
        values = raw.view(np.int8) if weight.signed else unpack_int8(raw)
    return values.astype(np.float32)


def _scale_dtype(weight: StoredWeight) -> type[np.floating]:
    return np.float32 if weight.scale_bits == 32 else np.float16


def _write_all(descriptor: int, array: Array, offset: int) -> None:
    view = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, elements of a row) as those who read a weight by rows count them: along the first axis."""
    return (shape[0], int(np.prod(shape[1:], dtype=np.int64))) if shape else (1, 1)
