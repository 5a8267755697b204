"""Target files: the ones we ship load, and every mistake in one is named with its line."""

from __future__ import annotations

import time
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeexport import backends, quant, targets
from edgeexport.core import Target
from edgeexport.errors import UsageError

GOOD = """title = "A computer"
platform = "host"
backend = "onnxruntime"
artifact = ".onnx"
precision = "float32"
quant = "int4-b32"
context = 2048
requires = ["ONNX Runtime"]

[limits]
max_file_bytes = 1000

[parity.L4]
max_abs = 0.01
why = "accuracy level 4 rounds activations; measured 0.004"

[options]
accuracy_level = 1

[devices.phone]
title = "Phone"
ram_gb = 8
usable = 0.5
bandwidth_gbs = 67.2
source = "a brief"
"""


def refused(text: str) -> list[str]:
    """`code line: why` of every finding in this text."""
    with pytest.raises(UsageError) as caught:
        targets.parse("mine", text, "mine.toml")
    return [f"{finding.code} {finding.where}: {finding.what} / {finding.why}" for finding in caught.value.findings]


@pytest.mark.parametrize("name", targets.names())
def test_every_target_we_ship_loads_and_names_things_that_exist(name: str) -> None:
    target = targets.load(name)
    assert target.name == name
    assert target.backend in backends.known()
    assert target.quant in {*quant.SCHEMES, *backends.load(target.backend).TRAITS.schemes}
    assert target.platform == "host" or target.devices


def test_the_targets_of_this_release() -> None:
    assert {"host-ort", "android-ort"} <= set(targets.names())


def test_a_users_file_is_a_target_too(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(GOOD)
    target = targets.load(str(file))
    assert isinstance(target, Target)
    assert (target.name, target.source, target.requires) == ("mine", GOOD, ("ONNX Runtime",))
    table = tomllib.loads(GOOD)
    for section in ("limits", "parity", "options", "devices"):
        assert getattr(target, section) == table[section]
    assert target.shapes == {}


@pytest.mark.parametrize("name", ["host-orb", "../targets/host-ort", "missing.toml", "", "host-ort.toml"])
def test_an_unknown_name_gets_suggestions(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        targets.load(name)
    (finding,) = caught.value.findings
    assert finding.code == "unknown-target"
    assert "host-ort" in finding.why


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('title = "A', 'titel = "A', "unknown-key mine.toml:1: the target file has a key that nothing reads: titel"),
        ("context = 2048", "context = 0", "bad-target mine.toml:7: "),
        ("context = 2048", "context = true", "bad-target mine.toml:7: "),
        ("context = 2048", 'context = "2048"', "bad-target mine.toml:7: "),
        ('title = "A computer"', 'title = " "', "bad-target mine.toml:1: "),
        ('backend = "onnxruntime"', 'backend = "onnxruntim"', "bad-target mine.toml:3: "),
        ('quant = "int4-b32"', 'quant = "int3"', "bad-target mine.toml:6: "),
        ('platform = "host"', 'platform = "toaster"', "bad-target mine.toml:2: "),
        ('platform = "host"', "platform = [1]", "bad-target mine.toml:2: "),
        ('precision = "float32"', 'precision = "float8"', "bad-target mine.toml:5: "),
        ('artifact = ".onnx"', 'artifact = "../x"', "bad-target mine.toml:4: "),
        ('["ONNX Runtime"]', '"ONNX Runtime"', "bad-target mine.toml:8: "),
        ("max_file_bytes = 1000", "max_file_byte = 1000", "unknown-key mine.toml:11: "),
        ("max_file_bytes = 1000", "max_file_bytes = -1", "bad-target mine.toml:11: "),
        ("[parity.L4]", "[parity.L6]", "unknown-key mine.toml:13: "),
        ("max_abs = 0.01", "top1 = 0.01", "unknown-key mine.toml:14: "),
        ("max_abs = 0.01", "max_abs = nan", "bad-target mine.toml:14: "),
        ("accuracy_level = 1", "accuracy = 1", "unknown-key mine.toml:18: "),
        ("accuracy_level = 1", "accuracy_level = true", "bad-target mine.toml:18: "),
        ("accuracy_level = 1", "accuracy_level = 1.0", "bad-target mine.toml:18: "),
        ("ram_gb = 8", "ram_gb = 0", "bad-target mine.toml:22: "),
        ("usable = 0.5", "usable = 1.5", "bad-target mine.toml:23: "),
        ("[limits]\nmax_file_bytes = 1000", "limits = 1", "bad-target mine.toml:10: "),
        ("[limits]\nmax_file_bytes = 1000", "[shapes]\nprefill = 64", "unknown-key mine.toml:11: "),
    ],
)
def test_a_mistake_is_named_with_its_line(old: str, new: str, expected: str) -> None:
    assert GOOD.count(old) == 1
    assert any(line.startswith(expected) for line in refused(GOOD.replace(old, new)))


