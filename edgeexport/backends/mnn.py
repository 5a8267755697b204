"""MNN: the canonical graph to the directory that MNN-LLM loads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeexport import errors
from edgeexport.backends import storage
from edgeexport.backends.mnn_llm import as_json, context_of, llm_config, run_config
from edgeexport.backends.mnn_names import CONFIG, LLM_CONFIG, STEP, TOKENIZER
from edgeexport.backends.mnn_ops import OPS
from edgeexport.backends.mnn_tokenizer import tokenizer_file
from edgeexport.backends.tools import versions_of
from edgeexport.core import (
    Artifact,
    CanonicalModel,
    Finding,
    Format,
    Progress,
    QuantPlan,
    Signature,
    Target,
    WeightSource,
    no_progress,
)

NAME = "mnn"
__all__ = ["NAME", "OPS", "OPTIONS", "check", "compile", "versions", "write_package"]


@dataclass(frozen=True)
class Options:
    """[options] of a target for this backend."""

    threads: int = 4
    """Threads that MNN-LLM computes with on the device."""


OPTIONS = Options
FP32 = Format("fp32", 32, integer=False)
PARTS_FIX = "build for another target, such as android-tflite; a text model builds for this one"


def versions() -> dict[str, str]:
    """Versions of the tools that shape the artifact's bytes. Raises: ToolError `missing-package`."""
    return versions_of("mnn", "MNN", "onnx", "onnx-ir")


def check(model: CanonicalModel, target: Target, plan: QuantPlan) -> list[Finding]:
    """Every node that the table refuses or does not know, a decoder that is fed embeddings, and every weight in
    a format that MNN does not take, all at once. Pure; no SDK."""
    return [*OPS.check(model.graph.graph), *_refused_parts(model), *_refused_formats(model, plan)]


def _refused_parts(model: CanonicalModel) -> list[Finding]:
    """A finding for a decoder that is fed embeddings."""
    if not model.state or model.inputs[0].name == "input_ids":
        return []
    why = "this backend writes decoders that are fed token ids: MNN's Python package can feed no other, so that none "
    why += "could be proven on this computer"
    return [errors.op_not_lowered(NAME, "a decoder that is fed embeddings", model.component, why, PARTS_FIX)]


def _refused_formats(model: CanonicalModel, plan: QuantPlan) -> list[Finding]:
    """A finding for each format that MNN cannot read for its purpose: a lookup of MNN-LLM's takes no float32, and what
    a graph without a cache reads as a value is float32 alone."""
    if model.state:
        refused = [name for name, kind in plan.classes.items() if kind == "embedding" and plan.formats[name] == FP32]
        why, fix = "MNN-LLM looks embeddings up in float16, int8 or int4", "choose --quant fp16, or a smaller scheme"
    else:
        values = [name for name, kind in plan.classes.items() if kind in ("embedding", "convolution")]
        refused = [name for name in values if plan.formats[name] != FP32]
        why, fix = "MNN reads a table or a kernel outside a multiplication in float32 alone", PARTS_FIX
    return [errors.op_not_lowered(NAME, f"a weight in {plan.formats[name].name}", name, why, fix) for name in refused]


def compile(
    models: Sequence[CanonicalModel],
    target: Target,
    plan: QuantPlan,
    source: WeightSource,
    work: Path,
    progress: Progress = no_progress,
) -> Artifact:
    """Write `<component>.mnn` and its weight file into `work`; for a decoder, MNN-LLM's configuration too.

    Raises: UsageError `output-not-writable`; LoweringError `mnn-conversion-failed`; CheckpointError for weights that
    cannot be stored.
    """
    from edgeexport.backends.mnn_convert import convert
    from edgeexport.backends.mnn_file import WeightFile
    from edgeexport.backends.mnn_lowering import Lowering

    tools, options, component = versions(), Options(**target.options), models[0].component
    file = WeightFile(f"{component}.mnn.weight")
    files: dict[str, bytes] = {}
    for model in models:
        lowering = Lowering(model, plan, file, OPS)
        files[graph_file(component, model.variant)] = convert(lowering.run(), lowering.graph.placeholders, component)
    if lowering.embedding:
        files[LLM_CONFIG] = as_json(llm_config(model, file.weights[lowering.embedding], file.size))
        files[CONFIG] = as_json(run_config(next(iter(files)), file.file, context_of(models[0]), options.threads))
    storage.write(work, file, source, progress)
    try:
        for name, data in files.items():
            (work / name).write_bytes(data)
    except OSError as problem:
        raise errors.output_not_writable(work, str(problem)) from problem
    return Artifact(
        component=component,
        backend=NAME,
        files=(*files, file.file),
        signatures=tuple(
            Signature(each.variant or STEP, each.inputs, each.outputs, graph_file(component, each.variant))
            for each in models
        ),
        state=models[0].state,
        weights=file.weights,
        tools=tools,
    )


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
    made = work / TOKENIZER
    data = tokenizer_file(tokenizer_files["tokenizer.json"], template, stop_ids, eos, bos)
    try:
        made.write_bytes(data)
    except OSError as problem:
        raise errors.output_not_writable(work, str(problem)) from problem
    return made


def _content(token: Any) -> str:
    """A token's text as tokenizer_config.json has it: itself, or in a table, or nothing."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")


def graph_file(component: str, variant: str) -> str:
    """The file of a component's graph."""
    return f"{component}.{variant}.mnn" if variant else f"{component}.mnn"
