"""Damaged artifacts under a manifest that fits them, given to `edgeexport verify` and `edgeexport run` as a user would.

`python tests/damage.py [COUNT]` (make damage) damages so many artifacts for each runtime, 100 by default, and says what
became of them. No process of ours may die or meet an error that it has no words for.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bundles import rehash
from mutation import mutated_bytes

from edgeexport.bundle import open_bundle

TARGETS = {"host-ort": "onnxruntime", "android-tflite": "ai_edge_litert", "android-mnn": "MNN"}
"""Target, and the package of the runtime that runs its bundles here."""
COMMANDS = (["verify"], ["run", "--raw", "-p", "the in", "--max-tokens", "3"])
SECONDS = 300
TYPED = frozenset({0, 6, 7, 8})
"""Exit codes of what may become of a damaged artifact: it still works, or an error with a code."""


@dataclass(frozen=True)
class Outcome:
    """One command over one damaged bundle."""

    command: str
    code: int
    said: str

    @property
    def good(self) -> bool:
        words = self.said
        return self.code in TYPED and "internal-error" not in words and "Traceback" not in words

    @property
    def kind(self) -> str:
        """The code of the error that it ended with, or "works"."""
        _, marked, rest = self.said.partition("error[")
        return rest.partition("]")[0] if marked else "works" if self.code == 0 else f"exit {self.code}"


def damaged(bundle: Path, place: Path, seed: int) -> Path:
    """A copy of a bundle, one of whose artifact's files is damaged; its manifest says that all is as built."""
    dice = random.Random(seed)
    copy = Path(shutil.copytree(bundle, place))
    component = open_bundle(copy).component("decoder")
    graphs = [name for name in component.files if not name.endswith((".data", ".weight"))]
    name = dice.choice(graphs if dice.random() < 0.7 else component.files)  # weights change numbers, graphs the program
    data = (copy / name).read_bytes()
    for attempt in range(100):
        changed = _flipped(data, dice) if seed % 2 else mutated_bytes(data, seed * 100 + attempt)
        if changed != data:
            (copy / name).write_bytes(changed)
            break
    rehash(copy)
    return copy


def _flipped(data: bytes, dice: random.Random) -> bytes:
    """One to eight bits flipped: the size stays, which is the first thing that runtimes look at."""
    changed = bytearray(data)
    for _ in range(dice.randint(1, 8)):
        changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return bytes(changed)


def outcomes(bundle: Path, seeds: range) -> Iterator[tuple[int, Outcome]]:
    """Every command over the bundle damaged by each seed."""
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            copy = damaged(bundle, Path(folder) / "bundle", seed)
            for command in COMMANDS:
                line = [sys.executable, "-m", "edgeexport", command[0], str(copy), *command[1:]]
                done = subprocess.run(
                    line, capture_output=True, text=True, errors="replace", timeout=SECONDS, check=False
                )
                yield seed, Outcome(command[0], done.returncode, done.stderr)


def main(count: int) -> int:
    from factories import with_tokenizer
    from graphs import write_checkpoint

    from edgeexport import build, families

    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        tiny = with_tokenizer(write_checkpoint(Path(folder) / "llama", families.find("llama").tiny))
        for target in TARGETS:
            bundle = build(str(tiny), target, Path(folder) / "out").bundle
            found: Counter[str] = Counter()
            for seed, outcome in outcomes(bundle, range(count)):
                found[f"{outcome.command} {outcome.kind}"] += 1
                if not outcome.good:
                    bad += 1
                    print(f"{target}, seed {seed}, {outcome.command}: exit code {outcome.code}\n{outcome.said}")
            kinds = ", ".join(f"{kind} {number}" for kind, number in sorted(found.items()))
            print(f"{target}: {count} damaged artifacts: {kinds}", flush=True)
    print(f"{bad} without an error of ours")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 100))