def test_a_missing_key_is_named() -> None:
    (problem,) = refused(GOOD.replace("context = 2048\n", ""))
    assert "context is missing" in problem
    (problem,) = refused(GOOD.replace('source = "a brief"\n', ""))
    assert "devices.phone.source is missing" in problem


def test_a_gate_without_a_reason_is_refused() -> None:
    (problem,) = refused(GOOD.replace('why = "accuracy level 4 rounds activations; measured 0.004"\n', ""))
    assert "parity.L4.why is missing" in problem


def test_all_mistakes_are_reported_at_once() -> None:
    text = (
        GOOD.replace('title = "A', 'titel = "A')
        .replace("context = 2048", "context = 0")
        .replace("ram_gb = 8", "ram = 8")
    )
    assert len(refused(text)) == 5  # two misspelt keys, what they leave missing, and the context


@pytest.mark.parametrize("content", [b"title = ", b"\xff\xfe", b"[" * 10_000, b"a" * ((1 << 20) + 1)])
def test_what_is_no_toml_is_a_bad_target(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        targets.load(str(file))
    assert caught.value.findings[0].code == "bad-target"


@pytest.mark.parametrize(
    "text",
    [
        GOOD + "\n".join(f"k{i} = 1" for i in range(4000)),
        "".join(f"k{i} = 1\n" for i in range(4000)) + GOOD,
        GOOD + "".join(f"[devices.d{i}]\n" for i in range(3000)),
        "a." * 30_000 + "b = 1\n" + GOOD,
        "[" + "a." * 30_000 + "b]\n" + GOOD,
        GOOD.replace("context = 2048", "context = " + "9" * 5000),
        GOOD.replace("context = 2048", "context = 0x" + "f" * 3700),
        GOOD.replace('platform = "host"', "platform = 0x" + "f" * 3700),
        GOOD.replace("context = 2048", "context = " + "[" * 1500 + "]" * 1500),
        GOOD.replace("context = 2048", "context = " + "{a=" * 900 + "1" + "}" * 900),
        GOOD.replace('title = "A computer"', "title = 1979-05-27T07:32:00Z"),
        GOOD.replace("ram_gb = 8", "ram_gb = 0x" + "f" * 3700),
    ],
    ids=lambda text: text[:12],
)
def test_a_target_that_is_a_bomb_is_refused_soon_and_in_few_words(text: str) -> None:
    began = time.process_time()
    problems = refused(text)
    assert time.process_time() - began < 20
    assert 0 < len(problems) <= 100
    assert sum(map(len, problems)) < 100_000


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


@given(st.sampled_from([*tomllib.loads(GOOD), "shapes"]), VALUES)
def test_no_value_of_any_key_brings_the_reader_down(key: str, value: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tomllib, "loads", lambda _: {**TABLE, key: value})
        try:
            targets.parse("mine", GOOD, "mine.toml")
        except UsageError as error:
            assert error.findings


TABLE = tomllib.loads(GOOD)
