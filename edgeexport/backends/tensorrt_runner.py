"""Stands in for an engine where there is no GPU: runs the very ONNX graph that it is built from, in ONNX Runtime.

That proves the graph and the weights in it. It proves nothing of the engine, and says so wherever a result is shown.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgeexport import errors
from edgeexport.backends.foreign import foreign
from edgeexport.backends.onnxruntime_runner import OnnxDecoder, OnnxGraph, signature_file, signature_of
from edgeexport.core import Dim, StandIn, TensorSpec
from edgeexport.plainfile import open_plain, read_plain

RUNTIME = "computed in ONNX Runtime from the graph that the engine is built from, not by the engine"
STAND_IN = StandIn(
    opens="the engine is whole, and its network has this interface",
    runs="the graph that the engine is built from, in ONNX Runtime; not the engine",
    why="an engine needs an NVIDIA GPU, and none has run this one",
)
MAGIC, SIZE_AT = b"vtrt", 16
"""What an engine of TensorRT-RTX begins with, and where its size stands, as a u64."""
LARGEST_DESCRIPTION = 4 << 20
"""Bytes of what a build writes beside an engine."""
FREE = -1
"""A size that a network finds out when it runs."""
TENSORRT_NAMES = {"half": "float16", "float": "float32"}
"""TensorRT's element types that numpy calls otherwise."""


def open_decoder(folder: Path, component: Any, *, threads: int | None = None, exact: bool = False) -> OnnxDecoder:
    """The decoder's ONNX graph. `exact` computes in float32 with the same weights: rounding to float16 would hide a
    mistake of the lowering. Raises: BundleError `artifact-does-not-open`."""
    graph = folder / graph_file(component, "")
    return OnnxDecoder(in_float32(graph) if exact else graph, component, threads=threads, folder=folder)


def open_graph(
    folder: Path, component: Any, variant: str = "", *, threads: int | None = None, exact: bool = False
) -> OnnxGraph:
    """The ONNX graph of a component without state, or of one variant of it; `exact` as in `open_decoder`.

    Raises: BundleError `artifact-does-not-open`, `bundle-no-variant`.
    """
    graph = folder / graph_file(component, variant)
    return OnnxGraph(in_float32(graph) if exact else graph, component, variant, threads=threads, folder=folder)


def read_signature(folder: Path, component: Any, variant: str = "") -> dict[str, TensorSpec]:
    """Inputs and outputs of the graph, by name; and that every engine of it is whole and has the same.

    A cache is float16 in the engine and float32 in the canonical graph, and no session sees it: float32 is given.
    Raises: BundleError `artifact-does-not-open`, `bundle-no-variant`.
    """
    name = graph_file(component, variant)
    found = signature_of(folder / name, folder)
    for engine in _engines(component, name):
        check_engine(folder / engine)
        _check_interface(folder, engine, found)
    caches = {value for pair in component.state for value in pair}
    return {name: TensorSpec(name, "float32", spec.shape) if name in caches else spec for name, spec in found.items()}


def graph_file(component: Any, variant: str) -> str:
    """The ONNX file of a component's signature. Raises: BundleError `bundle-no-variant`."""
    file = signature_file(component, variant)
    return f"{_stem(file)}.onnx" if file.endswith(".engine") else file


def check_engine(path: Path) -> None:
    """Raises: BundleError `artifact-does-not-open` where the file does not begin as an engine of its size does."""
    try:
        with open_plain(path, follow=True) as file:
            head = file.read(SIZE_AT + 8)
    except OSError as problem:
        raise errors.artifact_does_not_open(str(path), "TensorRT-RTX", f"it cannot be read: {problem}") from problem
    size = int.from_bytes(head[SIZE_AT:], "little")
    if head[:4] != MAGIC:
        raise errors.artifact_does_not_open(str(path), "TensorRT-RTX", f"it does not begin with {MAGIC.decode()}")
    if size != path.stat().st_size:
        told = f"it has {path.stat().st_size} bytes, and says that it has {size}"
        raise errors.artifact_does_not_open(str(path), "TensorRT-RTX", told)


def fits(shape: Sequence[Any], spec: TensorSpec) -> bool:
    """Whether a network's shape is the one promised. What it cannot tell before it runs, such as how many rows a slice
    of the last one has, is -1 there."""
    sizes = zip(shape, spec.shape, strict=False)
    return len(shape) == len(spec.shape) and all(
        isinstance(wanted, Dim) or size in (wanted, FREE) for size, wanted in sizes
    )


def in_float32(graph: Path) -> bytes:
    """The graph computing in float32: float16 inputs, outputs and Casts become float32, and what is stored in float16
    is widened where it is read. Weights stay in their file."""
    import onnx
    from onnx import TensorProto

    model = onnx.load(str(graph), load_external_data=False)
    half, wide = TensorProto.FLOAT16, TensorProto.FLOAT
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == half:
            value.type.tensor_type.elem_type = wide
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == half:
                attribute.i = wide
    casts = []
    for held in model.graph.initializer:
        if held.data_type == half:
            name, held.name = held.name, f"{held.name}/stored"
            casts.append(onnx.helper.make_node("Cast", [held.name], [name], to=wide))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)
    return bytes(model.SerializeToString())


def _stem(engine: str) -> str:
    return engine.removesuffix(".engine").removesuffix(".sm75")


def _engines(component: Any, graph: str) -> list[str]:
    return [name for name in component.files if name.endswith(".engine") and f"{_stem(name)}.onnx" == graph]


def _check_interface(folder: Path, engine: str, graph: dict[str, TensorSpec]) -> None:
    """Raises: BundleError `artifact-does-not-open` where the network said other names, dtypes or sizes of itself."""
    with foreign(lambda problem: errors.artifact_does_not_open(str(folder / f"{engine}.json"), "JSON", problem)):
        described = json.loads(read_plain(folder / f"{engine}.json", LARGEST_DESCRIPTION, follow=True))
        values = {each["name"]: each for each in (*described["inputs"], *described["outputs"])}
        wrong = sorted(values.keys() ^ graph.keys())
        for name in values.keys() & graph.keys():
            dtype = TENSORRT_NAMES.get(values[name]["dtype"], values[name]["dtype"])
            if dtype != graph[name].dtype or not fits(values[name]["shape"], graph[name]):
                wrong.append(name)
    if wrong:
        problem = f"its interface is not the graph's: {', '.join(wrong)}"
        raise errors.artifact_does_not_open(str(folder / engine), "TensorRT-RTX", problem)
