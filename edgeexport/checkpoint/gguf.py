"""Read the header of a GGUF file: metadata and tensor index, nothing believed before it is checked.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. Read with
`pread` through a small buffer, because a mapped file counts as memory of the process.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeexport import errors
from edgeexport.checkpoint.files import open_regular, pread_exactly

HEADER_LIMIT = 256 * 2**20
COUNT_LIMIT = 2**20
"""Most metadata keys, and most tensors; a model of 10,000 layers stays below it."""
STRING_LIMIT = 16 * 2**20
"""Bytes of one string; the longest are chat templates and tokenizers' character maps."""
ARRAY_LIMIT = 2**22
"""Elements of one array; the longest are vocabularies and their merges."""
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32
CHUNK = 2**20

STRING, ARRAY, BOOL = 8, 9, 7
SCALARS: Mapping[int, str] = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
"""Metadata value types to numpy dtypes."""

SUPPORTED = frozenset({"F32", "F16", "BF16", "F64", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"})
"""The ggml types that the weight reader decodes."""


@dataclass(frozen=True)
class GgufTensor:
    """One row of the tensor index. `shape` is outermost first (the file has it reversed); `offset` is absolute."""

    name: str
    encoding: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says before its data. Strings are str, numbers int, float or bool; numeric arrays numpy's."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


class _Cursor:
    """Reads forward through a file; every length is compared with what is left before it is used."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self.path = path
        self.size = os.fstat(descriptor).st_size
        self._descriptor = descriptor
        self._buffer = b""
        self._at = 0
        self._buffer_end = 0

    @property
    def position(self) -> int:
        """Bytes of the file consumed so far."""
        return self._buffer_end - len(self._buffer) + self._at

    def take(self, count: int, what: str) -> bytes:
        """The next `count` bytes."""
        if self._at + count > len(self._buffer):
            self._refill(count, what)
        start = self._at
        self._at += count
        return self._buffer[start : self._at]

    def _refill(self, count: int, what: str) -> None:
        position = self.position
        if position + count > min(self.size, HEADER_LIMIT):
            limit = (
                "the file ends"
                if self.size <= HEADER_LIMIT
                else f"the limit for headers of {HEADER_LIMIT} bytes is passed"
            )
            raise errors.bad_gguf(self.path, f"{limit} within {what} at byte {position}")
        self._buffer = pread_exactly(self._descriptor, max(count, CHUNK), position, self.path)
        self._at = 0
        self._buffer_end = position + len(self._buffer)
        if len(self._buffer) < count:
            raise errors.bad_gguf(self.path, f"the file ends within {what} at byte {position}")

    def number(self, code: str, what: str) -> int:
        """One little-endian integer of the struct type `code`."""
        return int(struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0])

    def string(self, what: str) -> str:
        """A length and that many bytes of UTF-8."""
        length = self.number("Q", what)
        if length > STRING_LIMIT:
            raise errors.bad_gguf(self.path, f"{what} announces {length} bytes; at most {STRING_LIMIT} are allowed")
        data = self.take(length, what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as problem:
            raise errors.bad_gguf(self.path, f"{what} is not UTF-8: {problem}") from problem


def read_header(path: Path) -> GgufHeader:
    """Metadata and tensor index of a GGUF file.

    Raises `bad-gguf` for anything out of order, `gguf-tensor-type` for tensors that cannot be decoded,
    `file-unreadable`.
    """
    descriptor = open_regular(path)
    try:
        cursor = _Cursor(descriptor, path)
        tensor_count, key_count = _read_counts(cursor)
        metadata = _read_metadata(cursor, key_count)
        return GgufHeader(path, metadata, _read_tensors(cursor, tensor_count, _alignment(metadata, path)))
    finally:
        os.close(descriptor)


def _read_counts(cursor: _Cursor) -> tuple[int, int]:
    if cursor.take(4, "the magic number") != b"GGUF":
        raise errors.bad_gguf(cursor.path, "it does not start with GGUF")
    version = cursor.number("I", "the version")
    if version not in {2, 3}:
        big_endian = version in {2 << 24, 3 << 24}
        raise errors.bad_gguf(
            cursor.path, "it is big-endian" if big_endian else f"version {version}; 2 and 3 are supported"
        )
    tensor_count = cursor.number("Q", "the tensor count")
    key_count = cursor.number("Q", "the key count")
    for count, what in ((tensor_count, "tensors"), (key_count, "metadata keys")):
        if count > COUNT_LIMIT:
            raise errors.bad_gguf(cursor.path, f"it announces {count} {what}; at most {COUNT_LIMIT} are allowed")
    return tensor_count, key_count


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for index in range(count):
        key = cursor.string(f"the name of metadata key {index}")
        if key in metadata:
            raise errors.bad_gguf(cursor.path, f"the metadata key {key!a} occurs twice")
        what = f"the value of {key!a:.80}"
        metadata[key] = _read_value(cursor, cursor.number("I", what), what)
    return metadata


def _read_value(cursor: _Cursor, kind: int, what: str) -> Any:
    if kind == STRING:
        return cursor.string(what)
    if kind == ARRAY:
        return _read_array(cursor, what)
    return _read_numbers(cursor, kind, 1, what)[0].item()


def _read_numbers(cursor: _Cursor, kind: int, count: int, what: str) -> Any:
    dtype = SCALARS.get(kind)
    if dtype is None:
        raise errors.bad_gguf(cursor.path, f"{what} has the unknown type {kind}")
    if kind == BOOL:  # any other byte than 0 and 1 would be an undefined bool
        return np.frombuffer(cursor.take(count, what), np.uint8) != 0
    return np.frombuffer(cursor.take(count * np.dtype(dtype).itemsize, what), dtype)


def _read_array(cursor: _Cursor, what: str) -> Any:
    kind = cursor.number("I", what)
    count = cursor.number("Q", what)
    if count > ARRAY_LIMIT:
        raise errors.bad_gguf(cursor.path, f"{what} announces {count} elements; at most {ARRAY_LIMIT} are allowed")
    if kind == ARRAY:
        raise errors.bad_gguf(cursor.path, f"{what} is an array of arrays, which no model uses")
    if kind == STRING:
        return [cursor.string(what) for _ in range(count)]
    return _read_numbers(cursor, kind, count, what)


def _alignment(metadata: Mapping[str, Any], path: Path) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= CHUNK or alignment & (alignment - 1):
        raise errors.bad_gguf(path, f"general.alignment is {alignment!a:.80}; a power of two is needed")
    return alignment


def _read_tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, GgufTensor]:
    """The tensor index, proven to cover the data one after the other, each padded to the alignment."""
    types = _ggml_types()
    found: dict[str, GgufTensor] = {}
    undecodable: list[tuple[str, str]] = []
    position = 0
    for index in range(count):
        name = cursor.string(f"the name of tensor {index}")
        if name in found:
            raise errors.bad_gguf(cursor.path, f"the tensor {name!a} occurs twice")
        what = f"the entry of tensor {name!a:.80}"
        dimensions = cursor.number("I", what)
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise errors.bad_gguf(cursor.path, f"{what} has {dimensions} dimensions; 1 to {MAX_DIMENSIONS} are allowed")
        shape = tuple(cursor.number("Q", what) for _ in range(dimensions))[::-1]
        kind = cursor.number("I", what)
        offset = cursor.number("Q", what)
        if kind not in types:
            raise errors.bad_gguf(cursor.path, f"{what} has the unknown ggml type {kind}")
        encoding, block, block_bytes = types[kind]
        nbytes = _tensor_bytes(cursor.path, name, shape, block, block_bytes, cursor.size)
        if offset != position:
            raise errors.bad_gguf(cursor.path, f"{what} puts the data at {offset}; {position} is expected")
        position += nbytes + -nbytes % alignment
        found[name] = GgufTensor(name, encoding, shape, offset, nbytes)
        if encoding not in SUPPORTED:
            undecodable.append((name, encoding))
    if undecodable:
        raise errors.gguf_tensor_type(cursor.path, undecodable, SUPPORTED)
    data_start = cursor.position + -cursor.position % alignment
    placed = {
        name: GgufTensor(name, tensor.encoding, tensor.shape, data_start + tensor.offset, tensor.nbytes)
        for name, tensor in found.items()
    }
    for tensor in placed.values():
        if tensor.offset + tensor.nbytes > cursor.size:
            raise errors.bad_gguf(
                cursor.path,
                f"{tensor.name!a} ends at byte {tensor.offset + tensor.nbytes}, but the file has {cursor.size}",
            )
    return placed


def _tensor_bytes(path: Path, name: str, shape: tuple[int, ...], block: int, block_bytes: int, limit: int) -> int:
    """Bytes of a tensor, refusing shapes that no file of `limit` bytes can hold before the product grows."""
    elements = 1
    for extent in shape:
        elements *= extent
        if extent == 0 or elements // block * block_bytes > limit:
            raise errors.bad_gguf(path, f"the tensor {name!a} of shape {shape} does not fit in a file of {limit} bytes")
    if shape[-1] % block:
        raise errors.bad_gguf(path, f"the tensor {name!a} has rows of {shape[-1]} elements in blocks of {block}")
    return elements // block * block_bytes


def _ggml_types() -> dict[int, tuple[str, int, int]]:
    """Number to (name, elements per block, bytes per block) of every ggml type. Needs the gguf package."""
    try:
        from gguf.constants import GGML_QUANT_SIZES
    except ImportError as problem:
        raise errors.missing_package("gguf", "build") from problem
    return {int(kind): (kind.name, block, size) for kind, (block, size) in GGML_QUANT_SIZES.items()}
