"""Checks a bundle: every byte against the manifest, then the golden vectors against the artifact itself."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgeexport import errors
from edgeexport.bundle import manifest as manifests
from edgeexport.bundle.bundle import Bundle, open_listed, read_manifest
from edgeexport.bundle.files import is_companion, sha256_of_open, walk
from edgeexport.bundle.golden import Comparison, replay
from edgeexport.bundle.manifest import DIGEST_FILE, FILE, FileEntry, Manifest
from edgeexport.core import Finding, Progress, Verdict, no_progress
from edgeexport.plainfile import NotPlain, located, unsafe_kind


@dataclass(frozen=True)
class VerifyReport:
    """What was found: `findings` are what is wrong, `remarks` what was not checked and need not be. `golden` is NOT_RUN
    with its reason in `note` when the vectors were not replayed; when they were, `note` says what replayed them where
    it is not the runtime that the bundle is for."""

    findings: tuple[Finding, ...]
    files: int
    bytes: int
    golden: Verdict
    note: str
    comparison: Comparison | None = None
    remarks: tuple[Finding, ...] = ()

    @property
    def proof(self) -> str:
        """What this shows and what it does not, in a sentence."""
        computes = ", and the artifact computes its golden vectors" if self.golden is Verdict.PASS else ""
        return f"no signature: the files are those that the manifest lists{computes}; who made them is not proven"

    @property
    def ok(self) -> bool:
        """True when nothing is wrong. Golden vectors that were not replayed are not wrong; see `golden`."""
        return not self.findings

    def raise_if_bad(self) -> None:
        """Raise all findings as one BundleError, if there are any."""
        if self.findings:
            raise errors.BundleError(*self.findings)


def verify(
    folder: Path | str, *, golden: bool = True, threads: int | None = None, progress: Progress = no_progress
) -> VerifyReport:
    """Check a bundle's files and, with `golden`, what its decoder computes. `progress` counts hashed bytes.

    Problems are collected, not raised, except that a folder without a readable manifest raises: bundle-not-found,
    bundle-bad-manifest, bundle-too-new, bundle-unsafe-path. The golden vectors are only replayed when every file is
    as it was built.
    """
    folder = Path(folder)
    data = read_manifest(folder)
    manifest = manifests.from_json(data, folder / FILE)
    seen = _manifest_findings(folder, data) + _file_findings(folder, manifest, progress)
    findings = [each for each in seen if each.severity == "error"]
    remarks = tuple(each for each in seen if each.severity != "error")
    total = sum(entry.size for entry in manifest.files.values())

    def report(verdict: Verdict, note: str, comparison: Comparison | None = None) -> VerifyReport:
        return VerifyReport(tuple(findings), len(manifest.files), total, verdict, note, comparison, remarks)

    if findings:
        return report(Verdict.NOT_RUN, "the files are not those that were built")
    if manifest.golden.file is None:
        return report(Verdict.NOT_RUN, manifest.golden.not_run)
    if not golden:
        return report(Verdict.NOT_RUN, "not asked for")
    bundle = Bundle(folder, manifest)
    try:
        comparison = replay(bundle, threads)
    except errors.EdgeExportError as error:
        findings += error.findings
        return report(Verdict.FAIL, error.findings[0].what)
    return report(Verdict.PASS, bundle.stand_in, comparison)


def _manifest_findings(folder: Path, data: bytes) -> list[Finding]:
    """The manifest against the digest beside it."""
    expected = f"{hashlib.sha256(data).hexdigest()}\n".encode("ascii")
    entry = FileEntry(len(expected), hashlib.sha256(expected).hexdigest())
    return _one_file_findings(folder, DIGEST_FILE, entry, lambda count: None)


def _file_findings(folder: Path, manifest: Manifest, progress: Progress) -> list[Finding]:
    """Every file against the manifest, and the folder against both."""
    total = sum(entry.size for entry in manifest.files.values())
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    findings: list[Finding] = []
    for name, entry in manifest.files.items():
        findings += _one_file_findings(folder, name, entry, on_bytes)
    known = {FILE, DIGEST_FILE, *manifest.files}
    try:
        unknown = [(name, _kind(folder, name, its.st_mode)) for name, its in walk(folder) if name not in known]
    except OSError as error:
        return [*findings, *errors.bundle_unsafe_path(folder, ".", f"a folder cannot be read: {error}").findings]
    for name, kind in unknown:
        if kind is not None:
            findings += errors.bundle_unsafe_path(folder, name, kind).findings
        elif is_companion(name):
            findings.append(errors.bundle_companion(folder, name))
        else:
            findings += errors.bundle_file_unlisted(folder, name).findings
    return findings


def _kind(folder: Path, name: str, mode: int) -> str | None:
    """What is wrong with the kind of an entry that is not listed, or None."""
    if not stat.S_ISLNK(mode):
        return unsafe_kind(mode)
    try:
        return unsafe_kind(located(folder, name).stat().st_mode)
    except NotPlain as error:
        return error.problem


def _one_file_findings(folder: Path, name: str, entry: FileEntry, on_bytes: Callable[[int], None]) -> list[Finding]:
    try:
        with open_listed(folder, name, entry) as file:
            if sha256_of_open(file, on_bytes) != entry.sha256:
                raise errors.bundle_file_changed(folder, name, "its sha256 is not the one in the manifest")
    except OSError as error:
        return list(errors.bundle_file_changed(folder, name, f"it cannot be read: {error.strerror}").findings)
    except errors.BundleError as error:
        return list(error.findings)
    return []
