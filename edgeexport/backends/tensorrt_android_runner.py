"""Runs what phones run, the LiteRT files; of the engines beside them it checks that they are whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeexport.backends import litert_runner
from edgeexport.backends.litert_runner import open_decoder, open_graph
from edgeexport.backends.tensorrt_runner import check_engine
from edgeexport.core import StandIn, TensorSpec

__all__ = ["STAND_IN", "open_decoder", "open_graph", "read_signature"]

STAND_IN = StandIn(
    opens="LiteRT opens it; the engine is whole",
    runs="LiteRT, which runs on every phone; not the engine",
    why="an engine needs an NVIDIA GPU, and none has run this one",
)


def read_signature(folder: Path, component: Any, variant: str = "") -> dict[str, TensorSpec]:
    """Inputs and outputs as LiteRT sees them. Raises: BundleError `artifact-does-not-open`, of an engine too."""
    for name in component.files:
        if name.endswith(".engine"):
            check_engine(folder / name)
    return litert_runner.read_signature(folder, component, variant)
