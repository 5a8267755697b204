"""Any ML package through the command line: what is in it, and what it computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlpackages import builder, program, saved

from edgeexport.cli_edge import execute

pytest.importorskip("coremltools")

X = np.arange(6, dtype=np.float16).reshape(2, 3)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    mb = builder()

    def body(x: Any) -> Any:
        return mb.add(x=mb.linear(x=x, weight=np.ones((4, 3), np.float16)), y=np.float16(1))

    return saved(program({"x": X}, body), tmp_path_factory.mktemp("foreign") / "foreign.mlpackage")


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert execute([*arguments, "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_inspect_lists_functions_and_sizes(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = printed(capsys, "inspect", str(package))
    (function,) = document["functions"]
    assert (function["name"], document["default_function"]) == ("main", "main")
    assert function["inputs"] == ["x: float16[2, 3]"]
    assert function["outputs"] == ["y0: float16[2, 4]"]
    assert function["not_known_here"] == []
    assert document["bytes"] == sum(document["files"].values()) > 100
    assert document["warnings"] == []


def test_eval_runs_a_function_and_writes_what_it_gives(
    package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "x.npz", x=X)
    document = printed(capsys, "eval", str(package), "--inputs", str(tmp_path / "x.npz"), "-o", str(tmp_path / "y.npz"))
    assert "not by Apple's runtime" in document["runtime"]
    with np.load(tmp_path / "y.npz") as outputs:
        np.testing.assert_array_equal(outputs["y0"], (X @ np.ones((3, 4))) + 1)
    assert document["outputs"][0]["max"] == 13


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04 cut"])
def test_inputs_that_are_no_npz_are_the_users_error(
    content: bytes, package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.npz").write_bytes(content)
    assert execute(["eval", str(package), "--inputs", str(tmp_path / "x.npz")]) == 2
    assert "mlpackage-bad-input" in capsys.readouterr().err


def test_a_package_that_is_none_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "none.mlpackage").mkdir()
    assert execute(["inspect", str(tmp_path / "none.mlpackage")]) == 8
    assert "mlpackage-damaged" in capsys.readouterr().err


def test_what_is_interpreted_says_so() -> None:
    from edgeexport import backends
    from edgeexport.backends import coreml_inspect

    assert backends.load_runner("coreml").RUNTIME == coreml_inspect.RUNTIME
