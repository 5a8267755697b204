"""Joins a bundle's parity report with what devices measured of it, in a folder beside the bundle."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from edgeexport import errors
from edgeexport.bundle import device_report, open_bundle
from edgeexport.bundle.bundle import Bundle
from edgeexport.core import ParityResult
from edgeexport.parity import report as reports
from edgeexport.parity import report_file
from edgeexport.parity.report import Extra

PAGE = "parity.html"


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
        (out / report_file.FILE).write_bytes(reports.write_json(results, extra))
        (out / PAGE).write_bytes(reports.write_html(results, extra))
    except OSError as error:
        raise errors.output_not_writable(out, str(error)) from error
    return results


def _read(bundle: Bundle) -> tuple[list[ParityResult], Extra]:
    """The bundle's own report, found to be the one that was built."""
    name = report_file.FILE
    if name not in bundle.manifest.files:
        raise errors.bundle_file_missing(bundle.path, name)
    data = bundle.read(name, report_file.MAX_BYTES)
    if hashlib.sha256(data).hexdigest() != bundle.manifest.files[name].sha256:
        raise errors.bundle_file_changed(bundle.path, name, "its sha256 is not the one in the manifest")
    report = report_file.read(data, bundle.path / name)
    return report.rows(), report.extra()
