"""An .mlpackage on disk: manifest, program and weight file, checked before use and read in pieces; and written so.

    decoder.mlpackage/Manifest.json                               which file is the program
    decoder.mlpackage/Data/com.apple.CoreML/model.mlmodel         protobuf
    decoder.mlpackage/Data/com.apple.CoreML/weights/weight.bin    a header, then a record of 64 bytes before each tensor

Packages may come from anywhere: every size and offset is compared with the file's, and no path leaves the package.
"""

from __future__ import annotations

import json
import os
import struct
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from edgeexport import errors
from edgeexport.backends import storage
from edgeexport.backends.coreml_mil import BY_NAME, Element, Malformed, Type, protobuf, type_of, unpack
from edgeexport.core import Array, Format, Progress, WeightSource, no_progress
from edgeexport.plainfile import in_hub_cache, open_plain, read_plain

MANIFEST = "Manifest.json"
MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"
WEIGHTS_IN_PROGRAM = "@model_path/weights/weight.bin"
MODEL_PATH = "@model_path/"

MAX_MANIFEST_BYTES = 1 << 20
MAX_MODEL_BYTES = 1 << 30
"""A program, weights apart; protobuf itself ends at 2 GB."""

RECORD = struct.Struct("<IIQQQ32x")
"""Sentinel, element type, bytes, offset of the data, unused bits at their end: blob_metadata."""
HEADER = struct.Struct("<II56x")
"""Number of records, version of the format: storage_header."""
SENTINEL = 0xDEADBEEF
VERSION = 2


