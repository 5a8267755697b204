"""What is said of ONNX files and engines, whoever wrote them; and the smallest part of a graph that fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from graphs import Zoo, positive
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tensorrt import compiled, graphs_of

from edgeexport import errors
from edgeexport.backends import tensorrt_inspect
from edgeexport.cli_edge import execute

CHECK = """
import sys, onnx
names = {node.op_type for node in onnx.load(sys.argv[1], load_external_data=False).graph.node}
sys.exit(sys.argv[2] in names)
"""


@pytest.fixture(scope="module")
def folder(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """decoder.onnx with its weights, in primitives."""
    found, folder = zoo.traced("llama"), tmp_path_factory.mktemp("graph")
    graphs_of([found.model], positive(found.plan("fp16")), folder, "primitives")
    (folder / "check.py").write_text(CHECK)
    return folder


def saved(folder: Path, **external: str) -> Path:
    """A graph of one Add, whose weight lies where `external` says."""
    helper = onnx.helper
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2]) for name in "xy"]
    weight = helper.make_tensor("w", onnx.TensorProto.FLOAT, [2], [1.0, 2.0])
    if external:
        weight.ClearField("float_data")
        weight.data_location = onnx.TensorProto.EXTERNAL
        for key, value in external.items():
            weight.external_data.add(key=key, value=value)
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", values[:1], values[1:], [weight])
    path = folder / "x.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    return path


def test_a_graph_is_described_without_reading_its_weights(folder: Path, zoo: Zoo, tmp_path: Path) -> None:
    told = tensorrt_inspect.describe_onnx(folder / "decoder.onnx")
    model = zoo.traced("llama").model
    assert [each["name"] for each in told["inputs"]] == [spec.name for spec in model.inputs]
    assert [each["name"] for each in told["outputs"]] == [spec.name for spec in model.outputs]
    assert told["inputs"][0] == {"name": "input_ids", "dtype": "int64", "shape": "1xT"}
    assert told["opsets"] == {"ai.onnx": 17} and "ScatterElements" in told["ops"]
    weights = folder / "decoder.onnx.data"
    assert told["weight_files"] == [{"file": weights.name, "bytes": weights.stat().st_size, "problem": ""}]
    (tmp_path / "decoder.onnx").write_bytes((folder / "decoder.onnx").read_bytes())
    (lost,) = tensorrt_inspect.describe_onnx(tmp_path / "decoder.onnx")["weight_files"]
    assert lost["problem"] == "there is no such file"


@pytest.mark.parametrize(
    ("external", "problem"),
    [
        ({"location": "../secret"}, "outside of the graph's folder"),
        ({"location": "/etc/passwd"}, "outside of the graph's folder"),
        ({"location": "link"}, "outside of the graph's folder"),
        ({"location": "gone"}, "no such file"),
        ({"location": "short", "offset": "4", "length": "8"}, "w lies outside of its 8 bytes"),
        ({"location": "short", "offset": "-4", "length": "8"}, "w lies outside of its 8 bytes"),
        ({"location": "short", "length": "9" * 5000}, "w lies outside of its 8 bytes"),
        ({"offset": "4"}, "outside of the graph's folder"),
    ],
)
def test_weights_that_a_graph_claims_wrongly_are_told_and_never_read(
    external: dict[str, str], problem: str, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_bytes(bytes(8))
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "short").write_bytes(bytes(8))
    (inner / "link").symlink_to(tmp_path / "secret")
    path = saved(inner, **external)
    (told,) = tensorrt_inspect.describe_onnx(path)["weight_files"]
    assert problem in told["problem"]
    with pytest.raises(errors.BundleError, match="artifact-does-not-open"):
        tensorrt_inspect.reduce(path, tmp_path / "out.onnx", "true {}")


@given(data=st.data())
@settings(max_examples=60)
def test_a_damaged_graph_is_described_or_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = saved(tmp_path_factory.mktemp("fuzz"))
    held = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        held[data.draw(st.integers(0, len(held) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(held[: data.draw(st.integers(0, len(held)))])
    try:
        told = tensorrt_inspect.describe_onnx(path)
    except errors.BundleError as error:
        assert [finding.code for finding in error.findings] == ["artifact-does-not-open"]
    else:
        json.dumps(told)


def test_an_engine_is_told_by_its_header_and_by_what_its_build_wrote(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled(zoo.traced("llama"), "fp16", "decoder", tmp_path, sm="89")
    engine = tmp_path / "decoder.engine"
    monkeypatch.setattr(tensorrt_inspect, "has_gpu", lambda: False)
    told = tensorrt_inspect.describe_engine(engine)
    assert told["bytes"] == engine.stat().st_size
    assert told["written_by_its_build"]["compute_capabilities"] == ["8.9"]
    assert "GPU" in told["note"]

    monkeypatch.setattr(tensorrt_inspect, "has_gpu", lambda: True)  # Polygraphy is asked, and finds none
    with pytest.raises(errors.BundleError, match="artifact-does-not-open") as caught:
        tensorrt_inspect.describe_engine(engine)
    assert "CUDA" in caught.value.findings[0].why.upper()

    monkeypatch.undo()
    beside = tmp_path / "decoder.engine.json"
    for bad in (b"[" * 100_000, b"[]", b"\xff", b" " * (5 << 20)):
        beside.write_bytes(bad)
        with pytest.raises(errors.BundleError, match="artifact-does-not-open"):
            tensorrt_inspect.describe_engine(engine)
    for bad_engine in (b"", b"vtrt", engine.read_bytes()[:-1]):
        engine.write_bytes(bad_engine)
        with pytest.raises(errors.BundleError, match="artifact-does-not-open"):
            tensorrt_inspect.describe_engine(engine)


def test_the_smallest_part_that_fails_is_found(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small.onnx"
    check = f"{sys.executable} {folder / 'check.py'} {{}} Softmax"
    line = ["debug", "reduce", str(folder / "decoder.onnx"), "-o", str(out), "--check", check]
    assert execute([*line, "--shape", "input_ids:[1,4]", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    kept = onnx.load(out)
    onnx.checker.check_model(kept)
    assert "Softmax" in {node.op_type for node in kept.graph.node}
    assert told["nodes"] == len(kept.graph.node) < told["of_nodes"] / 10
    assert told["path"] == str(out)


@pytest.mark.parametrize(
    ("check", "code"),
    [
        ("{python} {check} {{}} NoSuchOp", "nothing-to-reduce"),
        ("{python} {check} Softmax", "check-does-not-run"),
        ("/no/such/program {{}}", "check-does-not-run"),
        ("", "check-does-not-run"),
    ],
)
def test_a_check_that_cannot_lead_anywhere_is_refused(
    check: str, code: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_inspect, "has_gpu", lambda: False)
    command = check.format(python=sys.executable, check=folder / "check.py")
    with pytest.raises(errors.UsageError, match=code):
        tensorrt_inspect.reduce(folder / "decoder.onnx", tmp_path / "out.onnx", command)
    assert not (tmp_path / "out.onnx").exists()


def test_what_polygraphy_cannot_do_is_told_in_its_words(tmp_path: Path) -> None:
    path = saved(tmp_path)
    with pytest.raises(errors.ToolError, match="reduction-failed") as caught:
        tensorrt_inspect.reduce(path, tmp_path / "out.onnx", "false {}", ["x"])
    assert caught.value.findings[0].why.startswith("it said: ")


@pytest.mark.parametrize(("module", "extra"), [("polygraphy", "tensorrt"), ("onnx", "build")])
def test_without_the_package_the_install_line_is_told(
    module: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    assert execute(["inspect", str(path), "--json"]) == 7
    told: Any = json.loads(capsys.readouterr().out)
    assert told["findings"][0]["fix"] == f"pip install 'edgeexport[{extra}]'"
