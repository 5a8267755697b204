"""Kill builds, runs and prunes at random moments, in two containers on one cache, and see that nothing half is left.

    python benchmarks/kills.py [-k 1000] [--seed 0] [--work build/kills]

Each container has process numbers and a network of its own (unshare; without the right to it, two processes stand in,
which is said). In each, a tiny model is built for two targets, run, and the cache pruned to nothing, and every process
is ended by SIGKILL at a random moment. After every `ROUND` kills both containers rest, and this is checked:

- a build that is left alone ends well, and every byte of its bundle is that of a build that nothing disturbed;
- a run of it answers as the undisturbed bundle does;
- beside the bundle nothing is left, and in the cache nothing that was begun and not finished.

Exits with 1 where one of these does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent / "tests"
UNSHARE = ["unshare", "--pid", "--net", "--fork", "--kill-child"]
ROUND = 50
TARGETS = ("host-ort", "android-tflite")
JOBS = ("build", "build", "run", "prune")


def command(arguments: list[str]) -> tuple[int, str]:
    """One command line in this process: its exit code and what it printed."""
    from edgeexport.cli_edge import execute

    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = execute(arguments)
    return code, out.getvalue() if code == 0 else err.getvalue()


class Place:
    """Where one container works; the checkpoint and the cache are everybody's."""

    def __init__(self, work: Path, name: str) -> None:
        self.checkpoint, self.out = work / "tiny", work / name

    def bundle(self, target: str) -> Path:
        return self.out / f"tiny-{target}"

    def build(self, target: str) -> tuple[int, str]:
        line = ["build", str(self.checkpoint), "--target", target, "--parity", "L1", "-o", str(self.out)]
        return command([*line, "--force", "--quiet"])

    def run(self, target: str) -> tuple[int, str]:
        return command(["run", str(self.bundle(target)), "--raw", "-p", "ab", "--max-tokens", "4", "--quiet"])

    def tree(self, target: str) -> dict[str, str]:
        folder = self.bundle(target)
        files = (path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def prune() -> tuple[int, str]:
    from edgeexport.bundle.cache import Cache

    Cache().prune(0)
    return 0, ""


# one container


def serve(work: Path, name: str, seed: int) -> None:
    """Kill as often as each line of input asks, and answer with how many processes had ended before they could be."""
    import torch  # noqa: F401 - once, for every process that is begun here by fork
    import transformers  # noqa: F401

    place, rng = Place(work, name), random.Random(seed)
    took: dict[str, float] = {}
    tell({"number": os.getpid()})
    for line in sys.stdin:
        killed = ended = 0
        while killed < int(line):
            target, kind = rng.choice(TARGETS), rng.choice(JOBS)
            if kind == "build" and rng.random() < 0.7:
                shutil.rmtree(place.bundle(target), ignore_errors=True)
            job = {"build": lambda t=target: place.build(t), "run": lambda t=target: place.run(t), "prune": prune}[kind]
            if attempt(job, took, kind, rng):
                killed += 1
            else:
                ended += 1
        tell({"killed": killed, "ended": ended})


def attempt(job: Callable[[], Any], took: dict[str, float], kind: str, rng: random.Random) -> bool:
    """Begin a process and kill it within the time that the longest of its kind took; whether it was still there."""
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            job()
        os._exit(0)
    deadline = start + rng.uniform(0, took.get(kind, 5.0))
    while time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG)[0]:
            took[kind] = max(0.05, time.monotonic() - start)
            return False
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(ChildProcessError):  # what it began is ours now, where we are process number 1
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    return os.WIFSIGNALED(status)


def tell(answer: dict[str, Any]) -> None:
    sys.__stdout__.write(json.dumps(answer) + "\n")
    sys.__stdout__.flush()


# both


def left_over(work: Path, places: list[Place]) -> list[str]:
    """What was begun and not finished: beside bundles, and among the cache's entries."""
    bundles = {place.bundle(target) for place in places for target in TARGETS}
    beside = [path for place in places for path in place.out.iterdir() if path not in bundles]
    return [str(path) for path in (*beside, *(work / "cache" / "steps").glob("*/.*"))]


def problems(work: Path, places: list[Place], wanted: dict[str, tuple[dict[str, str], str]]) -> list[str]:
    """What does not hold while nobody works."""
    found = []
    for place in places:
        for target, (tree, answer) in wanted.items():
            if (built := place.build(target))[0] != 0:
                found.append(f"{place.out.name}: the build for {target} ended with {built}")
            elif place.tree(target) != tree:
                found.append(f"{place.out.name}: the bundle for {target} has other bytes")
            elif place.run(target) != (0, answer):
                found.append(f"{place.out.name}: the bundle for {target} answers {place.run(target)}, not {answer!r}")
    return found + [f"{path} is left over" for path in left_over(work, places)]


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill builds, runs and prunes on one cache, and see what is left.")
    parser.add_argument("-k", type=int, default=1000, help="how many kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("build/kills"))
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    work: Path = arguments.work.absolute()
    os.environ["EDGEEXPORT_CACHE_DIR"] = str(work / "cache")
    if arguments.serve:
        serve(work, arguments.serve, arguments.seed)
        return 0
    sys.path.insert(0, str(TESTS))
    from factories import with_tokenizer
    from graphs import write_checkpoint

    from edgeexport import families

    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    with_tokenizer(write_checkpoint(work / "tiny", families.find("llama").tiny))
    undisturbed = Place(work, "undisturbed")
    wanted = {}
    for target in TARGETS:
        if (built := undisturbed.build(target))[0] != 0:
            sys.exit(f"the first build failed: {built[1]}")
        wanted[target] = undisturbed.tree(target), undisturbed.run(target)[1]
    prune()

    apart = shutil.which("unshare") and subprocess.run([*UNSHARE, "true"], check=False).returncode == 0
    print("two containers" if apart else "no right to make namespaces: two processes stand in for containers")
    places = [Place(work, name) for name in ("one", "other")]
    own = [sys.executable, __file__, "--work", str(work)]
    containers = [
        subprocess.Popen(
            [*(UNSHARE if apart else []), *own, "--serve", place.out.name, "--seed", str(2 * arguments.seed + index)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for index, place in enumerate(places)
    ]  # fmt: skip
    numbers = [heard(container)["number"] for container in containers]
    if apart and numbers != [1, 1]:
        sys.exit(f"the containers are not apart: {numbers}")
    killed = ended = 0
    while killed < arguments.k:
        share = min(ROUND, arguments.k - killed)
        for container, kills in zip(containers, (share - share // 2, share // 2), strict=True):
            assert container.stdin is not None
            container.stdin.write(f"{kills}\n")
            container.stdin.flush()
        for answer in map(heard, containers):
            killed, ended = killed + answer["killed"], ended + answer["ended"]
        found = problems(work, places, wanted)
        print(f"{killed} kills ({ended} ended before): {len(found)} problems", flush=True)
        if found:
            print("\n".join(found))
            return 1
        prune()
    for container in containers:
        container.communicate()
    shutil.rmtree(work)
    return 0


def heard(container: subprocess.Popen[str]) -> dict[str, Any]:
    assert container.stdout is not None
    answer: dict[str, Any] = json.loads(container.stdout.readline())
    return answer


if __name__ == "__main__":
    sys.exit(main())
