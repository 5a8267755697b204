"""Every error: it has an example, a caller, a text that somebody has read, and a fix."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest
from cases.errors import EXAMPLES

from edgeexport import errors
from edgeexport.console import render_finding
from edgeexport.core import Finding
from edgeexport.errors import EdgeExportError

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "edgeexport"
GOLDEN = Path(__file__).parent / "golden" / "errors"
PAGE = ROOT / "docs" / "errors.md"

DEFINED = [
    node.name
    for node in ast.parse((SOURCE / "errors.py").read_text()).body
    if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and node.name not in {"suggest", "shown"}
]
CONSTRUCTORS = sorted(set(DEFINED))


def made(name: str) -> EdgeExportError | Finding:
    return getattr(errors, name)(**EXAMPLES[name])


def findings(name: str) -> tuple[Finding, ...]:
    example = made(name)
    return example.findings if isinstance(example, EdgeExportError) else (example,)


def test_no_constructor_hides_another() -> None:
    assert [name for name, count in Counter(DEFINED).items() if count > 1] == []


def test_every_constructor_has_an_example_and_every_example_a_constructor() -> None:
    assert sorted(EXAMPLES) == CONSTRUCTORS


def test_every_golden_text_has_a_constructor(request: pytest.FixtureRequest) -> None:
    stale = {path.stem: path for path in GOLDEN.iterdir() if path.stem.replace("-", "_") not in CONSTRUCTORS}
    if request.config.getoption("--update-golden"):
        for path in stale.values():
            path.unlink()
    else:
        assert sorted(stale) == []


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_error_is_named_by_its_code_and_says_everything(name: str) -> None:
    (finding,) = findings(name)
    assert finding.code == name.replace("_", "-")
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", finding.code)
    for part in (finding.what, finding.where, finding.why, finding.fix):
        assert part.strip()
        assert not re.search(r"\{[a-z_.]+\}", part), "a brace that was meant to be filled in"
    assert "\n" not in finding.what
    assert not finding.what.endswith(".")


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_error_stops_the_build_or_is_a_remark(name: str) -> None:
    example = made(name)
    severity = findings(name)[0].severity
    if isinstance(example, EdgeExportError):
        assert severity == "error"
        assert 1 <= example.exit_code <= 8
        assert (example.exit_code == 1) == (name == "internal_error")


def callers() -> set[str]:
    """Names used as `errors.<name>` anywhere in the package, outside errors.py."""
    return {
        node.attr
        for path in SOURCE.rglob("*.py")
        if path.name != "errors.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "errors"
    }


def test_every_error_has_a_caller() -> None:
    assert sorted(set(CONSTRUCTORS) - callers()) == []


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_golden_text(name: str, request: pytest.FixtureRequest) -> None:
    text = "\n".join(render_finding(finding) for finding in findings(name)) + "\n"
    golden = GOLDEN / f"{name.replace('_', '-')}.txt"
    if request.config.getoption("--update-golden"):
        golden.write_text(text)
    assert golden.read_text() == text


def page() -> str:
    """docs/errors.md: every error by exit code, as the terminal shows it."""
    sections = [
        "# Errors\n\nEvery message edgeexport can end with, by exit code. Codes are permanent. Names and numbers are "
        "examples.\n\nThis page is written by `pytest tests/test_errors.py --update-golden`.\n"
    ]
    by_heading: dict[str, list[str]] = {}
    for name in CONSTRUCTORS:
        example = made(name)
        raised = isinstance(example, EdgeExportError)
        heading = f"Exit code {example.exit_code}: {type(example).__name__}" if raised else "Found with others"
        by_heading.setdefault(heading, []).append(name)
    for heading, names in sorted(by_heading.items()):
        sections.append(f"## {heading}\n")
        for name in names:
            text = "\n".join(render_finding(finding) for finding in findings(name))
            sections.append(f"### {name.replace('_', '-')}\n\n```\n{text}\n```\n")
    return "\n".join(sections)


def test_page_of_errors(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--update-golden"):
        PAGE.write_text(page())
    assert PAGE.read_text() == page()


def test_unknown_names_get_the_nearest_known_one() -> None:
    assert (
        errors.suggest("android-orb", ["host-ort", "android-ort"])
        == "did you mean android-ort? known: android-ort, host-ort"
    )
    assert errors.suggest("zzz", ["host-ort"]) == "known: host-ort"
    assert errors.suggest("zzz", []) == "known: none"
