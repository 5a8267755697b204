"""Reads parity.json, whoever wrote it: schema edgeexport.parity/1, every number a number that can be drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from edgeexport import errors, strict_json
from edgeexport.core import ParityResult, Verdict
from edgeexport.parity.report import LIMITS, Extra

FILE = "parity.json"
MAX_BYTES = 64 << 20

Whole = Annotated[int, Meta(ge=-(2**62), le=2**62)]
Number = Whole | float | Literal["NaN", "Infinity", "-Infinity"]
"""A number, or the string that stands for one that JSON does not have."""
Count = Annotated[int, Meta(ge=0, le=2**62)]


class _Row(Struct, frozen=True):
    component: str
    level: Literal["L1", "L2", "L3", "L4", "L5"]
    output: str
    metrics: dict[str, Number]
    gate: dict[str, Number]
    verdict: Verdict
    note: str
    stand_in: bool = False


class _Layer(Struct, frozen=True):
    layer: str
    max_abs: Number
    rms_error: Number
    rms: Number


class _Weight(Struct, frozen=True):
    tensor: str
    format: str
    snr_db: Number
    zero_share: Number | UnsetType = UNSET
    kind: str | UnsetType = msgspec.field(name="class", default=UNSET)


class _Answer(Struct, frozen=True):
    prompt: str
    original: str
    artifact: str
    agree: Count
    tokens: Count
    whole: bool
    near_tie: bool


class Report(Struct, frozen=True):
    """What is read of a parity.json. `answers` are as `Extra` has them."""

    schema: Literal["edgeexport.parity/1"]
    results: tuple[_Row, ...]
    model: str = ""
    target: str = ""
    scheme: str = ""
    limits: tuple[str, ...] = ()
    drift: tuple[_Layer, ...] = ()
    weights: tuple[_Weight, ...] = ()
    answers: tuple[_Answer, ...] = ()
    sizes: dict[str, Number] = {}

    def rows(self) -> list[ParityResult]:
        """The ladder's rows; the strings that stand for NaN and infinity are numbers again."""
        return [
            ParityResult(
                row.component, row.level, row.output, _numbers(row.metrics), _numbers(row.gate), row.verdict, row.note,
                row.stand_in,
            )
            for row in self.results
        ]  # fmt: skip

    def extra(self) -> Extra:
        """The rest, but the limits that hold for every report."""
        return Extra(
            model=self.model,
            target=self.target,
            scheme=self.scheme,
            limits=[limit for limit in self.limits if limit not in LIMITS],
            drift=[_numbers(msgspec.to_builtins(row)) for row in self.drift],
            weights=[_numbers(msgspec.to_builtins(row)) for row in self.weights],
            answers=[msgspec.to_builtins(row) for row in self.answers],
            sizes=_numbers(self.sizes),
        )


def read(data: bytes, where: object) -> Report:
    """The report in these bytes. Raises: BundleError `parity-report-bad`."""
    try:
        return msgspec.convert(strict_json.parse(data), Report)
    except (ValueError, OverflowError) as error:  # msgspec's ValidationError is a ValueError
        raise errors.parity_report_bad(where, str(error)[:400]) from error


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    names = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
    return {key: names.get(value, value) if isinstance(value, str) else value for key, value in row.items()}
