"""Model families: one file per `model_type` of config.json, found by its name.

A family that transformers has and the generic decoder path traces correctly is a few lines: see llama.py.
Third parties add families through the entry-point group `edgeexport.families` (name = model_type, value = a module
with a `FAMILY`).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Protocol

from edgeexport import errors
from edgeexport.core import Checkpoint, Component, Geometry, OracleModel

if TYPE_CHECKING:
    from edgeexport.session.preprocess import Preprocess

_ROOMS = {"decoder", "stages", "glm4v_stages"}
"""Modules of this package that are machinery, not families."""


class Family(Protocol):
    """What a family module's `FAMILY` offers. Only `oracle` and the components' stages need torch."""

    model_type: str
    ops: frozenset[str]
    """Dialect ops of its graphs, so that `plan` can say what a backend lacks without tracing."""
    kernels: tuple[str, ...]
    """Suffixes of convolutions that are read as matrices of their rows."""
    tiny: Mapping[str, Any]
    """A random-weight configuration small enough for every test."""

    questions: Mapping[str, str]
    """What the ladder asks beside "picture", "sound" and "picture and sound", where a model knows few questions."""

    def geometry(self, config: Mapping[str, Any]) -> Geometry:
        """The decoder's numbers from config.json. Raises: CheckpointError `bad-config`."""

    def unused(self, checkpoint: Checkpoint) -> frozenset[str]:
        """Checkpoint tensors that the model does not read, and rightly so."""

    def components(self, checkpoint: Checkpoint, context: int, shapes: Mapping[str, Any]) -> list[Component]:
        """The parts of the model, the decoder last. `shapes` is the target's [shapes]."""

    def preprocess(self, checkpoint: Checkpoint, shapes: Mapping[str, Any]) -> Preprocess | None:
        """What pictures, sound and prompts go through; None for a model of text alone."""

    def oracle(self, config: Mapping[str, Any]) -> OracleModel:
        """The unmodified model that parity is measured against."""


def known() -> dict[str, str]:
    """Every `model_type` and the module that serves it. A clash with a built-in family is an error."""
    found = {
        module.name: f"{__name__}.{module.name}"
        for module in pkgutil.iter_modules(__path__)
        if module.name not in _ROOMS and not module.name.startswith("_")
    }
    for point in entry_points(group="edgeexport.families"):
        if point.name in found:
            raise errors.duplicate_plugin("family", point.name, point.value)
        found[point.name] = point.value
    return found


def find(model_type: str) -> Family:
    """The family of this `model_type`.

    Raises: CheckpointError `unknown-model-type` naming the known ones.
    """
    modules = known()
    if model_type not in modules:
        raise errors.unknown_model_type(model_type, modules)
    family: Family = importlib.import_module(modules[model_type]).FAMILY
    return family
