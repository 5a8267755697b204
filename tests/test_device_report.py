"""Reports that devices make of a bundle: read strictly, judged by the bundle's gates, joined with the ladder's rows."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from bundles import a_manifest, code_of, golden_tensors, rehash, table
from hypothesis import given
from hypothesis import strategies as st
from test_report import extra as ladder_extra
from test_report import results as ladder_rows

import edgeexport.bundle.manifest as manifests
from edgeexport import cli_import, errors
from edgeexport.bundle import device_report
from edgeexport.bundle.verify import verify
from edgeexport.bundle.writer import BundleWriter
from edgeexport.cli_edge import execute
from edgeexport.core import Verdict
from edgeexport.parity.report import MEASURED, write_html, write_json

ROOT = Path(__file__).parent.parent
GOOD_ROWS = [row for row in ladder_rows() if row.verdict is not Verdict.FAIL]


def make_bundle(folder: Path, parity: bytes | None = None, **changed: Any) -> Path:
    import safetensors.numpy

    with BundleWriter(folder) as out:
        out.add_bytes("decoder.bin", table().tobytes())
        out.add_bytes("golden/text.safetensors", safetensors.numpy.save(golden_tensors()))
        out.add_bytes("parity.json", write_json(GOOD_ROWS, ladder_extra()) if parity is None else parity)
        out.add_bytes("parity.html", write_html(GOOD_ROWS, ladder_extra()))
        return out.commit(a_manifest(out.files, **changed))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "tiny")


def a_report(bundle: Path, **changed: Any) -> dict[str, Any]:
    return {
        "schema": "edgeexport.device-parity/1",
        "bundle": hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest(),
        "component": "decoder",
        "device": {"model": "Mac16,5", "system": "macOS Version 15.6 (Build 24G84)"},
        "date": "2026-11-20T09:30:00Z",
        "rows": [
            {"level": "L1", "units": "cpuOnly", "metrics": {}},
            {"level": "L4", "units": "cpuOnly", "metrics": {"steps": 5, "max_abs": 2e-5}},
            {"level": "L5", "units": "cpuOnly", "metrics": {"steps": 5, "kl": 0.001, "top1": 0.8}},
        ],
    } | changed


def write(place: Path, document: Any) -> Path:
    place.write_text(document if isinstance(document, str) else json.dumps(document))
    return place


def row(level: str, **metrics: Any) -> dict[str, Any]:
    return {"level": level, "units": "all", "metrics": metrics}


def test_a_device_s_rows_stand_beside_the_ladder_s(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = write(tmp_path / "report.json", a_report(bundle))
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    assert execute(["parity", str(bundle), "--import", str(report), "--json"]) == 0
    assert {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()} == before
    shown = json.loads(capsys.readouterr().out)
    joined = json.loads((tmp_path / "tiny.parity" / "parity.json").read_bytes())
    old = json.loads((bundle / "parity.json").read_bytes())
    assert shown["results"] == joined["results"]
    assert joined["results"][: len(old["results"])] == old["results"]
    assert joined["devices"] == [
        {"model": "Mac16,5", "system": "macOS Version 15.6 (Build 24G84)", "date": "2026-11-20T09:30:00Z"}
    ]
    for key in ("model", "target", "scheme", "drift", "weights", "sizes"):
        assert joined[key] == old[key]
    assert joined["limits"] == [MEASURED, *old["limits"][1:]]
    new = joined["results"][len(old["results"]) :]
    assert [(each["level"], each["verdict"], each["gate"]) for each in new] == [
        ("L1", "PASS", {}),
        ("L4", "PASS", {"max_abs": 1e-4}),
        ("L5", "PASS", {"kl": 1e-2}),
    ]
    assert new[2]["metrics"] == {"steps": 5, "kl": 0.001, "top1": 0.8}
    assert {each["note"] for each in new} == {"measured on Mac16,5, macOS Version 15.6 (Build 24G84), 2026-11-20"}
    page = (tmp_path / "tiny.parity" / "parity.html").read_text()
    assert "measured on Mac16,5" in page
    assert "golden text on cpuOnly" in page
    assert MEASURED.split(";")[0] in page


def test_a_row_names_what_was_replayed(bundle: Path, tmp_path: Path) -> None:
    rows = [
        {"level": "L1", "units": "cpu", "golden": "chat"},
        {"level": "L1", "units": "cpu"},
        {**row("L4", max_abs=0.0), "golden": "picture"},
        {
            "level": "L5",
            "units": "cpu",
            "golden": "sound",
            "failure": {"code": "golden-mismatch", "what": "input.0.mel"},
        },
    ]
    report = write(tmp_path / "report.json", a_report(bundle, rows=rows))
    found = cli_import.merge(bundle, [report], tmp_path / "out")[-4:]
    assert [(each.output, each.verdict) for each in found] == [
        ("golden chat on cpu", Verdict.PASS),
        ("opens on cpu", Verdict.PASS),
        ("golden picture on all", Verdict.PASS),
        ("golden sound on cpu", Verdict.FAIL),
    ]


def test_two_reports_and_the_same_bytes_each_time(bundle: Path, tmp_path: Path) -> None:
    one = write(tmp_path / "one.json", a_report(bundle))
    two = write(tmp_path / "two.json", a_report(bundle, device={"model": "iPhone17,1", "system": "iOS 26"}))
    results = cli_import.merge(bundle, [one, two], tmp_path / "out")
    assert len(results) == len(GOOD_ROWS) + 6
    first = (tmp_path / "out" / "parity.json").read_bytes()
    cli_import.merge(bundle, [one, two], tmp_path / "out")
    assert (tmp_path / "out" / "parity.json").read_bytes() == first


@pytest.mark.parametrize(
    ("measured", "verdict", "code"),
    [
        (row("L4", max_abs=1e-4), "PASS", 0),
        (row("L4", max_abs=1.1e-4), "FAIL", 6),
        (row("L4", max_abs="NaN"), "FAIL", 6),
        (row("L5", kl="Infinity"), "FAIL", 6),
        (row("L5", kl=1e-2, max_abs=50), "PASS", 0),
        ({**row("L1"), "failure": {"code": "artifact-does-not-open", "what": "no such op"}}, "FAIL", 6),
        ({**row("L5"), "failure": {"code": "nonfinite-logits", "what": "NaN"}}, "FAIL", 6),
    ],
)
def test_verdicts_are_made_here(
    bundle: Path, tmp_path: Path, measured: dict[str, Any], verdict: str, code: int,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    report = write(tmp_path / "report.json", a_report(bundle, rows=[measured]))
    assert execute(["parity", str(bundle), "--import", str(report), "--json"]) == code
    last = json.loads(capsys.readouterr().out)["results"][-1]
    assert last["verdict"] == verdict
    if "failure" in measured:
        assert last["note"].endswith(f"[{measured['failure']['code']}] {measured['failure']['what']}")


def test_a_gate_that_the_bundle_lacks_decides_nothing(tmp_path: Path) -> None:
    golden = manifests.Golden("golden/text.safetensors", gates=manifests.Gates(kl=1e-2))
    bundle = make_bundle(tmp_path / "tiny", golden=golden)
    report = write(tmp_path / "report.json", a_report(bundle, rows=[row("L4", max_abs=9.0)]))
    assert cli_import.merge(bundle, [report], tmp_path / "out")[-1].verdict is Verdict.AMBIGUOUS


def test_another_bundle_s_report_is_refused(bundle: Path, tmp_path: Path) -> None:
    other = make_bundle(tmp_path / "other", build_key="another")
    report = write(tmp_path / "report.json", a_report(other, bundle_title="tiny, ios18, int8"))
    with pytest.raises(errors.BundleError) as caught:
        cli_import.merge(bundle, [report], tmp_path / "out")
    assert code_of(caught) == "parity-report-of-another-bundle"
    assert "(tiny, ios18, int8)" in caught.value.findings[0].why
    assert not (tmp_path / "out").exists()


BAD: dict[str, Callable[[Path], Any]] = {
    "empty": lambda _: "",
    "no object": lambda _: [1],
    "bare NaN": lambda b: json.dumps(a_report(b)).replace("2e-05", "NaN"),
    "huge number": lambda b: json.dumps(a_report(b)).replace("2e-05", "1e999"),
    "huge whole number": lambda b: json.dumps(a_report(b)).replace("2e-05", "9" * 4000),
    "key twice": lambda b: json.dumps(a_report(b)).replace('"date"', '"schema": "x", "date"'),
    "another schema": lambda b: a_report(b, schema="edgeexport.device-parity/2"),
    "unknown key": lambda b: a_report(b, verdict="PASS"),
    "a verdict": lambda b: a_report(b, rows=[{**row("L1"), "verdict": "PASS"}]),
    "negative": lambda b: a_report(b, rows=[row("L4", max_abs=-1.0)]),
    "minus infinity": lambda b: a_report(b, rows=[row("L4", max_abs="-Infinity")]),
    "a truth": lambda b: a_report(b, rows=[row("L4", max_abs=True)]),
    "steps": lambda b: a_report(b, rows=[row("L4", max_abs=0, steps=1 << 40)]),
    "unknown metric": lambda b: a_report(b, rows=[row("L4", max_abs=0, snr=1)]),
    "unknown level": lambda b: a_report(b, rows=[row("L2", max_abs=0)]),
    "nothing measured": lambda b: a_report(b, rows=[row("L4", kl=0.0)]),
    "no rows": lambda b: a_report(b, rows=[]),
    "many rows": lambda b: a_report(b, rows=[row("L1")] * 257),
    "unseen name": lambda b: a_report(b, rows=[{**row("L1"), "golden": "\u202e"}]),
    "unseen title": lambda b: a_report(b, bundle_title="\u202e"),
    "no such day": lambda b: a_report(b, date="2026-13-41T00:00:00Z"),
    "no date": lambda b: a_report(b, date="yesterday"),
    "no hash": lambda b: a_report(b) | {"bundle": "abc"},
    "long name": lambda b: a_report(b, device={"model": "x" * 201, "system": "y"}),
    "escape": lambda b: a_report(b, device={"model": "\x1b[31m", "system": "y"}),
    "too large": lambda b: json.dumps(a_report(b)) + " " * (1 << 20),
    "deep": lambda _: "[" * 100_000,
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_report_is_refused(name: str, bundle: Path, tmp_path: Path) -> None:
    report = write(tmp_path / "report.json", BAD[name](bundle))
    with pytest.raises(errors.BundleError) as caught:
        cli_import.merge(bundle, [report], tmp_path / "out")
    assert code_of(caught) == "parity-report-bad"
    assert not (tmp_path / "out").exists()


def test_other_mistakes_are_named(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = str(write(tmp_path / "report.json", a_report(bundle)))
    bad = str(write(tmp_path / "bad.json", a_report(bundle, component="vision")))
    for arguments, code in (
        ([str(bundle)], "bad-command-line"),
        ([str(bundle), "model", "--import", report], "bad-command-line"),
        ([str(bundle), "model", "--out", "x"], "bad-command-line"),
        ([str(bundle), "--import", str(tmp_path / "none.json")], "parity-report-bad"),
        ([str(bundle), "--import", bad], "bundle-no-component"),
        ([str(bundle), "--import", report, "--out", str(bundle / "x")], "output-exists"),
        ([str(bundle), "--import", report, "--out", report], "output-not-writable"),
    ):
        assert execute(["parity", *arguments]) != 0
        assert f"error[{code}]" in capsys.readouterr().err
    assert verify(bundle, golden=False).ok


@pytest.mark.parametrize(
    "parity",
    [
        b"{}",
        b"[]",
        b'{"schema": "edgeexport.parity/1", "results": [{"level": "L9"}]}',
        b'{"schema": "edgeexport.parity/1", "results": [], "drift": [{"layer": 1}]}',
    ],
)
def test_a_bundle_with_another_report_in_it_is_refused(parity: bytes, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "tiny", parity)
    report = write(tmp_path / "report.json", a_report(bundle))
    with pytest.raises(errors.BundleError) as caught:
        cli_import.merge(bundle, [report], tmp_path / "out")
    assert code_of(caught) == "parity-report-bad"


def test_a_changed_ladder_is_refused(bundle: Path, tmp_path: Path) -> None:
    report = write(tmp_path / "report.json", a_report(bundle))
    data = (bundle / "parity.json").read_bytes()
    (bundle / "parity.json").write_bytes(data.replace(b"PASS", b"FAIL"))
    with pytest.raises(errors.BundleError) as caught:
        cli_import.merge(bundle, [report], tmp_path / "out")
    assert code_of(caught) == "bundle-file-changed"
    rehash(bundle)
    with pytest.raises(errors.BundleError) as caught:
        cli_import.merge(bundle, [report], tmp_path / "out")
    assert code_of(caught) == "parity-report-of-another-bundle"


JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(["bundle", "component", "device", "date", "rows", "schema", "metrics", "level"]), JSON)
def test_whatever_stands_in_a_report_it_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: Any
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "manifest.json").write_bytes(b"{}")
    document = a_report(folder)
    (document if key in document else document["rows"][1])[key] = value
    place = write(folder / "report.json", document)
    try:
        found = device_report.read(place)
    except errors.BundleError as error:
        assert error.findings[0].code == "parity-report-bad"
    else:
        assert msgspec.to_builtins(found)


def test_the_documented_report_is_read(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "coreml.md").read_text()
    example = re.search(r"```json\n(.*?edgeexport\.device-parity/1.*?)```", text, re.DOTALL)
    assert example is not None
    assert len(device_report.read(write(tmp_path / "report.json", example[1])).rows) == 4


def test_swift_writes_the_fields_that_are_read() -> None:
    text = (ROOT / "ios_runtime" / "Sources" / "EdgeExportBundle" / "DeviceReport.swift").read_text()

    def fields(struct: str) -> set[str]:
        body = re.search(rf"public struct {struct}: Encodable.*?\n(    )?}}\n", text, re.DOTALL)
        assert body is not None
        own = re.sub(r"    public struct .*?\n    }\n", "", body[0].split("\n", 1)[1], flags=re.DOTALL)
        names = re.findall(r"^ +public (?:let|var) (\w+)", own, re.MULTILINE)
        return {"max_abs" if name == "maxAbs" else name for name in names}

    pairs: list[tuple[str, type[msgspec.Struct]]] = [
        ("DeviceReport", device_report.DeviceReport),
        ("Device", device_report.Device),
        ("Row", device_report.Row),
        ("Metrics", device_report.Metrics),
        ("Reason", device_report.Failure),
    ]
    for swift, ours in pairs:
        unsaid = {"golden", "bundle_title"}  # what is replayed there needs no name; its bundle's is for people
        assert fields(swift) == {field.encode_name for field in msgspec.structs.fields(ours)} - unsaid
    assert 'maxAbs = "max_abs"' in text
    assert f'"{device_report.SCHEMA}"' in text
