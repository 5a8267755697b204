"""Lowered graphs as ONNX files beside one file of weights, for the backends whose runtime reads ONNX."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edgeexport.backends import storage
from edgeexport.core import CanonicalModel, Progress, WeightSource

if TYPE_CHECKING:
    import onnx_ir as ir


def stem_of(model: CanonicalModel) -> str:
    """What a variant's files are called, without their ending."""
    return f"{model.component}.{model.variant}" if model.variant else model.component


def write(
    graphs: Mapping[str, ir.Model], layout: storage.Layout, work: Path, source: WeightSource, progress: Progress
) -> None:
    """Write the weights that `layout` describes, then the graphs by their files' names, rid of what nothing reads.

    Raises: UsageError `output-not-writable`; CheckpointError for weights that cannot be stored.
    """
    import onnx_ir as ir
    import onnx_ir.passes.common as common

    found: dict[str, bytes] = {}
    for name, lowered in graphs.items():
        common.RemoveUnusedNodesPass()(lowered)
        common.TopologicalSortPass()(lowered)
        found[name] = ir.serde.serialize_model(lowered).SerializeToString(deterministic=True)
    storage.write(work, layout, source, progress)
    storage.write_files(work, found)
