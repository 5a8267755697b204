"""The command line: exit codes, streams, one JSON document, and the chat. What it calls is faked where it is slow."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import edgeexport
from edgeexport import cli_chat, doctor, errors
from edgeexport.cli import app
from edgeexport.cli_edge import execute
from edgeexport.console import Console
from edgeexport.core import ParityResult, Verdict
from edgeexport.session.session import Session

COMMANDS = [
    "build",
    "plan",
    "export",
    "parity",
    "verify",
    "inspect",
    "eval",
    "run",
    "bench",
    "targets",
    "ops",
    "doctor",
]
PASSED = ParityResult("decoder", "L1", "signatures", {}, {}, Verdict.PASS)
FAILED = ParityResult("decoder", "L4", "logits", {"max_abs": 1.0}, {"max_abs": 1e-3}, Verdict.FAIL)


@dataclass(frozen=True)
class Built:
    bundle: Path
    plan: dict[str, Any]
    results: list[ParityResult] = field(default_factory=lambda: [PASSED])
    findings: tuple[Any, ...] = ()
    seconds: float = 2.0
    peak_rss: int = 1 << 30
    size: int = 2020
    ideal_bytes: int = 2000
    answers: tuple[Any, ...] = ()
    up_to_date: bool = False


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Stands in for edgeexport.pipeline; `calls` holds what build was called with."""
    fake: Any = ModuleType("edgeexport.pipeline")
    fake.calls = []

    def build(model: str, target: str, out: Path, **options: Any) -> Built:
        fake.calls.append((model, target, out, options))
        if target == "unknown":
            raise errors.unknown_target(target, ["host-ort"])
        return Built(out / f"{model}-{target}", {"scheme": "fp32"})

    fake.build = build
    fake.BuildResult = Built
    monkeypatch.setitem(sys.modules, "edgeexport.pipeline", fake)
    monkeypatch.setattr(edgeexport, "pipeline", fake, raising=False)
    return fake


def documents(text: str) -> Any:
    """The one JSON document in this text; more or fewer are an error."""
    return json.loads(text)


