"""Looks into any ML package, whoever wrote it, and runs a function of it over arrays from a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from edgeexport import errors
from edgeexport.backends.coreml_interpreter import OPS, STATE_OPS, Interpreter
from edgeexport.backends.coreml_lints import unsafe
from edgeexport.backends.coreml_mil import Malformed, type_of
from edgeexport.backends.coreml_package import Package
from edgeexport.backends.foreign import described, foreign
from edgeexport.core import Array
from edgeexport.plainfile import open_plain

SUFFIX = ".mlpackage"
RUNTIME = "interpreted on this computer, not by Apple's runtime"
MOST_VALUES = 8
"""Numbers of an output that are shown."""


def describe(path: Path) -> dict[str, Any]:
    """Functions, operations and sizes of a package, in JSON's own types. No weight is read.

    Raises: BundleError `mlpackage-damaged`.
    """
    with foreign(lambda problem: errors.mlpackage_damaged(path, problem)):
        return _described(path)


def _described(path: Path) -> dict[str, Any]:
    package = Package(path)
    files = {each.relative_to(path).as_posix(): each.stat().st_size for each in path.rglob("*") if each.is_file()}
    return {
        "path": str(path),
        "specification": int(package.model.specificationVersion),
        "bytes": sum(files.values()),
        "files": dict(sorted(files.items())),
        "default_function": package.default_function,
        "functions": [_function(package, name) for name in sorted(package.functions)],
        "warnings": [f"{found.what}: {found.where}: {found.why}" for found in unsafe(package.model)],
    }


def _function(package: Package, name: str) -> dict[str, Any]:
    block = package.block(name)
    counts = Counter(str(each.type) for each in block.operations)
    unknown = sorted(counts.keys() - OPS.keys() - {"const", *STATE_OPS})
    try:
        given = [(str(each.name), type_of(each.type)) for each in package.functions[name].inputs]
        made = {str(value.name): value.type for each in block.operations for value in each.outputs}
        outputs = [f"{each}: {type_of(made[each])}" for each in block.outputs if each in made]
    except Malformed as problem:
        raise package.damaged(f"function {name!r}: {problem}") from problem
    return {
        "name": name,
        "inputs": [f"{each}: {kind}" for each, kind in given if not kind.state],
        "states": _joined(f"{each}: {kind}" for each, kind in given if kind.state),
        "outputs": outputs,
        "operations": len(block.operations) - counts["const"],
        "most": ", ".join(f"{op} {count}" for op, count in counts.most_common(6) if op != "const"),
        "not_known_here": unknown,
    }


def _joined(lines: Iterable[str]) -> list[str]:
    """States are alike in all layers: the first and the last, and how many."""
    found = list(lines)
    return found if len(found) <= 2 else [f"{len(found)} states", found[0], "..", found[-1]]


def evaluate(path: Path, inputs: Path, function: str = "", out: Path | None = None) -> dict[str, Any]:
    """Run a function of a package once, its states all zero; write its outputs into an .npz, if `out` says so.

    Raises: UsageError `mlpackage-bad-input`, `output-not-writable`; BundleError as the interpreter does.
    """
    with foreign(lambda problem: errors.mlpackage_damaged(path, problem)):
        program = Interpreter(path)
        name = function or program.package.default_function
        given = _arrays(path, inputs)
        outputs = program.run(given, name=name)
    if out is not None:
        try:
            with out.open("wb") as file:
                np.savez(file, allow_pickle=False, **outputs)
        except OSError as problem:
            raise errors.output_not_writable(out, str(problem)) from problem
    return {
        "path": str(path),
        "runtime": RUNTIME,
        "function": name,
        "outputs": [_summary(each, array) for each, array in outputs.items()],
    }


def _arrays(package: Path, inputs: Path) -> dict[str, Array]:
    """The arrays of an .npz, whole numbers as int32. Nothing in it is unpickled."""
    try:
        with open_plain(inputs, follow=True) as file, np.load(file, allow_pickle=False) as held:
            found = {name: held[name] for name in held.files}
    except Exception as problem:  # numpy's readers of .npz fail over a damaged one with whatever they run into
        why = f"it cannot be read as .npz: {described(problem)}"
        raise errors.mlpackage_bad_input(package, str(inputs), why) from problem
    return {name: array.astype(np.int32) if array.dtype.kind in "iu" else array for name, array in found.items()}


def _summary(name: str, array: Array) -> dict[str, Any]:
    flat = array.reshape(-1)
    return {
        "name": name,
        "shape": list(array.shape),
        "dtype": str(array.dtype),
        "finite": bool(np.isfinite(flat).all()),
        "min": float(flat.min()) if flat.size else None,
        "max": float(flat.max()) if flat.size else None,
        "first": ", ".join(f"{float(each):.6g}" for each in flat[:MOST_VALUES]),
    }
