"""The Swift package, as far as a computer without Swift can see: its syntax, its codes and its contract with ours."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edgeexport import errors
from edgeexport.backends import coreml
from edgeexport.bundle.manifest import SCHEMA

ROOT = Path(__file__).parent.parent / "ios_runtime"
FILES = sorted(ROOT.rglob("*.swift"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_file_is_swift(file: Path) -> None:
    tree_sitter = pytest.importorskip("tree_sitter")
    swift = pytest.importorskip("tree_sitter_swift")
    parser = tree_sitter.Parser(tree_sitter.Language(swift.language()))
    root = parser.parse(file.read_bytes()).root_node
    wrong = []
    pending = [root]
    while pending:
        node = pending.pop()
        if node.type == "ERROR" or node.is_missing:
            wrong.append(f"{file.name}:{node.start_point[0] + 1}")
        pending += node.children
    assert wrong == []


def test_the_parser_sees_mistakes() -> None:
    tree_sitter = pytest.importorskip("tree_sitter")
    swift = pytest.importorskip("tree_sitter_swift")
    parser = tree_sitter.Parser(tree_sitter.Language(swift.language()))
    assert parser.parse(b"func f( { return 1 }").root_node.has_error


def test_its_codes_are_ours() -> None:
    text = (ROOT / "Sources" / "EdgeExportBundle" / "Failure.swift").read_text()
    codes = re.findall(r'case \w+ = "([a-z-]+)"', text)
    assert len(codes) > 10
    assert [code for code in codes if not hasattr(errors, code.replace("-", "_"))] == []


def test_it_speaks_the_packages_names() -> None:
    text = "".join(file.read_text() for file in FILES)
    for name in (SCHEMA, coreml.DECODE, coreml.PREFILL, coreml.LAST, "input_ids", "position", "logits"):
        assert f'"{name}"' in text
    assert all(len(line) <= 120 for file in FILES for line in file.read_text().splitlines())
