"""MNN: the canonical graph to the directory that MNN-LLM loads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeexport import errors
from edgeexport.backends import storage
from edgeexport.backends.mnn_file import FP32, WeightFile, looked_up
from edgeexport.backends.mnn_llm import as_json, context_of, llm_config, run_config
from edgeexport.backends.mnn_names import (
    CONFIG,
    EMBED,
    LLM_CONFIG,
    STEP,
    TOKENIZER,
    graph_file,
    lookup_config,
    weight_file,
)
from edgeexport.backends.mnn_ops import OPS
from edgeexport.backends.mnn_patterns import lookup_of
from edgeexport.backends.mnn_tokenizer import tokenizer_file
from edgeexport.backends.tools import versions_of
from edgeexport.core import (
    Artifact,
    CanonicalModel,
    Finding,
    Progress,
    QuantPlan,
    Signature,
    StoredWeight,
    Target,
    Traits,
    WeightSource,
    no_progress,
)

NAME = "mnn"
__all__ = ["NAME", "OPS", "OPTIONS", "TRAITS", "check", "compile", "versions"]


@dataclass(frozen=True)
class Options:
    """[options] of a target for this backend."""

    threads: int = 4
    """Threads that MNN-LLM computes with on the device."""


OPTIONS = Options


def versions() -> dict[str, str]:
    """Versions of the tools that shape the artifact's bytes. Raises: ToolError `missing-package`."""
    return versions_of("mnn", "MNN", "onnx", "onnx-ir")


def check(model: CanonicalModel, target: Target, plan: QuantPlan) -> list[Finding]:
    """Every node that the table refuses or does not know, and every weight in a format that MNN does not take for its
    purpose, all at once. Pure; no SDK."""
    return [*OPS.check(model.graph.graph), *_refused_formats(model, plan)]


def _refused_formats(model: CanonicalModel, plan: QuantPlan) -> list[Finding]:
    """A finding for each table that MNN cannot read: its lookup takes no float32, and what a graph reads as a value
    is float32 alone."""
    tables = [name for name, kind in plan.classes.items() if kind == "embedding"]
    if model.state or lookup_of(model):
        refused = [name for name in tables if plan.formats[name] == FP32]
        why, fix = "MNN-LLM looks embeddings up in float16, int8 or int4", "choose --quant fp16, or a smaller scheme"
    else:
        refused = [name for name in tables if plan.formats[name] != FP32]
        why = "MNN reads a table that is not of token ids in float32 alone"
        fix = "build for another target, such as android-tflite"
    return [errors.op_not_lowered(NAME, f"a weight in {plan.formats[name].name}", name, why, fix) for name in refused]


def compile(
    models: Sequence[CanonicalModel],
    target: Target,
    plan: QuantPlan,
    source: WeightSource,
    work: Path,
    progress: Progress = no_progress,
) -> Artifact:
    """Write `<component>.mnn` and its weight file into `work`; for a decoder, MNN-LLM's configuration too. A component
    that only looks token ids up becomes a table for MNN-LLM, and a graph that gives the rows back.

    Raises: UsageError `output-not-writable`; LoweringError `mnn-conversion-failed`; CheckpointError for weights that
    cannot be stored.
    """
    tools, component = versions(), models[0].component
    table = lookup_of(models[0])
    if table is not None:
        files, layout = _table(component, table, models[0].weights[table].shape, plan, target)
    else:
        files, layout = _graphs(models, plan, target)
    storage.write(work, layout, source, progress)
    storage.write_files(work, files)
    return Artifact(
        component=component,
        backend=NAME,
        files=(*files, layout.file),
        signatures=tuple(
            Signature(each.variant or STEP, each.inputs, each.outputs, graph_file(component, each.variant))
            for each in models
        ),
        state=models[0].state,
        weights=layout.weights,
        tools=tools,
    )


def _table(
    component: str, name: str, shape: tuple[int, ...], plan: QuantPlan, target: Target
) -> tuple[dict[str, bytes], storage.Layout]:
    """Files and layout of a table of embeddings [rows, width]."""
    from edgeexport.backends.mnn_convert import convert
    from edgeexport.backends.mnn_lowering import echo

    options, layout = Options(**target.options), storage.Layout(weight_file(component))
    layout.weights[name] = looked_up(layout.file, shape, plan.formats[name])
    layout.size = plan.formats[name].nbytes(shape)
    onnx, graph = echo(shape[1])
    facts = llm_config(layout.weights[name], 0, layout.size)
    running = run_config(graph_file(component), layout.file, layout.file, 0, options.threads)
    made = convert(onnx, graph.placeholders, component)
    return {graph_file(component): made, lookup_config(component): as_json({**facts, **running})}, layout


def _graphs(
    models: Sequence[CanonicalModel], plan: QuantPlan, target: Target
) -> tuple[dict[str, bytes], storage.Layout]:
    """Files and layout of a component's graphs; a decoder has one."""
    from edgeexport.backends.mnn_convert import convert
    from edgeexport.backends.mnn_lowering import Lowering

    component, options = models[0].component, Options(**target.options)
    file = WeightFile(weight_file(component))
    files: dict[str, bytes] = {}
    for model in models:
        lowering = Lowering(model, plan, file, OPS)
        files[graph_file(component, model.variant)] = convert(lowering.run(), lowering.graph.placeholders, component)
    if model.state:
        own = lowering.embedding
        table = file.weights[own] if own else _table_elsewhere(model, plan)
        turned = any(spec.name == "rope_positions" for spec in model.inputs)
        facts = llm_config(table, len(model.state) // 2, file.size, turned=turned)
        files[LLM_CONFIG] = as_json(facts)
        running = run_config(graph_file(component), file.file, table.file, context_of(model), options.threads)
        files[CONFIG] = as_json(running)
    return files, file


def _table_elsewhere(model: CanonicalModel, plan: QuantPlan) -> StoredWeight:
    """Where the embeddings lie of a decoder that is fed them. They are in the head's format, of which every scheme has
    one for both: tied models keep them in one tensor."""
    head = next(name for name, kind in plan.classes.items() if kind == "lm_head")
    return looked_up(weight_file(EMBED), model.weights[head].shape, plan.formats[head])


def write_package(
    target: Target,
    artifact: Artifact,
    folder: Path,
    tokenizer_files: Mapping[str, bytes],
    stop_ids: Sequence[int],
    context: int,
    work: Path,
) -> Path:
    """The file in `work` that MNN-LLM tokenises with, chat template and stop ids in it.

    Raises: LoweringError `mnn-tokenizer-unsupported`; UsageError `output-not-writable`.
    """
    template = tokenizer_files.get("chat_template.jinja", b"").decode("utf-8")
    named = json.loads(tokenizer_files.get("tokenizer_config.json", b"{}"))
    eos, bos = (_content(named.get(key)) for key in ("eos_token", "bos_token"))
    data = tokenizer_file(tokenizer_files["tokenizer.json"], template, stop_ids, eos, bos)
    storage.write_files(work, {TOKENIZER: data})
    return work / TOKENIZER


def _content(token: Any) -> str:
    """A token's text as tokenizer_config.json has it: itself, or in a table, or nothing."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")


TRAITS = Traits(package=write_package, shifts=("half",), int8_blocks=True, widens=1 << 62)  # exact, it widens all
