"""A small part of what `make fuzz` tries: 20,000 bad files over all readers, the same ones each time."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz import fuzz
from fuzz_readers import READERS, Reader

RUNS = 20_000
TOTAL = sum(reader.share for reader in READERS)
SLOW = 20.0
"""Seconds of processor time that one input may take here: ten times what `make fuzz` allows, for slow machines."""


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_bad_files_are_refused_or_read(reader: Reader, tmp_path: Path) -> None:
    failures = [str(each) for each in fuzz([reader], RUNS * reader.share // TOTAL, 0, tmp_path, SLOW)]
    assert not failures, "\n".join(failures)


def broken_reader(data: bytes, _: Path) -> None:
    if b"\x00" in data:
        raise KeyError("a fault of ours")


def test_the_driver_finds_a_fault_and_its_seed_makes_it_again(tmp_path: Path) -> None:
    reader = Reader("faulty", lambda _: [b"some text of bytes"], broken_reader)
    for folder in ("one", "other", "again"):
        (tmp_path / folder).mkdir()
    [failure] = fuzz([reader], 500, 0, tmp_path / "one")
    assert "KeyError" in failure.what and "test_fuzz.py" in failure.what
    [again] = fuzz([reader], 1, failure.seed, tmp_path / "again")
    assert again == failure


def test_the_driver_finds_what_takes_long(tmp_path: Path) -> None:
    reader = Reader("slow", lambda _: [b"x"], lambda data, _: sum(range(3_000_000)))
    [failure] = fuzz([reader], 2, 0, tmp_path, 1e-4)
    assert "takes more than" in failure.what
