"""ONNX Runtime: the canonical graph to `.onnx` with one weight file beside it, or to `.ort`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeexport import errors
from edgeexport.backends import onnx_file, storage
from edgeexport.backends.onnxruntime_ops import OPS, refuse_shifts
from edgeexport.backends.onnxruntime_runner import STEP
from edgeexport.backends.tools import versions_of
from edgeexport.core import (
    Artifact,
    CanonicalModel,
    Finding,
    Progress,
    QuantPlan,
    Signature,
    Target,
    Traits,
    WeightSource,
    no_progress,
)

NAME = "onnxruntime"
__all__ = ["NAME", "OPS", "OPTIONS", "TRAITS", "check", "compile", "versions"]


@dataclass(frozen=True)
class Options:
    """[options] of a target for this backend."""

    accuracy_level: int = 4
    """MatMulNBits' compute type: 4 rounds activations to int8 per block and is fast; 1 computes in float32."""
    ort_format: bool = False
    """Also write `.ort`, for builds of the runtime without the ONNX parser. Loads the model: files under 2 GB only."""


OPTIONS = Options
TRAITS = Traits(shifts=("int8", "zero"), int8_blocks=True)


def versions() -> dict[str, str]:
    """Versions of the tools that shape the artifact's bytes."""
    return versions_of("build", "onnx", "onnx-ir", "onnxruntime")


def check(model: CanonicalModel, target: Target, plan: QuantPlan) -> list[Finding]:
    """Every node that the table refuses or does not know, and every weight in blocks that no kernel reads, all at once.
    Pure; no SDK."""
    return [*OPS.check(model.graph.graph), *refuse_shifts(model.graph.graph, plan)]


def compile(
    models: Sequence[CanonicalModel],
    target: Target,
    plan: QuantPlan,
    source: WeightSource,
    work: Path,
    progress: Progress = no_progress,
) -> Artifact:
    """Write `<component>[.<variant>].onnx` for each variant, and one `<component>.onnx.data`, into `work`.

    Raises: UsageError `output-not-writable`; CheckpointError for weights that cannot be stored.
    """
    from edgeexport.backends.onnxruntime_lowering import Lowering

    options = Options(**target.options)
    component = models[0].component
    layout = storage.Layout(f"{component}.onnx.data")
    graphs = {_graph_file(model): Lowering(model, plan, layout, OPS, options.accuracy_level).run() for model in models}
    onnx_file.write(graphs, layout, work, source, progress)
    files = [*graphs, layout.file] if layout.size else [*graphs]
    if options.ort_format:
        files += [_write_ort(work / name) for name in graphs]
    return Artifact(
        component=component,
        backend=NAME,
        files=tuple(files),
        signatures=tuple(
            Signature(model.variant or STEP, model.inputs, model.outputs, _graph_file(model)) for model in models
        ),
        state=models[0].state,
        weights=layout.weights,
        tools=versions(),
    )


def _graph_file(model: CanonicalModel) -> str:
    return f"{onnx_file.stem_of(model)}.onnx"


def _write_ort(graph_file: Path) -> str:
    """The same model in ORT format, self-contained, optimised as far as any CPU may.

    Raises: LoweringError `file-too-large` beyond the format's 2 GB.
    """
    import onnxruntime as ort

    weights = graph_file.with_name(graph_file.name.split(".")[0] + ".onnx.data")
    size = sum(path.stat().st_size for path in (graph_file, weights) if path.exists())
    if size >= 2**31:
        raise errors.ort_file_too_large(graph_file.with_suffix(".ort"), size, 2**31)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(graph_file.with_suffix(".ort"))
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.add_session_config_entry("session.disable_prepacking", "1")
    ort.InferenceSession(str(graph_file), options, providers=["CPUExecutionProvider"])
    return graph_file.with_suffix(".ort").name
