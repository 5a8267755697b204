"""ML packages on disk: blobs against coremltools' own reader and writer, and every kind of damage as a finding."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlpackages import builder, coremltools, evaluated, program, saved

from edgeexport import errors
from edgeexport.backends import coreml_mil as mil
from edgeexport.backends import coreml_package, storage
from edgeexport.backends.coreml_interpreter import Interpreter
from edgeexport.backends.coreml_package import BlobLayout, Package, record_of
from edgeexport.core import Array, Codes
from edgeexport.quant import FORMATS

pytest.importorskip("coremltools")

X = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float16)
WRITERS = {"float16": "fp16", "float32": "float"}
IN_FILES = [element for element in mil.ELEMENTS if element.blob]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of a constant, a compressed one and a product, by coremltools."""
    mb = builder()

    def body(x: Any) -> Any:
        rng = np.random.default_rng(1)
        data = rng.integers(-128, 127, (48, 64)).astype(np.int8)
        scale = rng.uniform(0.01, 0.1, (48, 2)).astype(np.float16)
        weight = mb.constexpr_blockwise_shift_scale(data=data, scale=scale)
        y = mb.linear(x=x, weight=weight, bias=rng.standard_normal(48).astype(np.float16))
        return mb.relu(x=y)

    return saved(program({"x": X}, body), tmp_path_factory.mktemp("good") / "good.mlpackage")


def value_at(package: Package, offset: int, element: str, shape: tuple[int, ...]) -> Any:
    return package.blob(mil.in_file(coreml_package.WEIGHTS_IN_PROGRAM, offset, element, shape))


@pytest.mark.parametrize("element", IN_FILES, ids=lambda element: str(element.name))
def test_blobs_of_coremltools_are_read_as_they_were_written(element: mil.Element, good: Path, tmp_path: Path) -> None:
    coremltools()
    from coremltools.libmilstoragepython import _BlobStorageWriter

    low = -(1 << (element.bits - 1)) if element.signed and element.bits < 16 else 0
    high = min(1 << (element.bits - (1 if low else 0)), 1000)
    values = np.random.default_rng(2).integers(low, high, 7 * 9).astype(element.numpy)
    folder = tmp_path / "copy.mlpackage"
    shutil.copytree(good, folder)
    writer = _BlobStorageWriter(str(folder / coreml_package.WEIGHTS))
    write = getattr(writer, f"write_{WRITERS.get(element.name, element.name)}_data")
    offset = write(values.view(np.uint16) if element.name == "float16" else values)
    del writer
    blob = value_at(Package(folder), offset, element.name, (7, 9))
    np.testing.assert_array_equal(blob.read(), values.reshape(7, 9))
    np.testing.assert_array_equal(blob.rows(2, 5), values.reshape(7, 9)[2:5])


class Rows:
    """A `WeightSource` of the same random integers whenever it is asked."""

    def quantized_rows(self, name: str, start: int, stop: int) -> Codes:
        values = np.random.default_rng(5).integers(-8, 8, (40, 64)).astype(np.int8)
        scales = np.random.default_rng(6).uniform(0, 1, (40, 2)).astype(np.float16)
        return Codes(values[start:stop], scales[start:stop])

    def float_rows(self, name: str, start: int, stop: int) -> Array:
        return np.random.default_rng(7).standard_normal((40, 64)).astype(np.float16)[start:stop]


