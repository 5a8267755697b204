"""Joins a bundle's parity report with what devices measured of it, in a folder beside the bundle."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from edgeexport import errors, strict_json
from edgeexport.bundle import device_report, open_bundle
from edgeexport.bundle.bundle import Bundle
from edgeexport.core import ParityResult, Verdict
from edgeexport.parity import report as reports
from edgeexport.parity.report import Extra

REPORT, PAGE = "parity.json", "parity.html"
MAX_BYTES = 64 << 20

Number = float | Literal["NaN", "Infinity", "-Infinity"]


class _Row(Struct):
    component: str
    level: Literal["L1", "L2", "L3", "L4", "L5"]
    output: str
    metrics: dict[str, int | Number]
    gate: dict[str, int | Number]
    verdict: Verdict
    note: str


class _Layer(Struct):
    layer: str
    max_abs: Number
    rms_error: Number
    rms: Number


class _Weight(Struct):
    tensor: str
    format: str
    snr_db: Number


class _Report(Struct):
    """What is read of a bundle's parity.json."""

    schema: Literal["edgeexport.parity/1"]
    results: list[_Row]
    model: str = ""
    target: str = ""
    scheme: str = ""
    limits: list[str] = []
    drift: list[_Layer] = []
    weights: list[_Weight] = []
    sizes: dict[str, int | Number] = {}


def merge(folder: Path, files: Sequence[Path], out: Path) -> list[ParityResult]:
    """Write OUT/parity.json and OUT/parity.html: the bundle's rows, then those of every device report. The bundle
    is not changed. Gives all rows.

    Raises what opening the bundle raises, bundle-file-changed, parity-report-bad, parity-report-of-another-bundle,
    output-exists where OUT is inside the bundle, output-not-writable.
    """
    bundle = open_bundle(folder)
    if out.resolve().is_relative_to(folder.resolve()):
        raise errors.output_exists(out, "it is in the bundle, whose files are listed with their hashes")
    results, extra = _read(bundle)
    devices = []
    for file in files:
        found = device_report.read(file)
        results += device_report.judge(found, bundle, file)
        devices.append({"model": found.device.model, "system": found.device.system, "date": found.date})
    extra["devices"] = devices
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / REPORT).write_bytes(reports.write_json(results, extra))
        (out / PAGE).write_bytes(reports.write_html(results, extra))
    except OSError as error:
        raise errors.output_not_writable(out, str(error)) from error
    return results


def _read(bundle: Bundle) -> tuple[list[ParityResult], Extra]:
    """The bundle's own report, found to be the one that was built."""
    place = bundle.path / REPORT
    if REPORT not in bundle.manifest.files:
        raise errors.bundle_file_missing(bundle.path, REPORT)
    data = bundle.read(REPORT, MAX_BYTES)
    if hashlib.sha256(data).hexdigest() != bundle.manifest.files[REPORT].sha256:
        raise errors.bundle_file_changed(bundle.path, REPORT, "its sha256 is not the one in the manifest")
    try:
        document = strict_json.parse(data)
        checked = msgspec.convert(document, _Report)
    except (ValueError, OverflowError) as error:
        raise errors.parity_report_bad(place, str(error)) from error
    known = Extra(
        model=checked.model,
        target=checked.target,
        scheme=checked.scheme,
        limits=[limit for limit in checked.limits if limit not in reports.LIMITS],
        drift=[_numbers(row) for row in document.get("drift", ())],
        weights=[_numbers(row) for row in document.get("weights", ())],
        sizes=_numbers(document.get("sizes", {})),
    )
    return reports.read_results(document), known


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    """The strings that stand for NaN and infinity as numbers again."""
    names = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
    return {key: names.get(value, value) if isinstance(value, str) else value for key, value in row.items()}
