"""Model families: one file per `model_type` of config.json, found by its name.

A family that transformers has and the generic decoder path traces correctly is a few lines: see llama.py.
Third parties add families through the entry-point group `edgeexport.families` (name = model_type, value = a module
with a `FAMILY`).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edgeexport import errors
from edgeexport.checkpoint import open_checkpoint
from edgeexport.checkpoint.digest import identities
from edgeexport.core import Checkpoint, Component, Geometry, OracleModel

if TYPE_CHECKING:
    from edgeexport.session.preprocess import Preprocess

_ROOMS = {"configured", "decoder", "stages", "glm4v_stages", "settled"}
"""Modules of this package that are machinery, not families."""


class Family(Protocol):
    """What a family module's `FAMILY` offers. Only `oracle` and the components' stages need torch."""

    model_type: str
    ops: frozenset[str]
    """Dialect ops of its graphs, so that `plan` can say what a backend lacks without tracing."""
    kernels: tuple[str, ...]
    """Suffixes of convolutions that are read as matrices of their rows."""
    table: str
    head: str
    """The embedding and lm_head by the checkpoint's names."""
    prefix: str
    """What a checkpoint of the model within the model, without lm_head, leaves out of all names."""
    tiny: Mapping[str, Any]
    """A random-weight configuration small enough for every test."""

    questions: Mapping[str, str]
    """What the ladder asks beside "picture", "sound" and "picture and sound", where a model knows few questions."""

    def geometry(self, config: Mapping[str, Any]) -> Geometry:
        """The decoder's numbers from config.json. Raises: CheckpointError `bad-config`."""

    def completed(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """config.json's values with those that transformers' class sets where they are left out."""

    def untied(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The same values with lm_head a matrix of its own."""

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


def open_model(model: str | Path) -> tuple[Checkpoint, Family]:
    """The checkpoint that `model` names, as transformers would load it, and its family.

    Raises: what `open_checkpoint`, `find` and `settle` do.
    """
    from edgeexport.families.settled import settle

    checkpoint = open_checkpoint(model)
    checkpoint = replace(checkpoint, identities=identities(checkpoint.files))
    family = find(checkpoint.model_type)
    return settle(checkpoint, family), family


def find(model_type: str) -> Family:
    """The family of this `model_type`.

    Raises: CheckpointError `unknown-model-type` naming the known ones.
    """
    modules = known()
    if model_type not in modules:
        raise errors.unknown_model_type(model_type, modules)
    family: Family = importlib.import_module(modules[model_type]).FAMILY
    return family
