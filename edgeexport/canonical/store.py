"""A canonical model on disk: as a cache entry (graph without weights), or as ONNX that other tools open."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnx_ir as ir

from edgeexport import errors
from edgeexport.canonical.weights import ReferenceTensor
from edgeexport.core import Array, CanonicalModel, Component, Progress, TensorRef, no_progress

GRAPH_FILE, INDEX_FILE = "graph.onnx", "index.json"
COPY_BYTES = 4 << 20


class _Index(msgspec.Struct):
    """What the graph's file does not say: which checkpoint tensor each initializer is, and the stages in order."""

    weights: dict[str, str]
    stages: tuple[str, ...]
    digest: str


def save(model: CanonicalModel, folder: Path) -> None:
    """Write the graph without weights into `folder`, to be read back by `load`."""
    with _placeholders(model):
        data = ir.serde.serialize_model(model.graph).SerializeToString(deterministic=True)
    (folder / GRAPH_FILE).write_bytes(data)
    index = _Index({name: ref.name for name, ref in model.weights.items()}, model.stages, model.digest)
    (folder / INDEX_FILE).write_bytes(msgspec.json.encode(index))


def load(folder: Path, component: Component, tensors: Mapping[str, TensorRef]) -> CanonicalModel:
    """The model that `save` wrote, its weights bound to this checkpoint again."""
    index = msgspec.json.decode((folder / INDEX_FILE).read_bytes(), type=_Index)
    model = ir.serde.deserialize_model(onnx.load_model_from_string((folder / GRAPH_FILE).read_bytes()))
    weights = {}
    for name, source in index.weights.items():
        held = model.graph.initializers[name]
        shape = tuple(int(str(size)) for size in held.shape or ())
        weights[name] = replace(tensors[source], shape=shape)
        held.const_value = ReferenceTensor(name, weights[name])
    return CanonicalModel(
        component.name,
        model,
        component.inputs,
        component.outputs,
        component.state,
        weights,
        index.stages,
        index.digest,
        component.variant,
    )


def write_onnx(
    model: CanonicalModel, folder: Path, rows: Callable[[TensorRef, int, int], Array], progress: Progress = no_progress
) -> Path:
    """Write `<component>.onnx` with all weights in `<component>.onnx.data`, streamed in the checkpoint's own dtype.

    `rows` gives stored rows of a reference (bfloat16 as uint16). Raises: UsageError `output-not-writable`.
    """
    path = folder / f"{_stem(model)}.onnx"
    data = path.with_name(path.name + ".data")
    held: dict[str, ir.ExternalTensor] = {}
    try:
        with data.open("wb") as file:
            for done, (name, ref) in enumerate(model.weights.items()):
                file.seek(-(-file.tell() // 64) * 64)
                offset = file.tell()
                count = ref.shape[0] if ref.shape else 1
                step = max(1, COPY_BYTES * count // max(1, 4 * ref.elements))
                for start in range(0, count, step):
                    file.write(np.ascontiguousarray(rows(ref, start, min(count, start + step))).data)
                tensor = ReferenceTensor(name, ref)
                held[name] = ir.ExternalTensor(
                    data.name, offset, file.tell() - offset, tensor.dtype, shape=tensor.shape, name=name
                )
                progress(done + 1, len(model.weights))
        _write_graph(model, held, path)
    except OSError as problem:
        raise errors.output_not_writable(folder, str(problem)) from problem
    return path


def write_reference_onnx(model: CanonicalModel, folder: Path) -> Path:
    """Write `<component>.onnx` whose weights are byte ranges of the checkpoint's own files, linked in beside it.

    ONNX allows no data outside the graph's folder, so each file is hard-linked: no byte is copied.
    Raises: UsageError `cannot-link-weights` where the folder is on another file system, or the checkpoint holds
    encodings that ONNX lacks.
    """
    path = folder / f"{_stem(model)}.onnx"
    held: dict[str, ir.ExternalTensor] = {}
    for name, ref in model.weights.items():
        tensor = ReferenceTensor(name, ref)
        if ref.transform is not None or ref.encoding not in ("F32", "F16", "BF16"):
            raise errors.cannot_link_weights(
                ref.file, f"{ref.name} is stored as {ref.encoding}, which ONNX cannot read"
            )
        held[name] = ir.ExternalTensor(
            ref.file.name, ref.offset, ref.nbytes, tensor.dtype, shape=tensor.shape, name=name
        )
    for file in sorted({ref.file for ref in model.weights.values()}):
        link = folder / file.name
        try:
            if not link.exists() or not link.samefile(file):
                os.link(file.resolve(), link)
        except OSError as problem:
            raise errors.cannot_link_weights(file, str(problem)) from problem
    _write_graph(model, held, path)
    return path


def _stem(model: CanonicalModel) -> str:
    return f"{model.component}.{model.variant}" if model.variant else model.component


def _write_graph(model: CanonicalModel, held: Mapping[str, ir.ExternalTensor], path: Path) -> None:
    with _placeholders(model, held):
        path.write_bytes(ir.serde.serialize_model(model.graph).SerializeToString(deterministic=True))


@contextlib.contextmanager
def _placeholders(model: CanonicalModel, held: Mapping[str, ir.ExternalTensor] | None = None) -> Iterator[None]:
    """Within, every weight is an external tensor (of no bytes where `held` is not given), so that the graph can be
    serialised; a reference itself refuses to give its bytes."""
    initializers = model.graph.graph.initializers
    before = {name: initializers[name].const_value for name in model.weights}
    for name, ref in model.weights.items():
        tensor = ReferenceTensor(name, ref)
        initializers[name].const_value = (
            held[name] if held else ir.ExternalTensor("none", 0, 0, tensor.dtype, shape=tensor.shape, name=name)
        )
    try:
        yield
    finally:
        for name, value in before.items():
            initializers[name].const_value = value
