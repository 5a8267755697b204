"""Codes on disk: the integers, scales and offsets that a search chose for each weight, one file a weight.

A file holds rows of 4-bit integers (two a byte) or 8-bit ones, then the float16 scales of all rows, then, where the
format is shifted, the offsets: int8 zero points, else float32. Nothing else: what it means is in `index.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from edgeexport import errors
from edgeexport.core import Array, Codes, Format, Provenance
from edgeexport.packing import pack_int4, read_bytes, unpack_int4

INDEX = "index.json"


@dataclass(frozen=True)
class Entry:
    """One weight: its file, format, shape [rows, width], where its codes come from, sha256 of the file, and the share
    that they have, where that was measured, of the error that the nearest integers would make of its products."""

    file: str
    format: Format
    shape: tuple[int, int]
    provenance: Provenance
    digest: str
    share: float | None = None


class CodeStore:
    """Codes of some weights in a folder. Safe to share between threads, and to pickle."""

    def __init__(self, folder: Path, entries: Mapping[str, Entry]) -> None:
        self.folder = folder
        self.entries = dict(entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    @property
    def digest(self) -> str:
        """sha256 over all codes: what an artifact that is made of them depends on."""
        state = hashlib.sha256()
        for name, entry in sorted(self.entries.items()):
            state.update(f"{name} {entry.format.name} {entry.digest}\n".encode())
        return state.hexdigest()

    def move(self, folder: Path) -> None:
        """Move the files to another folder of the same disk. Raises: UsageError `output-not-writable`."""
        try:
            for name in (*{entry.file for entry in self.entries.values()}, INDEX):
                (self.folder / name).rename(folder / name)
        except OSError as problem:
            raise errors.output_not_writable(folder, str(problem)) from problem
        self.folder = folder

    def rows(self, name: str, start: int, stop: int) -> Codes:
        """Rows of one weight. Raises: BundleError `artifact-truncated` where the file ends early."""
        entry = self.entries[name]
        (count, _), fmt = entry.shape, entry.format
        path = self.folder / entry.file
        row, blocks = _row_bytes(entry), _blocks(entry)
        raw = read_bytes(path, start * row, (stop - start) * row).reshape(stop - start, row)
        integers = unpack_int4(raw, 0) if fmt.bits == 4 else raw.view(np.int8)
        at = count * row
        scales = read_bytes(path, at + 2 * start * blocks, 2 * (stop - start) * blocks).view(np.float16)
        scales = scales.reshape(stop - start, blocks)
        if not fmt.shift:
            return Codes(integers, scales)
        size = 1 if fmt.shift == "zero" else 4
        at += 2 * count * blocks + size * start * blocks
        offsets = read_bytes(path, at, size * (stop - start) * blocks).view(np.int8 if size == 1 else np.float32)
        return Codes(integers, scales, offsets.reshape(stop - start, blocks))


def save(
    folder: Path, file: str, fmt: Format, parts: Iterable[Codes], provenance: Provenance, share: float | None = None
) -> Entry:
    """Write all codes of one weight, whole or not at all; `parts` hold rows that follow each other, and their integers
    are written as they come. Raises: UsageError `output-not-writable`."""
    state = hashlib.sha256()
    rows = width = 0
    scales: list[Array] = []
    offsets: list[Array] = []
    partial = folder / f".{file}.partial"
    try:
        with partial.open("wb") as out:

            def write(array: Array) -> None:
                data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
                state.update(data)
                out.write(data)

            for part in parts:
                write(pack_int4(part.integers, 0) if fmt.bits == 4 else part.integers)
                rows, width = rows + len(part.integers), part.integers.shape[1]
                scales.append(part.scales.astype(np.float16, copy=False))
                if part.offsets is not None:
                    offsets.append(part.offsets.astype(np.int8 if fmt.shift == "zero" else np.float32, copy=False))
            for kept in (scales, offsets):
                if kept:
                    write(np.concatenate(kept))
            out.flush()
            os.fsync(out.fileno())
        partial.rename(folder / file)
    except OSError as problem:
        raise errors.output_not_writable(folder, str(problem)) from problem
    return Entry(file, fmt, (rows, width), provenance, state.hexdigest(), share)


def save_index(folder: Path, entries: Mapping[str, Entry]) -> None:
    """Write what the files of a store mean."""
    write_whole(folder, INDEX, json.dumps({name: asdict(entry) for name, entry in entries.items()}, indent=1))


def write_whole(folder: Path, name: str, text: str) -> None:
    """A small file, whole or not at all. Raises: UsageError `output-not-writable`."""
    partial = folder / f".{name}.partial"
    try:
        partial.write_text(text)
        partial.rename(folder / name)
    except OSError as problem:
        raise errors.output_not_writable(folder, str(problem)) from problem


def load_index(folder: Path) -> dict[str, Entry]:
    """What `save_index` wrote into a folder of ours; nothing where it wrote nothing."""
    try:
        listed = json.loads((folder / INDEX).read_text())
    except FileNotFoundError:
        return {}
    return {
        name: Entry(**{**each, "format": Format(**each["format"]), "shape": tuple(each["shape"])})
        for name, each in listed.items()
    }


def _row_bytes(entry: Entry) -> int:
    return -(-entry.shape[1] * entry.format.bits // 8)


def _blocks(entry: Entry) -> int:
    return entry.shape[1] // entry.format.block if entry.format.block else 1
