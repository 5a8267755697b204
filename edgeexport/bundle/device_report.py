"""Reads what a device measured over a bundle's golden vectors, and judges it by the bundle's own gates.

A report is JSON of schema edgeexport.device-parity/1, as ios_runtime's edgeexport-parity and android_runtime write it.
It holds measurements and failures, and no verdicts: those are made here. docs/coreml.md describes every field.
"""

from __future__ import annotations

import hashlib
import unicodedata
from datetime import datetime
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, Struct

from edgeexport import errors, strict_json
from edgeexport.bundle.bundle import Bundle, read_manifest
from edgeexport.bundle.gate_bounds import bounded
from edgeexport.bundle.manifest import Sha256, Text
from edgeexport.core import ParityResult, Verdict
from edgeexport.plainfile import read_plain

SCHEMA: Final = "edgeexport.device-parity/1"
MAX_BYTES = 1 << 20

Label = Annotated[str, Meta(min_length=1, max_length=200)]
Measured = Annotated[float, Meta(ge=0.0)] | Literal["NaN", "Infinity"]
"""A number, or the string that stands for one that JSON does not have."""


class Device(Struct, frozen=True, forbid_unknown_fields=True):
    """What measured: the model (MacBookPro18,3) and its system with version and build."""

    model: Label
    system: Label


class Failure(Struct, frozen=True, forbid_unknown_fields=True):
    """Why a level could not be measured: a code of ours and a sentence."""

    code: Label
    what: Text


class Metrics(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """`steps` rows of logits. `max_abs`: largest difference from what the artifact gave where it was built (L4);
    `kl`: mean divergence in nats from the original model (L5); `top1`: the share of steps where both choose alike."""

    steps: Annotated[int, Meta(ge=1, le=1 << 20)] | None = None
    max_abs: Measured | None = None
    kl: Measured | None = None
    top1: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None


class Row(Struct, frozen=True, forbid_unknown_fields=True):
    """One level on one choice of compute units. L1 has no metrics: the artifact opened. `golden` names what was
    replayed: "text" where nothing is said, a prompt with pictures or sound, or, at L1, "chat": conversations that gave
    the same text and tokens."""

    level: Literal["L1", "L4", "L5"]
    units: Label
    golden: Label | None = None
    metrics: Metrics = Metrics()
    failure: Failure | None = None


class DeviceReport(Struct, frozen=True, forbid_unknown_fields=True):
    """A whole report. `bundle` is the sha256 of the manifest, which lists the hashes of all files, and `bundle_title`
    its model, target and quantisation, for people; `component` is what ran; `date` is when, in UTC."""

    bundle: Sha256
    component: Label
    device: Device
    date: Annotated[str, Meta(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
    rows: Annotated[tuple[Row, ...], Meta(min_length=1, max_length=256)]
    schema: Literal["edgeexport.device-parity/1"]
    bundle_title: Label | None = None

    @property
    def title(self) -> str:
        """Device, system and day, for people."""
        return f"{self.device.model}, {self.device.system}, {self.date[:10]}"


JUDGED = {"L4": "max_abs", "L5": "kl"}
"""The metric that decides each level. L1 is decided by whether there was a failure."""


def read(path: Path) -> DeviceReport:
    """Raises parity-report-bad."""
    try:
        data = read_plain(path, MAX_BYTES, follow=True)
    except OSError as error:
        raise errors.parity_report_bad(path, f"it cannot be read: {error.strerror}") from error
    try:
        report = msgspec.convert(strict_json.parse(data), DeviceReport)
        datetime.fromisoformat(report.date)
    except (ValueError, OverflowError) as error:  # msgspec's ValidationError is a ValueError
        raise errors.parity_report_bad(path, str(error)) from error
    labels = [report.component, report.device.model, report.device.system, *(row.units for row in report.rows)]
    labels += [text for text in (report.bundle_title, *(row.golden for row in report.rows)) if text]
    labels += [text for row in report.rows if row.failure for text in (row.failure.code, row.failure.what)]
    for label in labels:
        if any(unicodedata.category(character).startswith("C") for character in label):
            raise errors.parity_report_bad(path, f"a text has characters that cannot be shown: {label!a}")
    return report


def judge(report: DeviceReport, bundle: Bundle, where: Path) -> list[ParityResult]:
    """The report's rows as rows of the ladder, each with its device in the note.

    Raises parity-report-of-another-bundle, parity-report-bad when a row lacks what decides its level, and
    bundle-no-component.
    """
    found = hashlib.sha256(read_manifest(bundle.path)).hexdigest()
    if report.bundle != found:
        title = f" ({report.bundle_title})" if report.bundle_title else ""
        raise errors.parity_report_of_another_bundle(where, report.bundle + title, found)
    if bundle.manifest.component(report.component) is None:
        names = [each.name for each in bundle.manifest.components]
        raise errors.bundle_no_component(bundle.path, report.component, names)
    return [_judged(report, row, bundle, where) for row in report.rows]


def _judged(report: DeviceReport, row: Row, bundle: Bundle, where: Path) -> ParityResult:
    note = f"measured on {report.title}"
    gates = msgspec.structs.asdict(bounded(bundle.manifest))
    metrics = {
        name: float(value) if isinstance(value, str) else value
        for name, value in msgspec.structs.asdict(row.metrics).items()
        if value is not None
    }
    metric = JUDGED.get(row.level)
    limit = gates[metric] if metric is not None else None
    gate = {metric: limit} if metric is not None and limit is not None else {}
    golden = row.golden or (None if metric is None else "text")
    output = f"{f'golden {golden}' if golden else 'opens'} on {row.units}"
    if row.failure is not None:
        verdict = Verdict.FAIL
        note = f"{note}; [{row.failure.code}] {row.failure.what}"
    elif metric is None:
        verdict = Verdict.PASS
    elif metric not in metrics:
        raise errors.parity_report_bad(where, f"its row {row.level} on {row.units} has neither {metric} nor a failure")
    elif limit is None:
        verdict = Verdict.AMBIGUOUS
        note = f"{note}; the bundle has no gate for {metric}"
    else:
        verdict = Verdict.PASS if metrics[metric] <= limit else Verdict.FAIL  # a NaN is never below a gate
    return ParityResult(report.component, row.level, output, metrics, gate, verdict, note)
