"""Model families: one file per `model_type` of config.json, found by its name.

A family that transformers has and the generic decoder path traces correctly is a few lines: see llama.py.
Third parties add families through the entry-point group `edgeexport.families` (name = model_type, value = a module
with a `FAMILY`).
"""

from __future__ import annotations

import importlib
import pkgutil
from importlib.metadata import entry_points

from edgeexport import errors
from edgeexport.families.decoder import DecoderFamily

_ROOMS = {"decoder", "stages"}
"""Modules of this package that are machinery, not families."""


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


def find(model_type: str) -> DecoderFamily:
    """The family of this `model_type`.

    Raises: CheckpointError `unknown-model-type` naming the known ones.
    """
    modules = known()
    if model_type not in modules:
        raise errors.unknown_model_type(model_type, modules)
    family: DecoderFamily = importlib.import_module(modules[model_type]).FAMILY
    return family
