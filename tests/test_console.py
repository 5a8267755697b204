"""The console: what goes to which stream, and how findings, tables and steps look."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from edgeexport import errors, units
from edgeexport.console import Console, printable, render_finding, to_json
from edgeexport.core import Finding, ParityResult, Verdict

FINDING = Finding("error", "op-not-lowered", "no lowering for Mul", "/layer.3/Mul", "rank 6\nat most 5", "rewrite it")

LADDER = [
    ParityResult("decoder", "L1", "signatures", {}, {}, Verdict.PASS),
    ParityResult("decoder", "L4", "logits", {"max_abs": 0.25}, {"max_abs": 1e-3}, Verdict.FAIL),
    ParityResult("decoder", "L5", "tokens", {"agreed": 31}, {}, Verdict.AMBIGUOUS),
    ParityResult("decoder", "L5", "kl", {}, {}, Verdict.NOT_RUN, "the reference does not fit in --max-rss"),
]


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch) -> tuple[Terminal, Terminal]:
    """Gives the test stdout and stderr as a person has them. Not a fixture: pytest sets its own before each test."""
    streams = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return streams


def test_finding_is_five_lines_with_aligned_labels() -> None:
    assert render_finding(FINDING).splitlines() == [
        "error[op-not-lowered]: no lowering for Mul",
        "  where /layer.3/Mul",
        "  why   rank 6",
        "        at most 5",
        "  fix   rewrite it",
    ]


def test_foreign_text_cannot_drive_the_terminal() -> None:
    hostile = Finding("error", "x", "name \x1b[2J\x07", "\x9b31m", "why\r", "fix")
    assert printable("a\x1b[31mb\tc\n\x00\x7f\x85é") == "a[31mb\tc\né"
    assert not set(render_finding(hostile)) & set("\x1b\x07\x9b\r")


def test_results_go_to_stdout_and_narration_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    with console.step("Tracing"):
        console.say("a remark")
    console.finding(FINDING)
    console.table(["name", "size"], [["long name", "1"], [("x", "red"), "22"]], right=["size"])
    console.fields({"a": "1", "long": "2"})
    console.json({"never": "shown"})
    out, err = capsys.readouterr()
    assert out.splitlines() == ["name       size", "long name     1", "x            22", "a     1", "long  2"]
    assert err.splitlines()[0] == "a remark"
    assert err.splitlines()[1].startswith("✓ Tracing  ")
    assert err.splitlines()[2:] == render_finding(FINDING).splitlines()
    assert "\x1b" not in out + err


def test_a_failed_step_is_marked_and_the_failure_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), Console().step("Tracing"):
        raise KeyError
    assert capsys.readouterr().err.startswith("✕ Tracing")


def test_quiet_drops_narration_but_no_finding(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(quiet=True)
    with console.step("Tracing"):
        console.say("a remark")
    assert capsys.readouterr().err == ""
    console.finding(FINDING)
    console.result("dist/x")
    assert capsys.readouterr() == ("dist/x\n", render_finding(FINDING) + "\n")


def test_json_is_the_only_thing_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(as_json=True)
    console.table(["a"], [["b"]])
    console.result("line")
    console.stream("text")
    console.parity(LADDER)
    console.finding(FINDING)
    assert capsys.readouterr() == ("", "")
    console.failure(errors.UsageError(FINDING), {"builds": []})
    document = json.loads(capsys.readouterr().out)
    assert document["error"] == {"exit_code": 2, "code": "op-not-lowered", "message": str(errors.UsageError(FINDING))}
    assert document["findings"][0]["fix"] == "rewrite it"
    assert document["builds"] == []


def test_json_takes_our_values_and_stays_strict() -> None:
    @dataclass(frozen=True)
    class Row:
        path: Path
        verdict: Verdict
        values: object

    row = Row(Path("a/b"), Verdict.NOT_RUN, {"nan": float("nan"), "np": np.float32(0.5), "ids": np.arange(2)})
    expected = {"path": "a/b", "verdict": "NOT_RUN", "values": {"nan": None, "np": 0.5, "ids": [0, 1]}}
    assert json.loads(to_json(row)) == expected
    assert json.loads(to_json({"set": {"b", "a"}, "tuple": (1, "é")})) == {"set": ["a", "b"], "tuple": [1, "é"]}
    with pytest.raises(TypeError):
        to_json({"what": object()})


def test_ladder_shows_numbers_verdicts_and_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    Console().parity(LADDER)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["level", "component", "output", "measured", "gate", "verdict", "note"]
    assert lines[2].split() == ["L4", "decoder", "logits", "max_abs", "0.25", "max_abs", "0.001", "FAIL"]
    assert "agreed 31" in lines[3]
    assert lines[4].endswith("NOT_RUN    the reference does not fit in --max-rss")


def test_verdicts_have_colours_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = terminal(monkeypatch)
    Console().parity(LADDER)
    text = streams[0].getvalue()
    assert "\x1b[32mPASS" in text
    assert "\x1b[1;31mFAIL" in text
    assert "\x1b[33mAMBIGUOUS" in text
    assert "\x1b[32mNOT_RUN" not in text
    assert "\x1b[90mNOT_RUN" in text


@pytest.mark.parametrize(("variable", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_colours_can_be_turned_off(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    streams = terminal(monkeypatch)
    monkeypatch.setenv(variable, value)
    Console().parity(LADDER)
    Console().finding(FINDING)
    assert "\x1b" not in streams[0].getvalue() + streams[1].getvalue()


def test_a_step_on_a_terminal_replaces_its_own_line(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = terminal(monkeypatch)
    with Console().step("Tracing"):
        assert streams[1].getvalue() == "  Tracing…"
    assert "\r\x1b[2K" in streams[1].getvalue()
    assert streams[1].getvalue().endswith(" s\n")


def test_progress_is_silent_off_a_terminal_and_counts_on_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Console().progress("hashing", 100) as update:
        update(50, 100)
    assert capsys.readouterr() == ("", "")
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    with Console().progress("hashing") as update:
        update(3 << 20, 3 << 20)
    assert "hashing" in stream.getvalue()
    assert "3 MiB / 3 MiB" in stream.getvalue()


def test_an_ascii_log_does_not_end_a_build(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    with Console().step("Tracing"):
        pass
    assert raw.getvalue().startswith(b"? Tracing")


def test_a_models_answer_is_streamed_as_it_is_unless_a_person_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = terminal(monkeypatch)
    Console().stream("a\x1b[2Jb")
    assert streams[0].getvalue() == "a[2Jb"


@pytest.mark.parametrize(
    ("text", "size"),
    [("1.5G", 3 << 29), ("900m", 900 << 20), ("2GiB", 2 << 30), ("4096", 4096), ("1 KB", 1024)],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert units.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "lots", "-1G", "0", "0.1", "1e9", "G", "1GG", "nan", "inf"])
def test_what_is_no_size_is_refused(text: str) -> None:
    assert units.parse_size(text) is None


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1024, "1 KiB"), (144182, "141 KiB"), (5 << 40, "5 TiB")]
)
def test_bytes_have_three_digits(count: int, text: str) -> None:
    assert units.format_bytes(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.424, "0.42 s"), (12.34, "12.3 s"), (245.4, "4 min 05 s")])
def test_seconds(seconds: float, text: str) -> None:
    assert units.format_seconds(seconds) == text
