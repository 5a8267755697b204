"""The process that commands run artifacts in: what it dies of is said, and all else is as if there were no parent."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import damage
import pytest

from edgeexport import build

SECONDS = 120
BEGIN = """
import ctypes, os, signal, sys, time
from edgeexport import supervise
try:
    code = supervise.in_child()
except supervise.Died as died:
    print("died", died.signal)
    sys.exit(8)
if code is not None:
    sys.exit(code)
"""
"""A program that goes on in a child. What follows is the child's work."""


def program(work: str) -> list[str]:
    return [sys.executable, "-c", BEGIN + work]


def ran(work: str, given: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(program(work), input=given, capture_output=True, text=True, timeout=SECONDS, check=False)


def started(work: str) -> subprocess.Popen[str]:
    """A program that prints its child's pid first, in a session of its own."""
    work = "print(os.getpid(), flush=True)\n" + work
    return subprocess.Popen(
        program(work), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def child_of(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


def gone(pid: int) -> bool:
    """Whether the process ends, or has."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
            if sys.platform == "linux" and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGBUS", "SIGILL", "SIGFPE", "SIGKILL", "SIGTRAP"])
def test_what_the_child_dies_of_is_named(name: str) -> None:
    done = ran(f"os.kill(os.getpid(), signal.{name})")
    assert (done.returncode, done.stdout) == (8, f"died {name}\n")


def test_a_read_of_no_memory_ends_the_child_alone() -> None:
    assert ran("ctypes.string_at(0)").stdout == "died SIGSEGV\n"
    assert ran("os.abort()").stdout == "died SIGABRT\n"


@pytest.mark.parametrize("code", [0, 1, 2, 8, 130, 141, 255])
def test_the_childs_exit_code_is_the_commands(code: int) -> None:
    assert ran(f"sys.exit({code})").returncode == code
    assert ran(f"supervise.done({code}); sys.exit({code})").returncode == code


def test_what_fails_while_it_is_taken_down_changes_no_answer() -> None:
    done = ran("print('answer', flush=True); supervise.done(0); ctypes.string_at(0)")
    assert (done.returncode, done.stdout) == (0, "answer\n")


def test_standard_streams_are_the_childs() -> None:
    done = ran("print(sys.stdin.read().upper(), end=''); print('told', file=sys.stderr)", "given\n")
    assert (done.stdout, done.stderr) == ("GIVEN\n", "told\n")


def test_a_call_without_end_is_ended() -> None:
    done = ran("supervise._limit(0.5)\nwhile True: pass")
    assert (done.returncode, done.stdout) == (8, "died \n")


def test_what_lasts_outside_a_call_is_not_ended() -> None:
    work = "supervise._limit(5); supervise.end(); time.sleep(7); print('done')"
    assert ran(work).stdout == "done\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_that_ends_the_command_ends_both(number: signal.Signals) -> None:
    process = started("time.sleep(1000)")
    child = child_of(process)
    process.send_signal(number)
    assert process.wait(SECONDS) == -number and gone(child)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot be asked for it")
def test_a_killed_parent_takes_the_child_along() -> None:
    process = started("time.sleep(1000)")
    child = child_of(process)
    process.kill()
    assert gone(child)
    process.wait(SECONDS)


@pytest.mark.parametrize("to_all", [False, True])
def test_ctrl_c_reaches_the_child_once(to_all: bool) -> None:
    """From a terminal every process of the command gets it; `kill -INT` tells the parent alone."""
    work = """
for k in range(2):
    try:
        print("waiting", flush=True)
        time.sleep(5 if k else 1000)
        print("undisturbed", flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""
    process = started(work)
    child_of(process)
    assert process.stdout is not None and process.stdout.readline() == "waiting\n"
    if to_all:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGINT)
    assert process.stdout.read() == "interrupted\nwaiting\nundisturbed\n"
    assert process.wait(SECONDS) == 0


# the commands

HEAVY = ("numpy", "onnxruntime", "rich", "tokenizers", "edgeexport.core", "edgeexport.bundle")


@pytest.mark.parametrize("line", [["run", "b", "-p", "x"], ["verify", "b"], ["bench", "b"], ["parity", "b", "m"]])
def test_the_parent_has_imported_nothing_when_it_forks(line: list[str]) -> None:
    work = f"""
import sys
from edgeexport import supervise
from edgeexport.cli_edge import execute
from edgeexport.console import Console
supervise.in_child = lambda: print([each for each in {HEAVY} if each in sys.modules]) or 0
sys.exit(execute({line}, Console(supervised=True)))
"""
    done = subprocess.run([sys.executable, "-c", work], capture_output=True, text=True, timeout=SECONDS, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


@pytest.fixture(scope="module")
def bundles(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("out")
    return {target: build(str(checkpoint), target, out, parity="L4").bundle for target in damage.TARGETS}


CRASHING = """
import ctypes, sys
from edgeexport import backends
from edgeexport.cli_edge import main
class Runner:
    @staticmethod
    def open_decoder(*_, **__):
        ctypes.string_at(0)
backends.load_runner = lambda name: Runner
sys.argv = ["edgeexport", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize("line", [["verify"], ["run", "--raw", "-p", "x"], ["bench"]])
def test_a_runtime_that_crashes_is_an_error_of_ours(bundles: dict[str, Path], line: list[str]) -> None:
    command = [sys.executable, "-c", CRASHING, line[0], str(bundles["host-ort"]), *line[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 8 and "error[artifact-crashed]" in done.stderr and "SIGSEGV" in done.stderr
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=SECONDS, check=False)
    assert '"code": "artifact-crashed"' in done.stdout
    done = subprocess.run([*command, "--in-process"], capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == -signal.SIGSEGV, "asked for, and not caught"


def test_a_chat_is_the_same_with_and_without_a_child(bundles: dict[str, Path]) -> None:
    line = [sys.executable, "-m", "edgeexport", "run", str(bundles["host-ort"]), "--raw", "--max-tokens", "5", "-q"]
    apart, within = (
        subprocess.run(
            [*line, *more], input="the\nin the\n", capture_output=True, text=True, timeout=SECONDS, check=True
        )
        for more in ([], ["--in-process"])
    )
    assert apart.stdout == within.stdout and apart.stdout.count("\n") >= 2


def test_a_chat_at_a_terminal(bundles: dict[str, Path]) -> None:
    """Ctrl-C leaves the chat open, Ctrl-D ends it."""
    pid, terminal = pty.fork()
    if not pid:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the tests themselves may run where it is ignored
        os.execv(sys.executable, [sys.executable, "-m", "edgeexport", "run", str(bundles["host-ort"]), "--raw"])
    seen = b""

    def until(prompts: int) -> None:
        nonlocal seen
        end = time.monotonic() + SECONDS
        while seen.count(b"> ") < prompts and time.monotonic() < end:
            if select.select([terminal], [], [], 1)[0]:
                seen += os.read(terminal, 1 << 16)
        assert seen.count(b"> ") >= prompts, seen

    until(1)
    os.write(terminal, b"\x03")
    until(2)
    os.write(terminal, b"\x04")
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.parametrize("target", damage.TARGETS)
def test_no_damaged_artifact_ends_a_process_of_ours(bundles: dict[str, Path], target: str) -> None:
    pytest.importorskip(damage.TARGETS[target])
    found = list(damage.outcomes(bundles[target], range(12)))
    assert not [(seed, outcome) for seed, outcome in found if not outcome.good]
    assert any(outcome.code for _, outcome in found), "some damage is found"
