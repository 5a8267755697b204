"""Choose each matrix's format within a budget: the most that a byte more gains, step after step.

What a format loses is measured (sensitivity.py) as the KL that it alone would cost; what several lose is taken for the
sum. Each unit's formats are thinned to those on the lower hull of loss over bytes, where every step up gains less for
a byte than the one before, so that taking the best step of all units again and again is the best choice for its size.

A choice is a document, quant-plan.json: it lies in the bundle, and given back with --quant it makes the same one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from edgeexport import errors
from edgeexport.core import Format, TensorClass, Traits
from edgeexport.quant.schemes import FORMATS

FILE: Final = "quant-plan.json"
SCHEMA: Final = "edgeexport.quant-plan/1"
MAX_BYTES = 64 << 20

LINEAR = ("int4-b128", "int4-b64", "int4-b32", "int8-channel")
BLOCKS_OF_8 = "int8-b32"
"""Where the runtime multiplies by such."""
TABLE = ("int4-b32", "int8-channel")
PROBE = "int4-b32"
"""The format whose loss is measured through the whole model; the others' follow from the errors of their products."""


@dataclass(frozen=True)
class Budget:
    """What a choice keeps to: bytes of all weights, KL in nats from the original, or both."""

    size: int | None = None
    kl: float | None = None


class Option(Struct, frozen=True, forbid_unknown_fields=True):
    """One way to store a unit: the formats of its matrices by name, their bytes together, the KL in nats that they
    alone would cost, and whether they are the checkpoint's own integers."""

    formats: dict[str, str]
    bytes: int
    kl: float
    carried: bool = False


class Unit(Struct, frozen=True, forbid_unknown_fields=True):
    """Matrices that are stored alike, and the ways there are."""

    options: tuple[Option, ...]


class Chosen(Struct, frozen=True, forbid_unknown_fields=True):
    """A matrix's format in a plan, and whether its integers are the checkpoint's."""

    format: Annotated[str, Meta(min_length=1, max_length=64)]
    carried: bool = False


class Choice(Struct, frozen=True, forbid_unknown_fields=True):
    """A plan: the format of each matrix by the canonical graph's name, bytes of all weights, the KL in nats that it was
    expected to cost and the one that was asked for at most."""

    schema: str
    bytes: int
    expected_kl: float
    asked_kl: float | None
    tensors: dict[str, Chosen]


def candidates(kind: TensorClass, traits: Traits) -> tuple[Format, ...]:
    """The formats that a matrix of this class may get, but for the checkpoint's own."""
    names = (*LINEAR, *((BLOCKS_OF_8,) if traits.int8_blocks else ())) if kind == "linear" else TABLE
    return tuple(FORMATS[name] for name in names)


def choose(units: Sequence[Unit], fixed: int, budget: Budget) -> Choice:
    """The choice of least expected KL within `budget.size`, or the smallest within `budget.kl`; `fixed` are the bytes
    of all other weights. Raises: UsageError `budget-too-small`."""
    hulls = [_hull(unit.options) for unit in units]
    taken = [0] * len(units)
    size = fixed + sum(hull[0].bytes for hull in hulls)
    kl = sum(hull[0].kl for hull in hulls)
    if budget.size is not None and size > budget.size:
        raise errors.budget_too_small(f"{budget.size} bytes", f"the smallest formats need {size} bytes")
    for index, step in _steps(hulls):
        if budget.kl is not None and kl <= budget.kl:
            break
        before, after = hulls[index][step - 1], hulls[index][step]
        more = after.bytes - before.bytes
        # a unit whose step does not fit stays where it is: none of its later ones fits, for they are not smaller
        if taken[index] != step - 1 or (budget.size is not None and size + more > budget.size):
            continue
        taken[index] = step
        size += more
        kl += after.kl - before.kl
    if budget.kl is not None and kl > budget.kl:
        within = f" within {budget.size} bytes" if budget.size is not None else ""
        raise errors.budget_too_small(f"a KL of {budget.kl:g} nats{within}", f"{kl:.2g} nats is the least there is")
    tensors = {
        name: Chosen(fmt, option.carried)
        for hull, at in zip(hulls, taken, strict=True)
        for option in (hull[at],)
        for name, fmt in option.formats.items()
    }
    return Choice(SCHEMA, size, float(f"{max(kl, 0.0):.3g}"), budget.kl, dict(sorted(tensors.items())))


def _hull(options: Sequence[Option]) -> list[Option]:
    """The options on the lower hull of KL over bytes, smallest first."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda each: (each.bytes, each.kl)):
        if kept and option.kl >= kept[-1].kl:
            continue
        while len(kept) > 1 and _gain(kept[-2], kept[-1]) <= _gain(kept[-2], option):
            kept.pop()
        if kept and option.bytes == kept[-1].bytes:
            kept.pop()
        kept.append(option)
    return kept


def _gain(before: Option, after: Option) -> float:
    """Nats that a byte more gains."""
    return (before.kl - after.kl) / max(1, after.bytes - before.bytes)


def _steps(hulls: Sequence[Sequence[Option]]) -> Iterator[tuple[int, int]]:
    """(unit, option to step to), the step that gains most for a byte first."""
    steps = [
        (-_gain(hull[at - 1], hull[at]), index, at) for index, hull in enumerate(hulls) for at in range(1, len(hull))
    ]
    for _, index, at in sorted(steps):
        yield index, at


def read(path: Path) -> Choice:
    """A plan that was given back. Raises: UsageError `plan-unusable`."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise errors.plan_unusable(path, f"it has more than {MAX_BYTES >> 20} MiB")
        found = msgspec.json.decode(path.read_bytes(), type=Choice)
    except OSError as problem:
        raise errors.plan_unusable(path, problem.strerror or str(problem)) from problem
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as problem:
        raise errors.plan_unusable(path, str(problem)) from problem
    if found.schema != SCHEMA:
        raise errors.plan_unusable(path, f"it is of the schema {found.schema}, not {SCHEMA}")
    return found


def written(choice: Choice) -> bytes:
    """A plan as it lies in a bundle."""
    return msgspec.json.format(msgspec.json.encode(choice), indent=1) + b"\n"


def summary(choice: Choice) -> dict[str, int]:
    """Matrices by format, most first."""
    found: dict[str, int] = {}
    for each in choice.tensors.values():
        name = f"{each.format} carried" if each.carried else each.format
        found[name] = found.get(name, 0) + 1
    return dict(sorted(found.items(), key=lambda item: -item[1]))
