"""Break files of every kind that is read, and read them: only a typed error may come out, soon, in little memory.

    python tests/fuzz.py --runs 1000000 [--seed N] [--only READER]

prints each failure with the command that makes it again, and ends with 1 if there was one.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzz_readers import READERS, Reader, broken

from edgeexport.errors import EdgeExportError

SECONDS = 2.0
"""Processor time that one input may take; on a machine that is slow, set EDGEEXPORT_FUZZ_SECONDS."""
MEMORY = 1 << 30
"""By which one input may raise the process's peak."""
SHOWN = 20
"""Failures of one reader that are told apart by where they happened."""


@dataclass(frozen=True)
class Failure:
    """What an input did to a reader."""

    reader: str
    seed: int
    what: str

    def __str__(self) -> str:
        return f'{self.reader}: {self.what}\n    make fuzz ONLY="{self.reader}" SEED={self.seed} RUNS=1'


def fuzz(readers: Sequence[Reader], runs: int, seed: int, folder: Path, seconds: float = SECONDS) -> Iterator[Failure]:
    """Give so many inputs to the readers, by their shares; input i of a reader has the seed `seed` + i. Yields one
    failure for each place where something else than a typed error came from."""
    total = sum(reader.share for reader in readers)
    for reader in readers:
        place = folder / reader.name.replace(" ", "-").replace("'", "")
        place.mkdir()
        corpus = reader.seeds(place)
        try_once(reader, corpus, seed, place)  # what is imported and traced at the first call is not the input's doing
        seen: set[str] = set()
        for index in range(max(1, round(runs * reader.share / total))):
            what = try_once(reader, corpus, seed + index, place, seconds)
            if what is not None and what not in seen and len(seen) < SHOWN:
                seen.add(what)
                yield Failure(reader.name, seed + index, what)


def try_once(reader: Reader, corpus: Sequence[Any], seed: int, place: Path, seconds: float | None = None) -> str | None:
    """What is wrong with how a reader takes the input of this seed, or None."""
    data = broken(reader, corpus, seed)
    began, before = time.process_time(), peak()
    problem: str | None = None
    try:
        reader.read(data, place)
    except EdgeExportError as error:
        if error.exit_code == 1:
            problem = f"internal error: {error}"[:200]
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 - a Rust panic is one, and whatever it is, it is a failure
        problem = described(error)
    spent, grown = time.process_time() - began, peak() - before
    if problem is None and seconds is not None and spent > seconds:
        problem = f"it takes more than {seconds:g} s"
    if problem is None and grown > MEMORY:
        problem = f"it takes more than {MEMORY >> 20} MiB"
    return problem


def described(error: BaseException) -> str:
    """An exception by its type and the last place of ours that it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if f"edgeexport{os.sep}" in frame.filename] or list(frames)
    place = Path(ours[-1].filename)
    return f"{type(error).__name__} at {place.parent.name}/{place.name}:{ours[-1].lineno}"


def peak() -> int:
    """Largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="one reader by its name")
    given = parser.parse_args()
    chosen = [reader for reader in READERS if given.only in ("", reader.name)]
    if not chosen:
        parser.error(f"there is no reader of this name; there are {', '.join(reader.name for reader in READERS)}")
    seconds = float(os.environ.get("EDGEEXPORT_FUZZ_SECONDS", SECONDS))
    count = 0
    with tempfile.TemporaryDirectory() as folder, quiet():
        os.environ.setdefault("EDGEEXPORT_CACHE_DIR", str(Path(folder) / "cache"))
        for reader in chosen:
            runs = max(1, round(given.runs * reader.share / sum(each.share for each in chosen)))
            began = time.monotonic()
            for failure in fuzz([reader], runs, given.seed, Path(folder), seconds):
                count += 1
                print(failure, flush=True)
            print(f"{reader.name}: {runs} inputs in {time.monotonic() - began:.1f} s", flush=True)
    print(f"{count} failures")
    return 1 if count else 0


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what libraries say about files that they do not like."""
    import logging
    import warnings

    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


if __name__ == "__main__":
    sys.exit(main())
