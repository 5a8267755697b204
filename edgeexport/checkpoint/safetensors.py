"""Index the tensors of safetensors files from their headers alone.

The format: https://huggingface.co/docs/safetensors/index#format. Eight bytes of header length (little-endian), a JSON
header, then the data of all tensors without holes or overlaps. Everything is checked before it is believed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeexport import errors, strict_json
from edgeexport.checkpoint.files import INDEX_LIMIT, find, open_regular, pread_exactly, read_object
from edgeexport.core import TensorRef

HEADER_LIMIT = 100_000_000
"""Bytes; the limit of the format's own reader."""

ITEM_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1,
    "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
"""Bytes per element of each known dtype."""

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
SHARD_NAME = re.compile(r"[\w.-]+\.safetensors", re.ASCII)
MAX_SIZE = 2**62
"""No count of elements or bytes may exceed this; it keeps all arithmetic on sizes within 64 bits."""


def read_header(path: Path) -> dict[str, TensorRef]:
    """The tensors of one file, in the order of their data. Raises `bad-safetensors` for anything out of order."""
    descriptor = open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        if size < 8:
            raise errors.bad_safetensors(path, f"it has {size} bytes; the header's length alone takes 8")
        length = int.from_bytes(pread_exactly(descriptor, 8, 0, path), "little")
        if length > HEADER_LIMIT:
            raise errors.bad_safetensors(
                path, f"it announces a header of {length} bytes; at most {HEADER_LIMIT} are allowed"
            )
        if 8 + length > size:
            raise errors.bad_safetensors(path, f"it announces a header of {length} bytes, but has {size} bytes in all")
        header = pread_exactly(descriptor, length, 8, path)
    finally:
        os.close(descriptor)
    return _index(_parse_header(header, path), path, data_start=8 + length, file_size=size)


def _parse_header(header: bytes, path: Path) -> dict[str, Any]:
    if not header.startswith(b"{"):
        raise errors.bad_safetensors(path, "the header does not start with {")
    try:
        value = strict_json.parse(header)
    except ValueError as problem:
        raise errors.bad_safetensors(path, f"the header is not valid JSON: {problem}") from problem
    metadata = value.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise errors.bad_safetensors(path, "__metadata__ is not a map of strings")
    return value  # type: ignore[no-any-return]  # it starts with {, so it is a dict


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_SIZE


def _entry(name: str, entry: Any, path: Path, data_start: int) -> TensorRef:
    """One tensor of the header, its own numbers checked but not yet compared with the file."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise errors.bad_safetensors(path, f"{name!a} must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise errors.bad_safetensors(path, f"{name!a} has the unknown dtype {dtype!a}")
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise errors.bad_safetensors(path, f"{name!a} has the impossible shape {shape!a:.80}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise errors.bad_safetensors(path, f"{name!a} has the impossible data_offsets {offsets!a:.80}")
    elements = 1
    for extent in shape:
        elements *= extent
        if elements > MAX_SIZE:
            raise errors.bad_safetensors(path, f"{name!a} has more elements than a file can hold")
    begin, end = offsets
    if end - begin != elements * ITEM_BYTES[dtype]:
        raise errors.bad_safetensors(
            path, f"{name!a} is {dtype} {shape}, {elements * ITEM_BYTES[dtype]} bytes, but takes {end - begin}"
        )
    return TensorRef(name, path, data_start + begin, end - begin, dtype, tuple(shape))


def _index(header: Mapping[str, Any], path: Path, data_start: int, file_size: int) -> dict[str, TensorRef]:
    """The header's tensors, proven to cover the data without hole, overlap or remainder."""
    refs = [_entry(name, entry, path, data_start) for name, entry in header.items()]
    refs.sort(key=lambda ref: (ref.offset, ref.nbytes))
    position = data_start
    for ref in refs:
        if ref.offset != position:
            relation = "overlaps its neighbour" if ref.offset < position else "leaves a hole before it"
            raise errors.bad_safetensors(path, f"the data of {ref.name!a} {relation}")
        position += ref.nbytes
    if position != file_size:
        raise errors.bad_safetensors(path, f"its tensors end at byte {position}, but the file has {file_size}")
    return {ref.name: ref for ref in refs}


def read_index(folder: Path, path: Path) -> tuple[dict[str, TensorRef], tuple[Path, ...]]:
    """The tensors of `model.safetensors.index.json` by name, and its shards in the order of their names.

    Raises `bad-shard-index`, `missing-shard` (naming all that are missing), `path-escapes`, `bad-safetensors`.
    """
    weight_map = read_object(path, INDEX_LIMIT).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise errors.bad_shard_index(path, "it has no weight_map")
    listed: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise errors.bad_shard_index(path, f"weight_map does not give {name!a} a file")
        listed.setdefault(shard, set()).add(name)
    files: dict[str, Path | None] = {}
    for shard in sorted(listed):
        files[shard] = find(folder, shard)
        if not SHARD_NAME.fullmatch(shard):
            raise errors.bad_shard_index(path, f"{shard!a} is not the name of a safetensors file")
    missing = [shard for shard, file in files.items() if file is None]
    if missing:
        raise errors.missing_shard(folder, missing, len(files))
    found = {shard: file for shard, file in files.items() if file is not None}
    tensors: dict[str, TensorRef] = {}
    for shard, file in found.items():
        header = read_header(file)
        for name in sorted(listed[shard] ^ header.keys()):
            problem = "is not in it" if name in listed[shard] else "is in it without being listed"
            raise errors.bad_shard_index(path, f"{name!a} and {shard} disagree: it {problem}")
        tensors.update(header)
    return tensors, tuple(found.values())


def read_folder(folder: Path) -> tuple[dict[str, TensorRef], tuple[Path, ...]]:
    """The tensors of a checkpoint folder and its weight files, as transformers would pick them.

    Raises `missing-weights`; `pickled-weights` when there is nothing but pickles.
    """
    single = find(folder, SINGLE)
    if single is not None:
        return read_header(single), (single,)
    index = find(folder, INDEX)
    if index is not None:
        return read_index(folder, index)
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles:
        raise errors.pickled_weights(folder, pickles)
    raise errors.missing_weights(folder)
