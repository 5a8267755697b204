"""MNN's weight file: where each tensor lies in it, and what MNN wants beside its numbers.

    matrix, int4 or int8    header | packed rows | float16 scales [rows, blocks]
    matrix, moved int4      header | packed rows | float16 pairs [rows, blocks, (offset, scale)]
    matrix, float16         rows
    matrix, float32         rows
    scale of a norm         float32 [width] | float32 shift [width], zeros where it has none
    any other               float32, as it is

MNN reads the file by offsets and needs no alignment, but it wants a matrix's parts next to each other. The header
lists the values that an integer may have. Source: MNN source/core/ConvolutionCommon.cpp, IDSTDecoder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgeexport.backends.storage import Layout, blocks, row_bytes
from edgeexport.core import Array, Format, StoredWeight

FP32 = Format("fp32", 32, integer=False)
BLOCKS = (32, 16)
"""Widths of the blocks that a row's one scale is written for: 32 costs 6% of an int8 matrix, and 64 would leave twice
the error."""
IDST, FLOAT16 = 1, 3
"""Kinds of a matrix's parameters in MNN's schema."""


@dataclass(frozen=True)
class Matrix:
    """Where a matrix's parts are, in bytes; `header` and `scales` are 0 for floats."""

    offset: int
    header: int
    data: int
    scales: int


class WeightFile(Layout):
    """A layout whose tensors lie as MNN wants them."""

    def __init__(self, file: str) -> None:
        super().__init__(file)
        self._matrices: dict[str, Matrix] = {}
        self.add_constant("start", np.frombuffer(b"edgeexport MNN  ", np.uint8))  # MNN-LLM takes offset 0 for "none"

    def matrix(self, name: str, shape: tuple[int, ...], fmt: Format) -> Matrix:
        """Lay out a matrix [rows, width], or a kernel [rows, ...], once."""
        if name in self._matrices:
            return self._matrices[name]
        rows, width = shape[0], int(np.prod(shape[1:], dtype=np.int64))
        fmt = in_blocks(fmt, width)
        start, head = self.size, _header(rows, width, fmt.bits) if fmt.integer else np.empty(0, np.uint8)
        if fmt.integer:
            self.constants[f"{name}.header"] = (start, head)
        data, scales = rows * row_bytes(width, fmt), scale_bytes(fmt, (rows, width))
        at = start + head.nbytes
        self.size = at + data + scales + (4 * rows if fmt.bits == 32 else 0)
        self.weights[name] = StoredWeight(
            self.file, at, at + data if fmt.integer else -1, fmt, shape,
            high_first=fmt.integer and fmt.bits == 4, paired=fmt.shift == "half",
        )  # fmt: skip
        self._matrices[name] = Matrix(start, head.nbytes, data, scales)
        return self._matrices[name]

    def value(self, name: str, shape: tuple[int, ...], fmt: Format) -> int:
        """Lay out a float tensor once; returns its offset."""
        if name not in self.weights:
            self.weights[name] = StoredWeight(self.file, self.size, -1, fmt, shape)
            self.size += fmt.bits // 8 * int(np.prod(shape, dtype=np.int64))
        return self.weights[name].offset

    def norm(self, names: Sequence[str], width: int) -> int:
        """Lay out a norm's scale, and its shift where there is one, once, in float32; returns the offset. A norm's
        tensors are its own: MNN reads one behind the other."""
        if names[0] not in self.weights:
            for k, name in enumerate(names):
                self.weights[name] = StoredWeight(self.file, self.size + 4 * width * k, -1, FP32, (width,))
            self.size += 8 * width  # what is not written is zero
        return self.weights[names[0]].offset

    def table(self, name: str, array: Array) -> int:
        """Lay out a float32 tensor that is known already, once; returns its offset. Variants of a component have
        tables of one name and other numbers."""
        data = np.ascontiguousarray(array, np.float32)
        key = f"{name}.{hashlib.sha256(data.data).hexdigest()}"
        if key not in self.constants:
            self.constants[key] = (self.size, data)
            self.size += data.nbytes
        return self.constants[key][0]


def in_blocks(fmt: Format, width: int) -> Format:
    """The format with its one scale per row written for each of several blocks: as wide, MNN rounds activations (see
    `run_config`). A plan gives such rows a width that a block divides."""
    if not fmt.integer or fmt.block:
        return fmt
    block = next(size for size in BLOCKS if width % size == 0)
    return Format(f"int{fmt.bits}-b{block}", fmt.bits, integer=True, block=block)


def looked_up(file: str, shape: tuple[int, ...], fmt: Format) -> StoredWeight:
    """A table alone in its file, rows and then scales, as MNN-LLM looks embeddings up that are no decoder's own."""
    rows, width = shape
    scales = rows * row_bytes(width, fmt) if fmt.integer else -1
    four = fmt.integer and fmt.bits == 4
    return StoredWeight(file, 0, scales, fmt, shape, high_first=four, paired=fmt.shift == "half")


def scale_bytes(fmt: Format, shape: tuple[int, int]) -> int:
    """Bytes of a matrix's scales, and of the offsets among them."""
    rows, width = shape
    return fmt.nbytes(shape) - rows * row_bytes(width, fmt) if fmt.integer else 0


def parameters(fmt: Format, rows: int, width: int) -> dict[str, object] | None:
    """What MNN's schema says of a matrix's numbers; None for float32.

    A `readType` other than 0 makes its scales pairs. `aMin` is what MNN takes off their offsets, in units of the scale,
    where it is below 0, and -128 where it is 0; above, they are added to scale * integer as they are.
    """
    if not fmt.integer:
        return {"type": FLOAT16} if fmt.bits == 16 else None
    pairs = rows * blocks(width, fmt) if fmt.shift else 0
    return {
        "type": IDST, "quantScale": 1.0, "scaleIn": 0.0, "scaleOut": 0.0, "useInt32": False, "has_scaleInt": False,
        "shapeInt32": max(rows, width) > 65535, "aMaxOrBits": fmt.bits, "aMin": 1 if pairs else 0,
        "readType": pairs, "weightSize": 0, "scaleStorage": "FP16",
    }  # fmt: skip


def external(matrix: Matrix) -> list[int]:
    """Where MNN finds a convolution's numbers: offset, bytes of header and rows, of scales, of a bias, of an index."""
    return [matrix.offset, matrix.header + matrix.data, matrix.scales, 0, 0]


def _header(rows: int, width: int, bits: int) -> Array:
    """Rank 2, the sizes, how many values there are (0 for 256), and the values."""
    kind = np.uint32 if max(rows, width) > 65535 else np.uint16
    count = 1 << bits
    values = np.arange(-count // 2, count // 2, dtype=np.int8)
    parts = (
        np.array([2], np.uint8), np.array([rows, width], kind).view(np.uint8), np.array([count % 256], np.uint8),
        values.view(np.uint8),
    )  # fmt: skip
    return np.concatenate(parts)