def test_the_commands_are_those_of_the_manual() -> None:
    assert [command.callback.__name__ for command in app.registered_commands if command.callback] == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_and_speaks_json(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"Usage: edgeexport {command}" in text
    for option in ("--json", "--quiet", "--verbose"):
        assert option in text


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute([]) == 0
    assert "Exit codes:" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["--version"]) == 0
    assert capsys.readouterr().out == f"edgeexport {edgeexport.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        (["nope"], "edgeexport"),
        (["build"], "edgeexport build"),
        (["build", "m", "--target", "t", "--parity", "L9"], "edgeexport build"),
        (["build", "m", "--target", "t", "--context", "0"], "edgeexport build"),
        (["run", "b", "--nope"], "edgeexport run"),
    ],
)
def test_a_bad_command_line_is_a_finding(arguments: list[str], place: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error[bad-command-line]")
    assert f"  where {place}\n" in err
    assert execute([*arguments, "--json"]) == 2
    out, err = capsys.readouterr()
    assert err == ""
    assert documents(out)["error"]["code"] == "bad-command-line"


def test_build_passes_its_options_on(pipeline: Any, capsys: pytest.CaptureFixture[str]) -> None:
    line = "build m --target a -t b --quant fp32 --context 64 --parity L3 --max-rss 1.5G --samples s --dump d"
    line += " --calibrate t --calibrate-method search --max-size 4.5G --max-kl 0.1 --for-device d"
    line += " --force -o o --json"
    assert execute(line.split()) == 0
    (model, target, out, options), second = pipeline.calls
    assert (model, target, out, second[1]) == ("m", "a", Path("o"), "b")
    assert isinstance(options.pop("console"), Console)
    assert options == {
        "quant": "fp32",
        "max_size": 9 << 29,
        "max_kl": 0.1,
        "for_device": "d",
        "context": 64,
        "parity": "L3",
        "max_rss": 3 << 29,
        "samples": Path("s"),
        "calibrate": Path("t"),
        "calibrate_method": "search",
        "device": "cpu",
        "dump": Path("d"),
        "force": True,
    }
    document = documents(capsys.readouterr().out)
    assert [built["bundle"] for built in document["builds"]] == ["o/m-a", "o/m-b"]
    assert document["builds"][0]["verdict"] == "PASS"


def test_build_ends_with_a_summary(pipeline: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["build", "m", "--target", "a"]) == 0
    assert pipeline.calls[0][3]["parity"] == "L5"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "level"
    assert lines[-1] == ("dist/m-a  built for a: 1.97 KiB (1.010 of ideal), 2.00 s, peak memory 1 GiB, parity PASS")


def test_a_target_that_fails_does_not_stop_the_others(pipeline: Any, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["build", "m", "-t", "unknown", "-t", "a", "-t", "unknown"]
    assert execute([*line, "--json"]) == 2
    document = documents(capsys.readouterr().out)
    assert [built["target"] for built in document["builds"]] == ["a"]
    assert [finding["code"] for finding in document["findings"]] == ["unknown-target"]
    assert execute(line) == 2
    out, err = capsys.readouterr()
    assert "built for a" in out
    assert err.count("error[unknown-target]") == 1


def test_a_size_that_is_none_is_refused_before_anything_runs(pipeline: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["build", "m", "-t", "a", "--max-rss", "lots"]) == 2
    assert "error[bad-size]" in capsys.readouterr().err
    assert pipeline.calls == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UsageError, 2),
        (errors.CheckpointError, 3),
        (errors.ExportError, 4),
        (errors.LoweringError, 5),
        (errors.ParityError, 6),
        (errors.ToolError, 7),
        (errors.BundleError, 8),
    ],
)
def test_every_failure_has_its_exit_code(
    pipeline: Any, error: type[errors.EdgeExportError], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    finding = errors.unknown_target("x", []).findings[0]

    def parity(*_: Any, **__: Any) -> None:
        raise error(finding)

    pipeline.parity = parity
    assert execute(["parity", "bundle", "model"]) == code
    assert capsys.readouterr().err.startswith("error[unknown-target]")
    assert execute(["parity", "bundle", "model", "--json"]) == code
    assert documents(capsys.readouterr().out)["error"]["exit_code"] == code


def test_parity_that_fails_shows_its_rows_and_ends_with_6(pipeline: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline.parity = lambda *_, **__: [PASSED, FAILED]
    assert execute(["parity", "bundle", "model", "--json"]) == 6
    document = documents(capsys.readouterr().out)
    assert (document["verdict"], len(document["results"])) == ("FAIL", 2)
    pipeline.parity = lambda *_, **__: [PASSED]
    assert execute(["parity", "bundle", "model"]) == 0
    assert "parity PASS" in capsys.readouterr().out
    pipeline.parity = lambda *_, **__: [ParityResult("decoder", "L4", "-", {}, {}, Verdict.NOT_RUN, "no GPU")]
    assert execute(["parity", "bundle", "model"]) == 9, "neither passed nor failed"


def raises(error: BaseException) -> Callable[..., None]:
    def call(*_: Any, **__: Any) -> None:
        raise error

    return call


def test_a_bug_of_ours_is_one_finding_and_a_traceback_only_on_request(
    pipeline: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.export = raises(KeyError("logits"))
    assert execute(["export", "m"]) == 1
    out, err = capsys.readouterr()
    assert err.startswith("error[internal-error]: this is a bug in edgeexport\n")
    assert "Traceback" not in out + err
    assert execute(["export", "m", "-v"]) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert execute(["export", "m", "-vv"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_is_quiet(pipeline: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline.export = raises(KeyboardInterrupt())
    assert execute(["export", "m"]) == 130
    assert capsys.readouterr() == ("", "")


def test_a_missing_package_names_its_extra(
    pipeline: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "requirements", lambda: {"": ["numpy"], "build": ["torch", "onnx-ir"]})
    for module, code in (("torch.nn", "missing-package"), ("onnx_ir", "missing-package"), ("ours", "internal-error")):
        pipeline.export = raises(ModuleNotFoundError(f"No module named {module!r}", name=module))
        assert execute(["export", "m"]) == (7 if code == "missing-package" else 1)
        assert f"error[{code}]" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "edgeexport", "targets"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait() == 141


def test_targets_and_ops_list_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["targets"]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[0].split() == ["target", "title", "backend", "artifact", "scheme", "context"]
    assert execute(["targets", "--json"]) == 0
    assert {"host-ort", "android-ort"} <= {target["name"] for target in documents(capsys.readouterr().out)["targets"]}
    assert execute(["ops", "--json"]) == 0
    rows = documents(capsys.readouterr().out)["ops"]
    assert {"backend", "op", "kind", "note", "fix"} == set(rows[0])
    assert execute(["ops", "--backend", "onnxruntime"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(
        [row for row in rows if row["backend"] == "onnxruntime"]
    )
    assert execute(["ops", "--backend", "onnx"]) == 2
    assert "did you mean onnxruntime?" in capsys.readouterr().err


def test_plan_prints_findings_and_ends_with_their_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from test_plan import SMALL, checkpoint

    folder = str(checkpoint(tmp_path / "small", SMALL))
    assert execute(["plan", folder, "--target", "android-ort", "--target", "host-ort"]) == 0
    out = capsys.readouterr().out
    assert "Galaxy S23" in out
    assert "this machine" in out
    assert execute(["plan", folder, "--target", "android-ort", "--context", "9999", "--json"]) == 2
    assert documents(capsys.readouterr().out)["plans"][0]["findings"][0]["code"] == "context-too-long"
    assert execute(["plan", folder, "--target", "android-ort", "--context", "9999"]) == 2
    assert "error[context-too-long]" in capsys.readouterr().err


def test_a_folder_that_is_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("verify", "inspect", "run", "bench"):
        assert execute([command, str(tmp_path)]) == 8
        assert "error[bundle-not-found]" in capsys.readouterr().err


# doctor


def test_doctor_lists_packages_by_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["numpy>=2", "no-such-thing-here==1; extra == 'build'", 'torch; python_version > "3" and extra == "build"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: wanted)
    assert doctor.requirements() == {"": ["numpy"], "build": ["no-such-thing-here", "torch"]}
    assert (doctor.extra_of("torch.nn"), doctor.extra_of("no_such_thing_here"), doctor.extra_of("numpy")) == (
        "build",
        "build",
        None,
    )
    assert execute(["doctor", "--json"]) == 0
    report = documents(capsys.readouterr().out)
    assert report["packages"]["build"]["no-such-thing-here"] is None
    assert report["packages"][""]["numpy"] == np.__version__
    assert report["memory"]["total"] > 0
    assert execute(["doctor"]) == 0
    assert "pip install 'edgeexport[build]'" in capsys.readouterr().out


def test_doctor_fails_only_when_the_bare_install_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "requirements", lambda: {"": ["numpy", "no_such_thing_here"]})
    assert execute(["doctor"]) == 7
    assert "error[broken-dependency]: the package no_such_thing_here cannot be loaded" in capsys.readouterr().err


# run


class Counting:
    """A decoder whose likeliest next token is the last one plus one; `fed` holds what it was given."""

    context = 40
    vocab = 300
    runtime_seconds = 0.0

    def __init__(self) -> None:
        self.fed: list[tuple[int, str]] = []
        self.interrupt_at: int | None = None

    def step(self, tokens: Any, position: int, rope: Any = None) -> Any:
        if self.interrupt_at is not None and position >= self.interrupt_at:
            self.interrupt_at = None
            raise KeyboardInterrupt
        self.fed.append((position, "".join(map(chr, tokens))))
        logits = np.zeros(self.vocab, np.float32)
        logits[(int(tokens[-1]) + 1) % self.vocab] = 1
        return logits

    def close(self) -> None: ...


class Letters:
    """A tokenizer whose tokens are characters."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return ([1] if add_special_tokens else []) + [ord(character) for character in text]

    def stream(self) -> Letters:
        return self

    def push(self, token: int) -> str:
        return chr(token)

    def flush(self) -> str:
        return ""


class Template:
    def warm(self) -> None: ...

    def render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        return "".join(f"<{message['role'][0]}{message['content']}>" for message in messages) + "0"


class FakeBundle:
    path = Path("dist/m")
    stop_ids = (ord("4"),)
    stand_in = ""

    def __init__(self, runner: Counting) -> None:
        self.runner = runner

    def session(self, threads: int | None = None) -> Session:
        return Session(self.runner)

    def tokenizer(self) -> Letters:
        return Letters()

    def chat_template(self) -> Template:
        return Template()


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counting]:
    counting = Counting()
    monkeypatch.setattr(cli_chat, "open_bundle", lambda path: FakeBundle(counting))
    yield counting


def chat(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """What a person types; the input ends after it."""
    left = iter(lines)
    monkeypatch.setattr(Console, "ask", lambda self, prompt: next(left, None))


def test_one_prompt_goes_through_the_template(runner: Counting, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["run", "dist/m", "--prompt", "hi", "--system", "be"]) == 0
    out, err = capsys.readouterr()
    assert out == "123\n"
    assert runner.fed[0] == (0, "<sbe><uhi>0")
    assert "(stop)" in err


def test_raw_continues_the_text(runner: Counting, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["run", "dist/m", "--prompt", "a", "--raw", "--max-tokens", "3", "-q"]) == 0
    assert capsys.readouterr() == ("bcd\n", "")
    assert runner.fed == [(0, "\x01a"), (2, "b"), (3, "c")]


def test_one_prompt_as_json(runner: Counting, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["run", "dist/m", "--prompt", "a", "--raw", "--json"]) == 0
    document = documents(capsys.readouterr().out)
    tokens = list(range(ord("b"), ord("a") + 40 - 2 + 2))
    assert document["prompt_token_ids"] == [1, ord("a")]
    assert document["token_ids"] == tokens
    assert document["text"] == "".join(map(chr, tokens))
    assert document["finish_reason"] == "context"
    timings = document["timings"]
    assert timings["first_token_seconds"] >= 0
    assert timings["decode_tokens_per_second"] == pytest.approx((len(tokens) - 1) / timings["decode_seconds"])


def test_a_chat_is_no_json_document(runner: Counting, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["run", "dist/m", "--json"]) == 2
    assert documents(capsys.readouterr().out)["error"]["code"] == "json-needs-prompt"


def test_a_chat_feeds_only_what_is_new(
    runner: Counting, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat(monkeypatch, "hi", "  ", "yo")
    assert execute(["run", "dist/m"]) == 0
    assert capsys.readouterr().out == "123\n123\n"
    first, second = "<uhi>0", "<uhi><a123><uyo>0"
    prompts = [fed for fed in runner.fed if len(fed[1]) > 1]
    assert prompts[0] == (0, first)
    assert prompts[1] == (5, second[5:])  # "<uhi>" is shared, its "0" is not


def test_text_that_the_cache_holds_is_fed_again_from_where_it_must(
    runner: Counting, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat(monkeypatch, "a", "a", "abcd")
    assert execute(["run", "dist/m", "--raw", "--max-tokens", "2"]) == 0
    assert capsys.readouterr().out == "bc\nbc\nef\n"
    # the last token of an answer is in nobody's cache: of "abcd" only "ab" is shared
    assert runner.fed == [(0, "\x01a"), (2, "b"), (1, "a"), (2, "b"), (3, "cd"), (5, "e")]


def test_ctrl_c_ends_an_answer_and_not_the_chat(
    runner: Counting, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat(monkeypatch, "hi", "yo")
    runner.interrupt_at = 7
    assert execute(["run", "dist/m"]) == 0
    out, err = capsys.readouterr()
    assert out == "12\n123\n"
    assert "(interrupted)" in err
    assert [fed for fed in runner.fed if len(fed[1]) > 1][1] == (5, "<a12><uyo>0")


def test_ctrl_c_ends_a_single_answer_with_130(runner: Counting) -> None:
    runner.interrupt_at = 7
    assert execute(["run", "dist/m", "--prompt", "hi"]) == 130


def test_a_full_context_is_said_so(
    runner: Counting, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat(monkeypatch, "x" * 50)
    assert execute(["run", "dist/m"]) == errors.context_full(0, 1, 1).exit_code
    assert "error[context-full]" in capsys.readouterr().err


def test_piped_lines_are_a_chat(runner: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\nlast"))
    console = Console()
    assert [console.ask("> ") for _ in range(4)] == ["one", "", "last", None]