@pytest.mark.parametrize("name", ["fp16", "int4-b32", "int8-b32"])
def test_what_we_write_is_what_coremltools_reads(name: str, tmp_path: Path) -> None:
    coremltools()
    from coremltools.libmilstoragepython import _BlobStorageReader

    layout = BlobLayout("m.mlpackage/" + coreml_package.WEIGHTS)
    layout.add(["w"], [(40, 64)], FORMATS[name])
    constant = layout.add_constant("c", np.arange(5, dtype=np.float32))
    files = coreml_package.write(tmp_path, "m.mlpackage", mil.protobuf().model.Model(), layout, Rows())
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == set(files)

    reader, held = _BlobStorageReader(str(tmp_path / layout.file)), layout.weights["w"]
    at = record_of(held.offset)
    if name == "fp16":
        found = reader.read_fp16_data(at).view(np.float16).reshape(40, 64)
        np.testing.assert_array_equal(found, Rows().float_rows("w", 0, 40))
    else:
        codes = Rows().quantized_rows("w", 0, 40)
        values, scales = codes.integers, codes.scales
        read = reader.read_int4_data if name == "int4-b32" else reader.read_int8_data
        np.testing.assert_array_equal(np.array(read(at)).reshape(40, 64), values)
        kept = reader.read_fp16_data(record_of(held.scales_offset)).view(np.float16)
        np.testing.assert_array_equal(kept.reshape(40, 2), scales)
        again = values * np.repeat(scales.astype(np.float32), 32, axis=1)
        np.testing.assert_array_equal(storage.read_rows(tmp_path, held, 0, 40), again)
    np.testing.assert_array_equal(reader.read_float_data(record_of(constant)), np.arange(5))


