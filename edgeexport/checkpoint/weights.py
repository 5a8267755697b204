"""Read weights by rows, as float32 or as they are stored, with no more of a file in memory than is asked for."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from edgeexport import errors
from edgeexport.checkpoint.files import open_regular
from edgeexport.checkpoint.packed import Packed, float_rows, read_groups, read_packed
from edgeexport.core import Array, TensorRef

PLAIN = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
"""Encodings of one number per element, and the numpy dtype their bytes are viewed in. numpy has no bfloat16."""

DECODED_BYTES = 2**20
"""How much float32 is decoded at a time: small enough that stored and decoded rows stay in the processor's cache."""


class WeightReader:
    """Reads the data of `TensorRef`s. A context manager; safe to share between threads. A pickled copy is a new reader.

    Files stay open until the end. Every read is a `pread`: mapped pages would count as memory of the process.
    All methods raise `weights-truncated` when a file ends early and `file-unreadable` when it cannot be read.
    """

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._closed = False

    def __reduce__(self) -> tuple[type[WeightReader], tuple[()]]:
        return WeightReader, ()

    def __enter__(self) -> WeightReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all files. No other thread may be reading."""
        with self._lock:
            self._closed = True
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def read(self, ref: TensorRef) -> Array:
        """The whole tensor as float32, in its own shape."""
        return self.rows(ref, 0, _row_count(ref)).reshape(ref.shape)

    def rows(self, ref: TensorRef, start: int, stop: int) -> Array:
        """Rows `start` to `stop` (exclusive) along the first axis: float32 [stop - start, *shape[1:]].

        A row of a one-dimensional tensor is an element; a tensor of no dimension has one row.
        Raises `unsupported-encoding` for integers, float8 and unknown encodings, but for matrices that come quantised;
        for those `bad-quantised-weight`.
        """
        _check_range(ref, start, stop)
        out = np.empty((stop - start, *ref.shape[1:]), np.float32)
        self.float32_into(ref, start, stop, out)
        return out

    def float32_into(self, ref: TensorRef, start: int, stop: int, out: Array) -> None:
        """As `rows`, into `out`: float32, C-contiguous, of that shape."""
        _check_range(ref, start, stop)
        if out.dtype != np.float32 or not out.flags.c_contiguous or out.shape != (stop - start, *ref.shape[1:]):
            raise ValueError(f"out is {out.dtype} {out.shape}, not contiguous float32 {(stop - start, *ref.shape[1:])}")
        if ref.packing is not None:
            float_rows(self._read_bytes, ref, start, stop, out)
            return
        decode = self._decode_plain if ref.encoding in PLAIN else self._decode_blocks
        _in_checkpoint_order(ref, start, stop, out, decode)

    def raw(self, ref: TensorRef, start: int, stop: int) -> Array:
        """The same rows as stored: float64, float32, float16, or bfloat16 as uint16. For the `PLAIN` encodings."""
        _check_range(ref, start, stop)
        if ref.encoding not in PLAIN:
            raise ValueError(f"{ref.name} is stored as {ref.encoding}, which has no plain form")
        out = np.empty((stop - start, *ref.shape[1:]), PLAIN[ref.encoding])
        _in_checkpoint_order(ref, start, stop, out, self._fetch)
        return out

    def blocks(self, ref: TensorRef, start: int, stop: int) -> Array:
        """The same rows of a matrix in a ggml block encoding as stored: uint8 [stop - start, bytes of a row].

        Raises `unsupported-encoding` for others."""
        _check_range(ref, start, stop)
        _, block, block_bytes = _block_type(ref)
        out = np.empty((stop - start, _row_elements(ref) // block * block_bytes), np.uint8)
        _in_checkpoint_order(ref, start, stop, out, self._fetch)
        return out

    def packed(self, ref: TensorRef, start: int, stop: int) -> Packed:
        """The same rows of a matrix that comes quantised, as stored. Raises `bad-quantised-weight`."""
        _check_range(ref, start, stop)
        return read_packed(self._read_bytes, ref, start, stop)

    def groups(self, ref: TensorRef, count: int, name: str) -> Array:
        """The group numbers of the matrix `name`, which has `count` groups: int64 [K]. Raises
        `bad-quantised-weight`."""
        return read_groups(self._read_bytes, ref, count, name)

    def sizes(self, ref: TensorRef) -> Array:
        """A small tensor of int32 or int64, whole."""
        held = np.empty(ref.shape, {"I32": np.int32, "I64": np.int64}[ref.encoding])
        self._read_bytes(ref, 0, held)
        return held

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if self._closed:
                raise ValueError("the reader is closed")
            if path not in self._descriptors:
                self._descriptors[path] = open_regular(path)
            return self._descriptors[path]

    def _read_bytes(self, ref: TensorRef, begin: int, buffer: Array) -> None:
        """Fill a contiguous array with the tensor's bytes from `begin` on."""
        descriptor = self._descriptor(ref.file)
        view = buffer.reshape(-1).view(np.uint8).data
        done = 0
        while done < len(view):
            try:
                count = os.preadv(descriptor, [view[done:]], ref.offset + begin + done)
            except OSError as problem:
                raise errors.file_unreadable(ref.file, problem.strerror or str(problem)) from problem
            if count == 0:
                raise errors.weights_truncated(ref.file, ref.name, len(view), done)
            done += count

    def _fetch(self, ref: TensorRef, start: int, stop: int, out: Array) -> None:
        """Stored rows of a plain encoding, in the file's order."""
        if out.size:
            self._read_bytes(ref, start * (out.nbytes // (stop - start)), out)

    def _decode_plain(self, ref: TensorRef, start: int, stop: int, out: Array) -> None:
        """Rows of a plain encoding as float32, in the file's order."""
        if ref.encoding == "F32":
            self._fetch(ref, start, stop, out)
            return
        flat = out.reshape(-1)
        first = start * _row_elements(ref)
        scratch = np.empty(min(flat.size, DECODED_BYTES // 4), PLAIN[ref.encoding])
        for begin in range(0, flat.size, DECODED_BYTES // 4):
            piece = flat[begin : begin + DECODED_BYTES // 4]
            stored = scratch[: piece.size]
            self._read_bytes(ref, (first + begin) * stored.itemsize, stored)
            if ref.encoding == "BF16":
                widen_bfloat16(stored, piece)
            else:
                with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is reported by those who use it
                    np.copyto(piece, stored, casting="same_kind")

    def _decode_blocks(self, ref: TensorRef, start: int, stop: int, out: Array) -> None:
        """Rows of a ggml block encoding as float32, in the file's order.

        Blocks never cross rows of a matrix. The rows of a vector are its elements, so whole blocks around the asked
        range are decoded and cut.
        """
        quantization, block, block_bytes = _block_type(ref)
        flat = out.reshape(-1)
        first, last = start * _row_elements(ref), stop * _row_elements(ref)
        step = max(DECODED_BYTES // 4 // block, 1) * block
        for begin in range(first // block * block, last, step):
            end = min(begin + step, -(-last // block) * block)
            stored = np.empty((end - begin) // block * block_bytes, np.uint8)
            self._read_bytes(ref, begin // block * block_bytes, stored)
            decoded = _dequantize(stored, quantization)
            low, high = max(begin, first), min(end, last)
            flat[low - first : high - first] = decoded[low - begin : high - begin]


def widen_bfloat16(stored: Array, out: Array) -> None:
    """bfloat16, viewed as uint16, to float32 of the same shape: its bits are the upper half. 15 GB/s on one core."""
    bits = out.view(np.uint32)
    np.copyto(bits, stored)
    np.left_shift(bits, np.uint32(16), out=bits)


def _row_count(ref: TensorRef) -> int:
    return ref.shape[0] if ref.shape else 1


def _row_elements(ref: TensorRef) -> int:
    return int(np.prod(ref.shape[1:], dtype=np.int64))


def _check_range(ref: TensorRef, start: int, stop: int) -> None:
    if not 0 <= start <= stop <= _row_count(ref):
        raise ValueError(f"rows {start} to {stop} of {ref.name}, which has {_row_count(ref)}")


Fetch = Callable[[TensorRef, int, int, Array], None]


def _in_checkpoint_order(ref: TensorRef, start: int, stop: int, out: Array, fetch: Fetch) -> None:
    """Fill `out` with rows `start` to `stop` after the tensor's transform; `fetch` gives rows in the file's order.

    For `RopeUnpermute`, a head of d rows holds the pairs (i, i + d/2) side by side: row j * d/2 + i of the result is
    row 2 * i + j of the file. Each half head asked for is fetched as one run of rows, of which every other is kept.
    """
    if ref.transform is None:
        fetch(ref, start, stop, out)
        return
    half = ref.shape[0] // ref.transform.heads // 2
    row = start
    while row < stop:
        run = min(stop, (row // half + 1) * half) - row
        head, second, first = row // (2 * half), row // half % 2, row % half
        source = head * 2 * half + 2 * first
        both = np.empty((2 * run, *out.shape[1:]), out.dtype)
        fetch(ref, source, source + 2 * run, both)
        out[row - start : row - start + run] = both[second::2]
        row += run


def _block_type(ref: TensorRef) -> tuple[Any, int, int]:
    """The gguf package's type, elements per block and bytes per block. Raises `unsupported-encoding`."""
    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError as problem:
        raise errors.missing_package("gguf", "build") from problem
    kind = GGMLQuantizationType.__members__.get(ref.encoding)
    if kind is None or not ref.encoding.startswith("Q"):
        raise errors.unsupported_encoding(ref.file, ref.name, ref.encoding)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    return kind, block, block_bytes


def _dequantize(stored: Array, quantization: Any) -> Array:
    """Flat float32 of the bytes of whole blocks. As one row, since the package calls its decoder per 16 rows."""
    from gguf.quants import dequantize

    with np.errstate(all="ignore"):  # damaged scales give NaN, which is reported by those who use the weight
        return np.asarray(dequantize(stored.reshape(1, -1), quantization), np.float32).reshape(-1)
