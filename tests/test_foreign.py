"""Files that anyone may have written, broken in a thousand ways: each is read, or refused by an error of ours."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from mutation import json_bytes, mutated_bytes, mutated_json

from edgeexport import build, errors, stored
from edgeexport.backends.storage import read_rows
from edgeexport.bundle import open_bundle
from edgeexport.parity import report_file
from edgeexport.parity.report import write_html, write_json

COUNT = 400
"""Inputs of each kind."""


def tried(read: Callable[[int], Any], count: int = COUNT) -> tuple[int, int]:
    """(inputs that were read, inputs that were refused). Whatever else happens ends the test."""
    good = bad = 0
    for seed in range(count):
        try:
            read(seed)
            good += 1
        except errors.EdgeExportError as error:
            assert error.exit_code in (2, 8) and all(len(each.why) < 1000 for each in error.findings), (seed, error)
            bad += 1
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}"[:500]) from error
    return good, bad


@pytest.fixture(scope="module")
def bundles(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("out")
    return {
        target: build(str(checkpoint), target, out, parity="L4").bundle
        for target in ("host-ort", "ios-coreml", "android-mnn", "android-tflite")
    }


@pytest.mark.parametrize("target", ["host-ort", "ios-coreml", "android-mnn", "android-tflite"])
def test_weights_json(bundles: dict[str, Path], target: str) -> None:
    """What is read can be read to its end: no place in it lies outside of its file."""
    bundle = open_bundle(bundles[target])
    written = json.loads(bundle.read("decoder.weights.json", stored.MAX_BYTES))
    files = {name: bundle.manifest.files[name].size for name in bundle.component("decoder").files}
    shapes = {name: tuple(each["shape"]) for name, each in written.items()}
    whole = stored.from_json(msgspec.json.encode(written), Path("w"), files, shapes)
    few = {name: written[name] for name in list(written)[:3]}

    def read(seed: int) -> None:
        data = json_bytes(mutated_json(few, seed))
        found = stored.from_json(data, Path("w"), files, {name: shapes[name] for name in few})
        for weight in found.values():
            with np.errstate(all="ignore"):
                rows = read_rows(bundle.path, weight, 0, weight.shape[0])
            assert rows.size == int(np.prod(weight.shape))

    good, bad = tried(read)
    assert whole and good and bad


def test_parity_json(bundles: dict[str, Path]) -> None:
    """What is read can be drawn and written again."""
    data = (bundles["host-ort"] / "parity.json").read_bytes()
    original = json.loads(data)
    original["drift"], original["weights"] = original["drift"][:2], original["weights"][:3]

    def read(seed: int) -> None:
        report = report_file.read(json_bytes(mutated_json(original, seed)), "p")
        assert len(write_html(report.rows(), report.extra())) < 10 * len(data) + 1_000_000
        write_json(report.rows(), report.extra())

    assert report_file.read(data, "p").rows()
    good, bad = tried(read)
    assert good and bad


@pytest.mark.parametrize(
    "row",
    [
        {"tensor": "w.99999999999.x", "snr_db": 20.0},
        {"snr_db": 1.7e308},
        {"snr_db": -1.7e308},
        {"snr_db": "NaN"},
        {"snr_db": 2**61},
    ],
    ids=str,
)
def test_a_tensor_that_cannot_be_drawn(row: dict[str, Any]) -> None:
    data = {"schema": "edgeexport.parity/1", "results": [], "weights": [{"tensor": "w", "format": "f", **row}]}
    report = report_file.read(json_bytes(data), "p")
    assert len(write_html([], report.extra())) < 100_000


@pytest.mark.parametrize(
    "row",
    [
        {"max_abs": -1.0},
        {"max_abs": 5e-324},
        {"rms": 5e-324, "rms_error": 1e300},
        {"rms_error": -1.0},
        {"rms_error": 0.0},
        {"max_abs": 1.7e308, "rms_error": "Infinity"},
    ],
    ids=str,
)
def test_a_layer_that_cannot_be_drawn(row: dict[str, Any]) -> None:
    layer = {"layer": "l", "max_abs": 1.0, "rms_error": 1.0, "rms": 1.0, **row}
    report = report_file.read(json_bytes({"schema": "edgeexport.parity/1", "results": [], "drift": [layer]}), "p")
    assert len(write_html([], report.extra())) < 100_000


def test_ml_packages(bundles: dict[str, Path], tmp_path: Path) -> None:
    """Described, and run: the program's protobuf and its manifest are broken in turns."""
    from edgeexport.backends import coreml_inspect

    package = Path(shutil.copytree(bundles["ios-coreml"] / "decoder.mlpackage", tmp_path / "x.mlpackage"))
    places = [package / "Manifest.json", package / "Data/com.apple.CoreML/model.mlmodel"]
    originals = [place.read_bytes() for place in places]
    inputs = tmp_path / "x.npz"
    np.savez(inputs, input_ids=np.zeros((1, 1), np.int32), position=np.zeros(1, np.int32))
    assert coreml_inspect.evaluate(package, inputs, "decode")["outputs"]

    def read(seed: int) -> None:
        which = int(seed % 8 != 0)
        for place, data in zip(places, originals, strict=True):
            place.write_bytes(data)
        if which:
            places[1].write_bytes(mutated_bytes(originals[1], seed))
        else:
            places[0].write_bytes(json_bytes(mutated_json(json.loads(originals[0]), seed)))
        coreml_inspect.describe(package)
        coreml_inspect.evaluate(package, inputs, "decode")

    good, bad = tried(read, COUNT // 2)
    assert good and bad


def test_arrays_for_a_package(bundles: dict[str, Path], tmp_path: Path) -> None:
    from edgeexport.backends import coreml_inspect

    inputs, broken = tmp_path / "x.npz", tmp_path / "y.npz"
    np.savez_compressed(inputs, input_ids=np.zeros((1, 1), np.int32), position=np.zeros(1, np.int32))

    def read(seed: int) -> None:
        broken.write_bytes(mutated_bytes(inputs.read_bytes(), seed))
        coreml_inspect._arrays(tmp_path, broken)

    assert tried(read)[1]


def test_onnx_files(bundles: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("polygraphy")
    from edgeexport.backends import tensorrt_inspect

    original, place = (bundles["host-ort"] / "decoder.onnx").read_bytes(), tmp_path / "x.onnx"
    place.write_bytes(original)
    assert tensorrt_inspect.describe_onnx(place)["nodes"]

    def read(seed: int) -> None:
        place.write_bytes(mutated_bytes(original, seed))
        tensorrt_inspect.describe_onnx(place)

    good, bad = tried(read)
    assert good and bad


def test_what_lies_beside_an_engine(tmp_path: Path) -> None:
    """Its description is shown by `inspect`, and compared with the graph when a bundle is checked."""
    from edgeexport.backends import tensorrt_inspect, tensorrt_runner
    from edgeexport.core import TensorSpec

    engine = tmp_path / "x.engine"
    engine.write_bytes(b"vtrt" + bytes(12) + (24).to_bytes(8, "little"))
    value = {"name": "x", "dtype": "float", "shape": [1, 4]}
    described = {"inputs": [value], "outputs": [{**value, "name": "y"}]}
    graph = {name: TensorSpec(name, "float32", (1, 4)) for name in "xy"}

    def read(seed: int) -> None:
        (tmp_path / "x.engine.json").write_bytes(json_bytes(mutated_json(described, seed)))
        tensorrt_inspect.describe_engine(engine)
        tensorrt_runner._check_interface(tmp_path, "x.engine", graph)

    assert tried(read)[1]