@pytest.mark.parametrize("width", [64, 96])
@pytest.mark.parametrize("name", ["int4-b32-zp", "int4-b32-zp16"])
def test_zero_points_that_we_write_are_what_coremltools_reads(
    name: str, width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 41 rows, some at a time. Where a row has three, the next one's begin within a byte."""
    coremltools()
    from coremltools.libmilstoragepython import _BlobStorageReader

    fmt, rng, shape = FORMATS[name], np.random.default_rng(8), (41, width // 32)
    integers, zeros = (rng.integers(-8, 8, size).astype(np.int8) for size in ((41, width), shape))
    scales = rng.uniform(0.1, 1, shape).astype(np.float16)
    offsets = zeros if fmt.shift == "zero" else -zeros * scales.astype(np.float32)

    class Moved(Rows):
        def quantized_rows(self, name: str, start: int, stop: int) -> Codes:
            return Codes(integers[start:stop], scales[start:stop], offsets[start:stop])

    monkeypatch.setattr(storage, "BLOCK_ELEMENTS", 3 * width)
    layout = BlobLayout("m.mlpackage/" + coreml_package.WEIGHTS)
    layout.add(["w"], [(41, width)], fmt)
    layout.add_constant("c", np.arange(5, dtype=np.float32))
    coreml_package.write(tmp_path, "m.mlpackage", mil.protobuf().model.Model(), layout, Moved())
    reader, held = _BlobStorageReader(str(tmp_path / layout.file)), layout.weights["w"]
    at = record_of(held.shift_offset)
    found = np.array(reader.read_int4_data(at) if fmt.shift == "zero" else reader.read_fp16_data(at).view(np.float16))
    np.testing.assert_array_equal(found.reshape(shape), zeros)
    wanted = (integers.reshape(41, -1, 32) - zeros[:, :, None]) * scales.astype(np.float32)[:, :, None]
    for start, stop in ((0, 41), (7, 8), (9, 40)):
        rows = storage.read_rows(tmp_path, held, start, stop)
        np.testing.assert_allclose(rows, wanted.reshape(41, width)[start:stop], atol=1e-5)


# damage


def replaced(file: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(package: Path) -> None:
        path = package / file
        path.write_bytes(change(path.read_bytes()))

    return damage


def manifest(**changes: Any) -> Callable[[Path], None]:
    """The manifest's model at another path, or another value in it."""

    def change(data: bytes) -> bytes:
        document = json.loads(data)
        root = document["rootModelIdentifier"]
        if "path" in changes:
            document["itemInfoEntries"][root]["path"] = changes["path"]
        return json.dumps({**document, **{key: each for key, each in changes.items() if key != "path"}}).encode()

    return replaced(coreml_package.MANIFEST, change)


def records(data: bytes) -> list[int]:
    """Where the records of a weight file lie."""
    return [at for at in range(64, len(data), 64) if data[at : at + 4] == struct.pack("<I", 0xDEADBEEF)]


def record(field: str, place: int, value: int) -> Callable[[Path], None]:
    """One field of every record changed."""

    def change(data: bytes) -> bytes:
        found = bytearray(data)
        for at in records(data):
            struct.pack_into(f"<{field}", found, at + place, value)
        return bytes(found)

    return replaced(coreml_package.WEIGHTS, change)


def changed_program(change: Callable[[Any], None]) -> Callable[[Path], None]:
    def rewrite(data: bytes) -> bytes:
        model = mil.protobuf().model.Model.FromString(data)
        (function,) = model.mlProgram.functions.values()
        change(function.block_specializations[function.opset])
        return bytes(model.SerializeToString())

    return replaced(coreml_package.MODEL, rewrite)


def operation(block: Any, kind: str) -> Any:
    return next(each for each in block.operations if each.type == kind)


def unlinked(file: str) -> Callable[[Path], None]:
    return lambda package: (package / file).unlink()


def linked_outside(package: Path) -> None:
    weights = package / coreml_package.WEIGHTS
    weights.rename(package.parent / "weight.bin")
    weights.symlink_to(package.parent / "weight.bin")


def blob(operation: Any) -> Any:
    return operation.inputs["data"].arguments[0].value.blobFileValue


DAMAGED = "mlpackage-damaged"
FAILED = "mlpackage-op-failed"
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no manifest": (unlinked(coreml_package.MANIFEST), DAMAGED),
    "a manifest that is no JSON": (replaced(coreml_package.MANIFEST, lambda data: data[:40]), DAMAGED),
    "a manifest of another shape": (replaced(coreml_package.MANIFEST, lambda data: b"[1]"), DAMAGED),
    "a manifest without a root": (manifest(rootModelIdentifier="x"), DAMAGED),
    "a path above the package": (manifest(path="../../../etc/passwd"), DAMAGED),
    "an absolute path": (manifest(path="/etc/passwd"), DAMAGED),
    "a path that is a number": (manifest(path=3), DAMAGED),
    "no program": (unlinked(coreml_package.MODEL), DAMAGED),
    "a program cut short": (replaced(coreml_package.MODEL, lambda data: data[: len(data) // 2]), DAMAGED),
    "an empty program": (replaced(coreml_package.MODEL, lambda data: b""), DAMAGED),
    "no weights": (unlinked(coreml_package.WEIGHTS), DAMAGED),
    "weights cut short": (replaced(coreml_package.WEIGHTS, lambda data: data[:-200]), DAMAGED),
    "weights cut to nothing": (replaced(coreml_package.WEIGHTS, lambda data: b""), DAMAGED),
    "weights behind a link that leaves": (linked_outside, DAMAGED),
    "another version": (replaced(coreml_package.WEIGHTS, lambda data: data[:4] + b"\x09" + data[5:]), DAMAGED),
    "another sentinel": (record("I", 0, 7), DAMAGED),
    "another element type": (record("I", 4, 14), DAMAGED),
    "a size beyond the file": (record("Q", 8, 1 << 62), DAMAGED),
    "an offset beyond the file": (record("Q", 16, 1 << 63), DAMAGED),
    "unused bits that are none": (record("Q", 24, 3), DAMAGED),
    "an offset that is no record": (
        changed_program(lambda block: setattr(blob(operation(block, "constexpr_blockwise_shift_scale")), "offset", 65)),
        DAMAGED,
    ),
    "a weight outside the package": (
        changed_program(
            lambda block: setattr(
                blob(operation(block, "constexpr_blockwise_shift_scale")), "fileName", "@model_path/../../weight.bin"
            )
        ),
        DAMAGED,
    ),
    "a weight anywhere": (
        changed_program(
            lambda block: setattr(blob(operation(block, "constexpr_blockwise_shift_scale")), "fileName", "/etc/passwd")
        ),
        DAMAGED,
    ),
    "an unknown op": (
        changed_program(lambda block: setattr(operation(block, "relu"), "type", "teleport")),
        "mlpackage-op-unknown",
    ),
    "an input that nothing makes": (
        changed_program(lambda block: setattr(operation(block, "relu").inputs["x"].arguments[0], "name", "nobody")),
        DAMAGED,
    ),
    "an output that nothing makes": (
        changed_program(lambda block: block.outputs.__setitem__(0, "nobody")),
        DAMAGED,
    ),
    "a parameter that the op lacks": (
        changed_program(
            lambda block: operation(block, "relu").inputs["z"].CopyFrom(operation(block, "relu").inputs["x"])
        ),
        FAILED,
    ),
    "a result of another shape": (
        changed_program(
            lambda block: setattr(operation(block, "relu").outputs[0].type.tensorType.dimensions[0].constant, "size", 9)
        ),
        FAILED,
    ),
    "an element type of no name": (
        changed_program(lambda block: setattr(operation(block, "relu").outputs[0].type.tensorType, "dataType", 99)),
        DAMAGED,
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_package_is_a_finding(name: str, good: Path, tmp_path: Path) -> None:
    package = tmp_path / "copy.mlpackage"
    shutil.copytree(good, package)
    assert len(evaluated(package, {"x": X})) == 1
    damage, code = DAMAGE[name]
    damage(package)
    with pytest.raises(errors.BundleError) as caught:
        evaluated(package, {"x": X})
    assert [finding.code for finding in caught.value.findings] == [code]


@pytest.mark.parametrize(
    "inputs", [{}, {"x": X[:1]}, {"x": X[0]}, {"x": np.ones((2, 64), np.int32)}], ids=["none", "rows", "rank", "dtype"]
)
def test_an_input_that_does_not_fit_is_the_users_error(inputs: dict[str, Array], good: Path) -> None:
    with pytest.raises(errors.UsageError, match="mlpackage-bad-input"):
        evaluated(good, inputs)


def test_a_function_that_is_not_there_is_named(good: Path) -> None:
    with pytest.raises(errors.BundleError, match="mlpackage-damaged") as caught:
        Interpreter(good).function("prefill")
    assert "main" in caught.value.findings[0].why


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_random_damage_never_surprises(
    data: st.DataObject, good: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    package = tmp_path_factory.mktemp("fuzz") / "copy.mlpackage"
    shutil.copytree(good, package)
    for file in (coreml_package.MANIFEST, coreml_package.MODEL, coreml_package.WEIGHTS):
        content = bytearray((package / file).read_bytes())
        for _ in range(data.draw(st.integers(0, 3))):
            place = data.draw(st.integers(0, min(len(content), 4096) - 1))
            content[place] = data.draw(st.integers(0, 255))
        (package / file).write_bytes(content)
    try:
        evaluated(package, {"x": X})
    except errors.EdgeExportError as problem:
        assert problem.findings[0].code.startswith("mlpackage-")


def test_nothing_is_read_from_memory_maps(good: Path) -> None:
    """Mapped pages count as memory in use."""
    held = Interpreter(good)
    held.run({"x": X})
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert "weight.bin" not in maps.read_text()


@pytest.mark.parametrize("room", [0, 1 << 30])
def test_weights_that_are_not_kept_give_the_same(room: int, tmp_path: Path) -> None:
    mb = builder()
    table = np.random.default_rng(4).standard_normal((2000, 64)).astype(np.float16)
    ids = np.array([[3, 1999, 3]], np.int32)

    def body(ids: Any) -> Any:
        weight = mb.const(val=table)
        rows = mb.gather(x=weight, indices=ids, axis=0)
        return rows, mb.linear(x=rows, weight=weight)

    package = saved(program({"ids": ids}, body), tmp_path / "t.mlpackage")
    rows, product = Interpreter(package, room=room).run({"ids": ids}).values()
    wanted = table[ids[0]].astype(np.float32)
    np.testing.assert_array_equal(rows[0], wanted)
    exact = wanted @ table.T.astype(np.float32)
    np.testing.assert_allclose(product[0], exact, rtol=1e-3, atol=1e-2)
    assert (package / coreml_package.WEIGHTS).stat().st_size > table.nbytes
