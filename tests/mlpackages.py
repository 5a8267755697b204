"""ML packages made by coremltools itself, from its builder: what the interpreter and the writer are compared with."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgeexport.backends.coreml_interpreter import Interpreter
from edgeexport.core import Array


@functools.cache
def coremltools() -> Any:
    """The whole of coremltools, without what it says about the versions of others."""
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import coremltools

    return coremltools


def builder() -> Any:
    """coremltools' builder of ML programs."""
    coremltools()
    from coremltools.converters.mil.mil import Builder

    return Builder


def saved(program: Any, path: Path) -> Path:
    """The program as a package on disk, as coremltools writes it; no pass of its own changes it."""
    ct = coremltools()
    made = ct.convert(
        program,
        source="milinternal",
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT32,
        pass_pipeline=ct.PassPipeline.EMPTY,
        skip_model_load=True,
    )
    made.save(str(path))
    return path


def program(inputs: Mapping[str, Array], body: Callable[..., Any]) -> Any:
    """A program whose function `main` is `body` of placeholders like these arrays."""
    ct = coremltools()
    from coremltools.converters.mil.mil import Function, Program, types

    mb = builder()
    kinds = {"float32": types.fp32, "float16": types.fp16, "int32": types.int32, "bool": types.bool}
    held = {name: mb.placeholder(array.shape, dtype=kinds[str(array.dtype)]) for name, array in inputs.items()}
    made = Program()
    with Function(held, opset_version=ct.target.iOS18) as function:
        found = body(**{name: function.inputs[name] for name in inputs})
        outputs = list(found) if isinstance(found, list | tuple) else [found]
        function.set_outputs([mb.identity(x=each, name=f"y{i}") for i, each in enumerate(outputs)])
    made.add_function("main", function)
    return made


def evaluated(path: Path, inputs: Mapping[str, Array], *, exact: bool = False) -> list[Array]:
    """The outputs of `main` in their order."""
    return list(Interpreter(path, exact=exact).run(inputs).values())
