"""Backends by name. Each is a module that fits `Backend`; a third party adds one by the entry point
`edgeexport.backends` (name = backend, value = module)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast

from edgeexport import errors
from edgeexport.backends.optable import OpTable
from edgeexport.core import Artifact, CanonicalModel, Finding, Progress, QuantPlan, Target, Traits, WeightSource

BACKENDS: Mapping[str, str] = {
    "coreml": "edgeexport.backends.coreml",
    "litert": "edgeexport.backends.litert",
    "litert-nnapi": "edgeexport.backends.litert_nnapi",
    "mnn": "edgeexport.backends.mnn",
    "onnxruntime": "edgeexport.backends.onnxruntime",
    "tensorrt": "edgeexport.backends.tensorrt",
    "tensorrt-android": "edgeexport.backends.tensorrt_android",
    "tensorrt-kit": "edgeexport.backends.tensorrt_kit",
}
"""Backend to the module that compiles for it. Its host runner is the module of the same name plus `_runner`."""


class Backend(Protocol):
    """What a backend module offers. `check` is pure and needs no SDK; `compile` may need one."""

    NAME: str
    OPS: OpTable
    OPTIONS: type
    """Frozen dataclass whose fields are the keys allowed under [options] of a target file."""
    TRAITS: Traits

    def versions(self) -> dict[str, str]:
        """Versions of the tools that `compile` uses. Raises ToolError where one is missing."""

    def check(self, model: CanonicalModel, target: Target, plan: QuantPlan) -> list[Finding]:
        """Every node that this backend refuses, all at once; empty when it can be compiled."""

    def compile(
        self,
        models: Sequence[CanonicalModel],
        target: Target,
        plan: QuantPlan,
        source: WeightSource,
        work: Path,
        progress: Progress,
    ) -> Artifact:
        """Write the artifact's files into `work`, streaming every weight from `source`.

        `models` are the variants of one component; they read the same weights.
        """


def known() -> dict[str, str]:
    """Every backend, built in or installed. Raises `duplicate-plugin` where a package offers a name we have."""
    found = dict(BACKENDS)
    for point in entry_points(group="edgeexport.backends"):
        if point.name in found:
            raise errors.duplicate_plugin("backend", point.name, point.value)
        found[point.name] = point.value
    return found


def load(name: str) -> Backend:
    """The backend module. An import failure surfaces with its cause. Raises `unknown-backend`."""
    modules = known()
    if name not in modules:
        raise errors.unknown_backend(name, modules)
    return cast(Backend, importlib.import_module(modules[name]))


def load_runner(name: str) -> Any:
    """The host runner of a backend, which needs no torch: a module with `open_decoder`, `open_graph`,
    `read_signature`."""
    modules = known()
    if name not in modules:
        raise errors.unknown_backend(name, modules)
    runner: ModuleType = importlib.import_module(modules[name] + "_runner")
    return runner
