"""What a command meets on a machine: streams that are full or closed, signals, paths of the wrong kind, full disks,
text that is none, and packages by other names than their modules'."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
import typer.core

from edgeexport import console, doctor, errors, outputs, steps
from edgeexport.cli import app
from edgeexport.cli_edge import execute
from edgeexport.core import QUOTED, Finding

PATIENCE = 120
"""Seconds that anything here may take on a busy machine; what is tested against would take many times that."""


def commands() -> Iterator[tuple[list[str], Any]]:
    """Every command, those within groups too, by what is typed to call it."""

    def walk(words: list[str], command: Any) -> Iterator[tuple[list[str], Any]]:
        if isinstance(command, typer.core.TyperGroup):
            for name, each in command.commands.items():
                yield from walk([*words, name], each)
        else:
            yield words, command

    yield from walk([], typer.main.get_command(app))


def called(words: list[str], command: Any, without: str = "") -> list[str]:
    """A command line with everything that the command cannot do without, of things that do not exist."""
    line = list(words)
    for param in command.params:
        if param.required and param.name != without:
            line += (
                ["no-such-thing"] if isinstance(param, typer.core.TyperArgument) else [param.opts[0], "no-such-thing"]
            )
    return line


COMMANDS = {" ".join(words): called(words, command) for words, command in commands()}

# streams

STREAMS = """
import json, os, sys
out, arguments = sys.argv[1], sys.argv[2:]
from edgeexport import bundle, cli_edge, cli_show  # once for all
pipe_read, pipe_write = os.pipe()
os.close(pipe_read)
full = os.open("/dev/full", os.O_WRONLY)
STATES = {
    "plain": {}, "stdout full": {1: full}, "stderr full": {2: full}, "no stdout": {1: None},
    "none": {0: None, 1: None, 2: None}, "the reader has left": {1: pipe_write},
}
for name, state in STATES.items():
    if (child := os.fork()) == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for descriptor in (1, 2):
            os.dup2(os.open(f"{out}/{name}.{descriptor}", os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
        for descriptor, place in state.items():
            if place is None:  # as the interpreter leaves it when a descriptor is closed as it starts
                os.close(descriptor)
                setattr(sys, ("stdin", "stdout", "stderr")[descriptor], None)
            else:
                os.dup2(place, descriptor)
        sys.argv = ["edgeexport", *arguments]
        cli_edge.main()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with open(f"{out}/{name}.code", "w") as file:
        file.write(str(code))
"""


@pytest.mark.parametrize("arguments", [*COMMANDS.values(), ["--help"], ["--version"]], ids=" ".join)
def test_streams_may_be_full_closed_or_left(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    subprocess.run(
        [sys.executable, "-c", STREAMS, str(tmp_path / "out"), *arguments], check=True, timeout=PATIENCE, cwd=tmp_path
    )
    codes = {path.stem: int(path.read_text()) for path in (tmp_path / "out").glob("*.code")}
    assert len(codes) == 6
    plain = codes["plain"]
    assert plain in range(9) and plain != 1
    tells = (tmp_path / "out" / "plain.1").stat().st_size > 0  # then what it tells is lost, and that is a failure
    for name in ("stdout full", "no stdout", "none"):
        assert codes[name] == (2 if tells else plain), name
    assert codes["the reader has left"] == (141 if tells else plain)
    assert codes["stderr full"] == plain
    for path in (tmp_path / "out").glob("*.[12]"):
        text = path.read_text()
        for bad in ("Traceback", "error[internal-error]", "Exception ignored", "lost sys.std"):
            assert bad not in text, (path.name, text)
    if tells:
        assert "error[stream-not-writable]" in (tmp_path / "out" / "stdout full.2").read_text()


def test_a_closed_descriptor_is_not_given_to_the_next_file(tmp_path: Path) -> None:
    """What a library prints would be written into it."""
    script = "from edgeexport import process\nprocess.own_streams()\n"
    script += f"assert open({str(tmp_path / 'a')!r}, 'w').fileno() > 2"
    command = f'exec {sys.executable} -c "$SCRIPT" <&- >&- 2>&-'
    done = subprocess.run(["sh", "-c", command], env={**os.environ, "SCRIPT": script}, timeout=PATIENCE)
    assert done.returncode == 0


# signals

HEARING = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests themselves may run where signals are ignored
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
"""
HOOK = (
    HEARING
    + """
import os, signal, sys
module, number = sys.argv[1], int(sys.argv[2])
class Hook:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            os.kill(os.getpid(), number)
sys.meta_path.insert(0, Hook())
sys.argv = ["edgeexport", "targets"]
from edgeexport.__main__ import main
main()
"""
)


@pytest.mark.parametrize("module", ["typer", "edgeexport.console", "edgeexport.cli_show", "numpy", "tomllib"])
@pytest.mark.parametrize(("number", "codes"), [(2, {130}), (15, {143, -15})])
def test_a_signal_while_modules_load(module: str, number: int, codes: set[int]) -> None:
    command = [sys.executable, "-c", HOOK, module, str(number)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode in codes, done.stdout, done.stderr) == (True, "", "")


WORK = (
    HEARING
    + """
import os, signal, sys, time, types
from pathlib import Path
import edgeexport
from edgeexport import cli_edge
from edgeexport.bundle.cache import Cache
how, number, root = sys.argv[1], int(sys.argv[2]), sys.argv[3]
def export(model, out, *, console, **_):
    def fill(folder):
        (folder / "half").write_text("x")
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        except BaseException:
            if how == "raised":
                raise
            if how == "turned":
                raise ImportError("a library could not be loaded")
    with console.progress("Working") as progress:
        Cache(Path(root)).folder("step", "a", fill)
        progress(1, 2)
    raise AssertionError("it went on")
edgeexport.pipeline = sys.modules["edgeexport.pipeline"] = types.SimpleNamespace(export=export)
sys.argv[1:] = ["export", "m", "-o", root]
cli_edge.main()
"""
)


@pytest.mark.parametrize("how", ["raised", "turned", "swallowed"])
@pytest.mark.parametrize(("number", "code"), [(2, 130), (15, 143), (1, 129)])
def test_a_signal_ends_the_work_and_leaves_nothing_half(tmp_path: Path, how: str, number: int, code: int) -> None:
    command = [sys.executable, "-c", WORK, how, str(number), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")
    assert [path.name for path in (tmp_path / "steps" / "step").iterdir()] == (["a"] if how == "swallowed" else [])


def test_a_signal_that_is_ignored_stays_so() -> None:
    script = "import signal, os; signal.signal(2, signal.SIG_IGN); from edgeexport import console, process; "
    script += (
        "process.listen(console.Console()); os.kill(os.getpid(), 2); process.listen_no_more(); os.kill(os.getpid(), 2)"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=PATIENCE).returncode == 0


HASHING = (
    HEARING
    + """
import os, signal, sys, threading, time, types
from pathlib import Path
from edgeexport.checkpoint.digest import content_digest
timer = threading.Timer(1, lambda: os.kill(os.getpid(), signal.SIGINT))
timer.start()
try:
    content_digest(types.SimpleNamespace(files=(Path(sys.argv[1]), Path(sys.argv[2])), header_digest=""))
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
)


def test_ctrl_c_is_answered_while_a_huge_file_is_hashed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(1 << 42)  # of nothing; an hour to hash
    command = [sys.executable, "-c", HASHING, str(tmp_path / "a"), str(tmp_path / "b")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.stdout, done.stderr, done.returncode) == ("interrupted\n", "", 0)


def traced(hash_weights: Any) -> Any:
    """`steps.trace` of a model with one component, whose weights are hashed by this."""
    family = SimpleNamespace(components=lambda *_: [SimpleNamespace(name="decoder", variant="")])
    checkpoint = SimpleNamespace(name="m")
    return SimpleNamespace(
        family=family, checkpoint=checkpoint, context=8, target=SimpleNamespace(shapes={}), hash_weights=hash_weights
    )


def test_hashing_ends_when_tracing_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(progress: Any) -> None:
        while True:
            progress(0, 1)
            time.sleep(0.01)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(steps, "_traced", interrupted)
    with pytest.raises(KeyboardInterrupt):
        steps.trace(traced(endless), SimpleNamespace(), console.Console(quiet=True))  # type: ignore[arg-type]


def test_what_hashing_meets_is_said_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def fails(progress: Any) -> None:
        raise errors.file_unreadable(tmp_path / "x", "Permission denied")

    uncaught: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", uncaught.append)
    monkeypatch.setattr(steps, "_traced", lambda *_: None)
    with pytest.raises(errors.CheckpointError, match="file-unreadable"):
        steps.trace(traced(fails), SimpleNamespace(), console.Console(quiet=True))  # type: ignore[arg-type]
    assert uncaught == [] and capfd.readouterr() == ("", "")


# paths

EITHER = {"build --calibrate"}
"""Options that take a file as well as a folder."""
PATHS = [
    (words, command, param)
    for words, command in commands()
    for param in command.params
    if isinstance(param, typer.core.TyperOption) and "Path" in str(param.type_descriptor.annotation)
]


@pytest.mark.parametrize(
    ("words", "command", "param"), PATHS, ids=[f"{' '.join(words)} {param.opts[0]}" for words, _, param in PATHS]
)
def test_a_path_of_the_wrong_kind_is_refused_before_the_work(
    words: list[str], command: Any, param: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model and the bundle do not exist: whoever got as far as to look would say so, with another exit code."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    line = called(words, command, without=param.name)
    refused = []
    for place in ("file", "folder"):
        code = execute([*line, param.opts[0], str(tmp_path / place)])
        said = capsys.readouterr().err
        assert "bug in edgeexport" not in said
        if code == 2 and str(tmp_path / place) in said:
            refused.append(place)
    assert len(refused) == (0 if f"{' '.join(words)} {param.opts[0]}" in EITHER else 1), refused
    if param.name in {"out", "dump"}:
        assert execute([*line, param.opts[0], str(tmp_path / "file" / "below" / "x")]) == 2
        assert "error[output-not-writable]" in capsys.readouterr().err


def test_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theirs").mkdir()
    monkeypatch.setattr(os, "access", lambda place, mode: not str(place).endswith("theirs"))
    for folder in (tmp_path / "theirs", tmp_path / "theirs" / "new" / "deep"):
        with pytest.raises(errors.UsageError, match="output-not-writable"):
            outputs.refuse_folder(folder)
    outputs.refuse_folder(tmp_path / "mine" / "new")
    with pytest.raises(errors.UsageError, match="output-not-writable"):
        outputs.refuse_file(tmp_path / "theirs" / "file")


AS_OTHERS = """
import ctypes, os, sys
if os.getuid() == 0:  # who may read and write anything, by two capabilities
    for capability in (1, 2):
        assert ctypes.CDLL(None).prctl(24, capability, 0, 0, 0) == 0
os.execv(sys.executable, [sys.executable, "-m", "edgeexport", *sys.argv[1:]])
"""


@pytest.mark.parametrize("line", [line for line in COMMANDS.values() if "no-such-thing" in line], ids=" ".join)
def test_files_that_may_not_be_read_are_said_so(line: list[str], tmp_path: Path) -> None:
    for name in ("manifest.json", "config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
        (tmp_path / name).chmod(0)
    there = [str(tmp_path) if word == "no-such-thing" else word for word in line]
    command = [sys.executable, "-c", AS_OTHERS, *there]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, stdin=subprocess.DEVNULL)
    assert done.returncode in range(2, 9), done
    assert "Traceback" not in done.stderr and "bug in edgeexport" not in done.stderr, done.stderr


def test_what_the_system_refuses_is_no_bug_of_ours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "some/file")

    monkeypatch.setattr(doctor, "report", refuse)
    assert execute(["doctor"]) == 7
    err = capsys.readouterr().err
    assert err.startswith("error[system-refused]") and "some/file" in err and "Too many open files" in err


# a full disk


@contextmanager
def files_of(limit: int) -> Iterator[None]:
    """No file may have more bytes: the system refuses what is written behind them."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_nothing_half_and_is_named(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, out = tmp_path / "cache", tmp_path / "out"
    monkeypatch.setenv("EDGEEXPORT_CACHE_DIR", str(cache))

    def run(*line: str) -> tuple[int, str, str]:
        code = execute([*line, str(checkpoint), "-o", str(out), "--json"])
        findings = json.loads(capsys.readouterr().out).get("findings") or [{"code": "", "where": ""}]
        return code, findings[0]["code"], findings[0]["where"]

    def half() -> list[Path]:
        return [path for path in (*cache.rglob("*"), *out.rglob("*")) if path.name.startswith(".")]

    build = ["build", "--target", "host-ort", "--parity", "L1"]
    for line in (build, ["export"]):
        with files_of(2000):
            code, said, where = run(*line)
        # a build asks first for the tokenizer, in a temporary folder
        assert (code, half()) == (7, []) and said in ("cache-not-writable", "system-refused"), said
        assert said != "cache-not-writable" or where.startswith(str(cache))
        assert not out.exists()
    assert run(*build)[0] == 0
    shutil.rmtree(out)
    for line in (build, ["export"]):
        with files_of(20000):
            code, said, where = run(*line)
        assert (code, said, half()) == (2, "output-not-writable", []) and where.startswith(str(out)), line
        assert not any(out.glob("*"))


# text

SURROGATES = "caf\udce9"


@pytest.mark.parametrize("option", ["--prompt", "--system"])
def test_a_prompt_that_is_no_text_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["run", "no-such-thing", option, SURROGATES]) == 2
    assert "no text in UTF-8" in capsys.readouterr().err


CHAT = """
import sys
from edgeexport import process
from edgeexport.console import Console
process.own_streams()
console = Console()
while (line := console.ask("> ")) is not None:
    line.encode("utf-8")
    console.stream(line + " ")
    console.result("\\u65e5\\u672c \\U0001f600 \\udce9")
    console.say("\\u65e5\\u672c \\U0001f600 \\udce9")
    console.table(["a"], [["\\u65e5\\u672c \\U0001f600 \\udce9"]])
    console.json({"a": "\\udce9"})
"""


@pytest.mark.parametrize(
    "setting",
    [{"LC_ALL": "C.UTF-8"}, {"LC_ALL": "C"}, {"LANG": "C"},
     {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
     {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "ascii:strict"}, {"PYTHONIOENCODING": "latin-1"},
     {"PYTHONIOENCODING": "utf-8:strict"}, {"PYTHONIOENCODING": "utf-8:surrogateescape"}],
    ids=str,
)  # fmt: skip
def test_any_text_goes_through_any_console(setting: dict[str, str]) -> None:
    base = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONIO"))}
    typed = "日本 😀\n".encode() + b"caf\xe9 \xff\xfe\n\xed\xa0\x80\nend"
    done = subprocess.run(
        [sys.executable, "-c", CHAT], input=typed, capture_output=True, env={**base, **setting}, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(b"\n") == 4 * 3 and done.stdout.splitlines()[-3].startswith(b"end ")


@pytest.mark.parametrize("name", [b"mod\xe8le", "modèle 日本 😀".encode(), b"a b\nc"])
@pytest.mark.parametrize("command", ["plan", "build"])
def test_a_checkpoint_of_any_name(
    name: bytes, command: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    try:
        shutil.copytree(checkpoint, place)
    except OSError:
        pytest.skip("this file system takes no such name")
    line = [command, str(place), "--target", "host-ort"]
    code = execute([*line, "--parity", "L1", "-o", str(tmp_path / "out")] if command == "build" else line)
    said = capsys.readouterr().err
    assert (code, said.count("error[")) in {(0, 0), (3, 1)}, said
    if code == 0 and command == "build":
        (bundle,) = (tmp_path / "out").iterdir()
        assert execute(["verify", str(bundle), "--no-golden"]) == 0


# what errors quote


def test_what_a_finding_quotes_has_an_end(capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 5_000_000
    finding = Finding("error", "c", long, long, f"begins {long} ends", long)
    assert max(map(len, (finding.what, finding.where, finding.why, finding.fix))) < QUOTED
    assert finding.why.startswith("begins") and finding.why.endswith("ends") and "5000012 characters" in finding.why
    many = errors.BundleError(*[finding] * 5000)
    assert len(str(many)) <= QUOTED and len(many.findings) == 5000
    console.Console().failure(many)
    err = capsys.readouterr().err
    assert len(err) < 200 * 5 * QUOTED and err.endswith("... and 4800 more\n")
    console.Console(as_json=True).failure(many)
    document = json.loads(capsys.readouterr().out)
    assert (len(document["findings"]), document["findings_left_out"]) == (200, 4800)


# doctor


def test_doctor_finds_every_package_of_the_bare_install() -> None:
    """By the names that pip knows them under; those that they are imported under come from them."""
    bare = doctor.requirements()[""]
    assert "pillow" in bare
    modules = doctor._modules()
    assert modules["pillow"] == ["PIL"]
    for package in bare:
        assert modules[package] and doctor._broken([package]) == [], package
    assert [finding.code for finding in doctor._broken(["no-such-package"])] == ["broken-dependency"]


def test_doctor_names_a_package_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    assert metadata.version("pillow")
    monkeypatch.setitem(sys.modules, "PIL", None)
    (finding,) = doctor._broken(["pillow"])
    assert (finding.code, finding.where) == ("broken-dependency", "pillow")