@dataclass(frozen=True)
class Blob:
    """One tensor in a weight file that has been found to be there; not read yet."""

    path: Path
    offset: int
    element: Element
    shape: tuple[int, ...]

    @property
    def row(self) -> int:
        """Elements of one row along the first axis."""
        return int(np.prod(self.shape[1:], dtype=np.int64)) if self.shape else 1

    def rows(self, start: int, stop: int) -> Array:
        """Rows start..stop, decoded. Raises: BundleError `mlpackage-damaged`."""
        count = (stop - start) * self.row
        if start * self.row * self.element.bits % 8:
            return self.rows(0, stop)[start:]
        raw = _read(self.path, self.offset + start * self.row * self.element.bits // 8, self.element.nbytes(count))
        return unpack(raw, self.element, count).reshape(stop - start, *self.shape[1:])

    def read(self) -> Array:
        """All of it."""
        return self.rows(0, self.shape[0]) if self.shape else self.rows(0, 1).reshape(())


class Package:
    """An open package: the program, and its weights where they lie."""

    def __init__(self, path: Path) -> None:
        self.path = path
        program = _root_model(path)
        self._folder = program.parent
        self.model = _parse(program)
        if self.model.WhichOneof("Type") != "mlProgram":
            raise errors.mlpackage_damaged(program, f"it holds {self.model.WhichOneof('Type')}, not an ML program")

    @property
    def functions(self) -> Mapping[str, Any]:
        """The program's functions by name."""
        found: Mapping[str, Any] = self.model.mlProgram.functions
        return found

    @property
    def default_function(self) -> str:
        """The function that runs when none is named."""
        return str(self.model.description.defaultFunctionName) or "main"

    def block(self, function: str) -> Any:
        """The operations of a function. Raises: BundleError `mlpackage-damaged` where there is no such function."""
        if function not in self.functions:
            raise self.damaged(f"it has no function {function!r}; it has {', '.join(sorted(self.functions))}")
        found = self.functions[function]
        if found.opset not in found.block_specializations:
            raise self.damaged(f"function {function!r} has no operations for its op set {found.opset!r}")
        return found.block_specializations[found.opset]

    def blob(self, value: Any) -> Blob:
        """Where a Value's tensor lies. Raises: BundleError `mlpackage-damaged` when it cannot lie there."""
        name, offset = value.blobFileValue.fileName, value.blobFileValue.offset
        if not name.startswith(MODEL_PATH):
            raise self.damaged(f"a weight is in {name!r}, which is not below {MODEL_PATH}")
        path = _inside(self.path, self._folder, name.removeprefix(MODEL_PATH))
        try:
            found = type_of(value.type)
            return Blob(path, *_located(path, offset, found), found.sizes)
        except Malformed as problem:
            raise errors.mlpackage_damaged(path, f"the tensor recorded at {offset}: {problem}") from problem

    def damaged(self, problem: str) -> errors.BundleError:
        """The error that says what is wrong with this package."""
        return errors.mlpackage_damaged(self.path, problem)


def _located(path: Path, offset: int, wanted: Type) -> tuple[int, Element]:
    """(offset of the data, element type) out of the record at `offset`. Raises Malformed."""
    size = _size(path)
    version = HEADER.unpack(_read(path, 0, HEADER.size).tobytes())[1] if size >= HEADER.size else None
    if version != VERSION:
        raise Malformed(f"the file's version is {version}; {VERSION} is known")
    if offset % storage.ALIGNMENT or not HEADER.size <= offset <= size - RECORD.size:
        raise Malformed(f"there can be no record; the file has {size} bytes")
    sentinel, kind, nbytes, at, unused = RECORD.unpack(_read(path, offset, RECORD.size).tobytes())
    if sentinel != SENTINEL:
        raise Malformed(f"it starts with {sentinel:#x}, not {SENTINEL:#x}")
    element, count = wanted.element, 1
    for each in wanted.sizes:
        if each < 0:
            raise Malformed("a size is negative")
        count *= each
    if kind != element.blob or not kind:
        raise Malformed(f"it is of type {kind}, the program wants {element.name} ({element.blob})")
    if nbytes != element.nbytes(count) or unused != 8 * nbytes - element.bits * count:
        raise Malformed(f"it has {nbytes} bytes, {wanted} takes {element.nbytes(count)}")
    if not 0 <= at <= size - nbytes:
        raise Malformed(f"its data is bytes {at} to {at + nbytes}; the file has {size}")
    return at, element


# reading files


def _root_model(path: Path) -> Path:
    """The program's file, by the manifest. Raises: BundleError `mlpackage-damaged`."""
    where = _inside(path, path, MANIFEST)
    try:
        manifest = json.loads(read_plain(where, MAX_MANIFEST_BYTES, follow=True).decode("utf-8"))
        found = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
    except (OSError, ValueError, RecursionError) as problem:
        raise errors.mlpackage_damaged(where, f"it cannot be read: {problem}") from problem
    except (KeyError, TypeError) as problem:
        raise errors.mlpackage_damaged(where, "it does not say which file is the model") from problem
    if not isinstance(found, str):
        raise errors.mlpackage_damaged(where, "the path of its model is not a text")
    return _inside(path, path / "Data", found)


def _parse(path: Path) -> Any:
    size = _size(path)
    if size > MAX_MODEL_BYTES:
        raise errors.mlpackage_damaged(path, f"the program has {size} bytes; {MAX_MODEL_BYTES} are the most")
    model = protobuf().model.Model()
    from google.protobuf.message import DecodeError

    try:
        model.ParseFromString(_read(path, 0, size).tobytes())
    except DecodeError as problem:
        raise errors.mlpackage_damaged(path, f"it is no protobuf of a model: {problem}") from problem
    return model


def _inside(package: Path, folder: Path, name: str) -> Path:
    """folder/name, which must not leave the package, not even by a link. Raises: BundleError `mlpackage-damaged`."""
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or ".." in parts or "\0" in name:
        raise errors.mlpackage_damaged(package, f"the path {name!r} leaves the package")
    path = folder.joinpath(*parts)
    try:
        if not path.is_file():
            raise errors.mlpackage_damaged(path, "the file is missing")
        place = path.resolve()
    except (OSError, RuntimeError, ValueError) as problem:  # a loop of links, a name that is too long or not Unicode
        raise errors.mlpackage_damaged(package, f"its file {name!a} cannot be found: {problem}") from problem
    if not (place.is_relative_to(package.resolve()) or in_hub_cache(package, place)):
        raise errors.mlpackage_damaged(path, "the file is a link that leaves the package")
    return path


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as problem:
        raise errors.mlpackage_damaged(path, str(problem)) from problem


def _read(path: Path, offset: int, size: int) -> Array:
    data = np.empty(size, np.uint8)
    try:
        with open_plain(path, follow=True) as file:
            file.seek(offset)
            view, got = data.data, 0
            while got < size and (more := file.readinto(view[got:])):
                got += more
    except OSError as problem:
        raise errors.mlpackage_damaged(path, str(problem)) from problem
    if got != size:
        raise errors.mlpackage_damaged(path, f"it ends at {offset + got}; {offset + size} bytes are needed")
    return data


# writing


@dataclass
class BlobLayout(storage.Layout):
    """A weight file: before every tensor lies its record, which is what programs point at."""

    file: str = WEIGHTS
    size: int = HEADER.size
    signed: bool = True
    dense: bool = True
    records: dict[int, tuple[Element, int]] = field(default_factory=dict)
    """By offset of the data: element type and number of elements."""

    def add(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]], fmt: Format) -> tuple[int, int]:
        """As `Layout.add`, of one weight: each has a record of its own."""
        (shape,) = shapes
        count = int(np.prod(shape, dtype=np.int64))
        data, scales = super().add(names, shapes, fmt)
        kind = "uint" if fmt.palette else "int" if fmt.integer else "float"
        self.records[data] = (BY_NAME[f"{kind}{fmt.bits}"], count)
        if fmt.integer:
            width = shape[-1] if shape else 1
            blocks = count // width * storage.blocks(width, fmt)
            self.records[scales] = (BY_NAME["float16"], blocks)
            if fmt.shift:
                self.records[self.weights[names[0]].shift_offset] = (BY_NAME[offset_element(fmt)], blocks)
        if fmt.palette:
            self.records[self.weights[names[0]].palettes_offset] = (BY_NAME["float16"], shape[0])
        return data, scales

    def add_constant(self, name: str, array: Array) -> int:
        """As `Layout.add_constant`."""
        offset = super().add_constant(name, array)
        self.records[offset] = (BY_NAME[str(array.dtype)], array.size)
        return offset

    def finish(self) -> None:
        """Put header and records among the constants; nothing may be added after."""
        self.constants["header"] = (0, _bytes(HEADER.pack(len(self.records), VERSION)))
        for offset, (element, count) in self.records.items():
            nbytes = element.nbytes(count)
            packed = RECORD.pack(SENTINEL, element.blob, nbytes, offset, 8 * nbytes - element.bits * count)
            self.constants[f"record {offset}"] = (record_of(offset), _bytes(packed))

    def _reserve(self, size: int) -> int:
        if size == 0:
            return self.size
        self.size = -(-self.size // storage.ALIGNMENT) * storage.ALIGNMENT + RECORD.size
        return super()._reserve(size)


def offset_element(fmt: Format) -> str:
    """The element type of a shifted format's zero points: the integers' own, or the scales'."""
    return f"int{fmt.bits}" if fmt.shift == "zero" else "float16"


def record_of(offset: int) -> int:
    """Where the record of the data at `offset` lies."""
    return offset - RECORD.size


def _bytes(data: bytes) -> Array:
    return np.frombuffer(data, np.uint8)


def write(
    folder: Path, name: str, model: Any, layout: BlobLayout, source: WeightSource, progress: Progress = no_progress
) -> tuple[str, ...]:
    """Write the package folder/name; the weights stream. `layout.file` is relative to `folder`.

    Returns its files, relative to `folder`. Raises: UsageError `output-not-writable`.
    """
    layout.finish()
    try:
        (folder / layout.file).parent.mkdir(parents=True, exist_ok=True)
        (folder / name / MODEL).write_bytes(model.SerializeToString(deterministic=True))
        (folder / name / MANIFEST).write_bytes(_manifest())
        storage.write(folder, layout, source, progress)
    except OSError as problem:
        raise errors.output_not_writable(folder, str(problem)) from problem
    return tuple(f"{name}/{each}" for each in (MANIFEST, MODEL, WEIGHTS))


def _manifest() -> bytes:
    """Manifest.json as coremltools writes it, but with identifiers that are the same in every build."""
    entries = {
        "com.apple.CoreML/model.mlmodel": ("CoreML Model Specification", "model.mlmodel"),
        "com.apple.CoreML/weights": ("CoreML Model Weights", "weights"),
    }
    identifiers = {path: str(uuid.uuid5(uuid.NAMESPACE_URL, path)) for path in entries}
    document = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": {
            identifiers[path]: {"author": "com.apple.CoreML", "description": about, "name": name, "path": path}
            for path, (about, name) in entries.items()
        },
        "rootModelIdentifier": identifiers["com.apple.CoreML/model.mlmodel"],
    }
    return json.dumps(document, indent=4, sort_keys=True).encode("ascii") + b"\n"


def package_of(file: str | os.PathLike[str]) -> Path:
    """The package that a file in it belongs to: the nearest folder above whose name ends in .mlpackage."""
    path = Path(file)
    return next((each for each in (path, *path.parents) if each.suffix == ".mlpackage"), path.parent)
