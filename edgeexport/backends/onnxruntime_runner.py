"""Run a bundle's components in ONNX Runtime on this machine; a decoder's KV cache is bound once, updated in place."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeexport import errors
from edgeexport.core import Array, Dim, TensorSpec
from edgeexport.session.runner import refuse_other_signature

PROVIDERS = ["CPUExecutionProvider"]
STEP = "step"
"""Name of the signature of a component that has no variants."""


class OnnxDecoder:
    """One decoder at batch 1. Every buffer is allocated here, once; `step` allocates only for a new T."""

    def __init__(self, model: Path | bytes, component: Any, *, threads: int | None, folder: Path) -> None:
        import onnxruntime as ort

        self._session = _open_session(model, _options(model, threads, folder), folder)
        state = tuple((str(past), str(present)) for past, present in component.state)
        _refuse_other(self._session, component, "", folder, state)
        values = (*self._session.get_inputs(), *self._session.get_outputs())
        shapes = {value.name: value.shape for value in values}
        self.vocab = int(shapes["logits"][-1])
        self.context = int(shapes[state[0][0]][2])
        self.runtime_seconds = 0.0
        self._ort = ort
        self._binding = self._session.io_binding()
        self._position = np.zeros(1, np.int64)
        self._logits = np.zeros((1, 1, self.vocab), np.float32)
        half = {value.name for value in values if value.type == "tensor(float16)"}
        self._caches = [np.zeros(shapes[past], np.float16 if past in half else np.float32) for past, _ in state]
        self._held = [
            ort.OrtValue.ortvalue_from_numpy(array) for array in (self._position, self._logits, *self._caches)
        ]
        position, logits, *caches = self._held
        self._binding.bind_ortvalue_input("position", position)
        self._binding.bind_ortvalue_output("logits", logits)
        for (past, present), cache in zip(state, caches, strict=True):
            self._binding.bind_ortvalue_input(past, cache)
            self._binding.bind_ortvalue_output(present, cache)
        self._embeds = int(shapes["inputs_embeds"][-1]) if "inputs_embeds" in shapes else 0
        self._turned = "rope_positions" in shapes
        self._feeds: dict[int, dict[str, tuple[Array, Any]]] = {}
        self._bound = 0

    def step(self, fed: Array, position: int, rope: Array | None = None) -> npt.NDArray[np.float32]:
        """Write T tokens at cache slots position..; logits [V] of the last one, a view the next step overwrites.

        `fed` is int64 [T], or float32 [T,hidden] where the graph takes embeddings; `rope` int64 [3,T] where it turns
        by M-RoPE.
        """
        count = len(fed)
        if count != self._bound:
            if count != 1:
                self._feeds.pop(self._bound if self._bound != 1 else -1, None)  # keep one prompt's buffers at most
            if count not in self._feeds:
                self._feeds[count] = self._buffers(count)
            for name, (_, value) in self._feeds[count].items():
                self._binding.bind_ortvalue_input(name, value)
            self._bound = count
        for name, (buffer, _) in self._feeds[count].items():
            if name == "rope_positions":
                buffer[:, 0] = rope
            else:
                buffer[0] = fed
        self._position[0] = position
        started = time.perf_counter()
        self._session.run_with_iobinding(self._binding)
        self.runtime_seconds += time.perf_counter() - started
        logits: npt.NDArray[np.float32] = self._logits[0, 0]
        return logits

    def close(self) -> None:
        """Let the runtime and the cache go."""
        self._feeds.clear()
        self._held.clear()
        self._caches.clear()
        del self._binding, self._session

    def _buffers(self, count: int) -> dict[str, tuple[Array, Any]]:
        arrays: dict[str, Array] = {}
        if self._embeds:
            arrays["inputs_embeds"] = np.empty((1, count, self._embeds), np.float32)
        else:
            arrays["input_ids"] = np.empty((1, count), np.int64)
        if self._turned:
            arrays["rope_positions"] = np.empty((3, 1, count), np.int64)
        return {name: (array, self._ort.OrtValue.ortvalue_from_numpy(array)) for name, array in arrays.items()}


class OnnxGraph:
    """One artifact without state."""

    def __init__(self, model: Path | bytes, component: Any, variant: str, *, threads: int | None, folder: Path) -> None:
        self._session = _open_session(model, _options(model, threads, folder), folder)
        _refuse_other(self._session, component, variant, folder)
        self._outputs = [value.name for value in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Inputs and outputs by name."""
        outputs = self._session.run(self._outputs, dict(inputs))
        # An output lies in the runtime's arena and would keep all of it, a tower's activations, beyond `close`.
        return {name: output.copy() for name, output in zip(self._outputs, outputs, strict=True)}

    def close(self) -> None:
        """Let the runtime go."""
        del self._session


def open_decoder(folder: Path, component: Any, *, threads: int | None = None, exact: bool = False) -> OnnxDecoder:
    """Open a component of a bundle's manifest as a decoder.

    With `exact` the same weights are multiplied by float32 activations, many times slower: MatMulNBits rounds
    activations to int8 else, and that rounding would hide a mistake of the lowering.

    Raises: BundleError `artifact-does-not-open` with the runtime's message.
    """
    graph = folder / signature_file(component, "")
    return OnnxDecoder(_exact(graph) if exact else graph, component, threads=threads, folder=folder)


def open_graph(
    folder: Path, component: Any, variant: str = "", *, threads: int | None = None, exact: bool = False
) -> OnnxGraph:
    """Open a component without state, or one variant of it; `exact` as in `open_decoder`.

    Raises: BundleError `artifact-does-not-open`, `bundle-no-variant`.
    """
    graph = folder / signature_file(component, variant)
    return OnnxGraph(_exact(graph) if exact else graph, component, variant, threads=threads, folder=folder)


def signature_file(component: Any, variant: str) -> str:
    """The file of a component's signature. Raises: BundleError `bundle-no-variant`."""
    files = {signature.name: str(signature.file) for signature in component.signatures}
    if (variant or STEP) not in files:
        raise errors.bundle_no_variant(component.name, variant, files)
    return files[variant or STEP]


def _exact(graph: Path) -> bytes:
    """The graph with every MatMulNBits at accuracy level 1, float32; its weights stay in their file."""
    import onnx

    model = onnx.load(str(graph), load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = 1
    return bytes(model.SerializeToString())


NUMPY_NAMES = {"float": "float32", "double": "float64"}
"""ONNX Runtime's element types that numpy calls otherwise."""


def read_signature(folder: Path, component: Any, variant: str = "") -> dict[str, TensorSpec]:
    """Inputs and outputs of an artifact as the runtime sees them, by name. No weight is read or prepared.

    Raises: BundleError `artifact-does-not-open`, `bundle-no-variant`.
    """
    return signature_of(folder / signature_file(component, variant), folder)


def signature_of(graph: Path, folder: Path) -> dict[str, TensorSpec]:
    """Inputs and outputs of a graph's file. Raises: BundleError `artifact-does-not-open`."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    session = _open_session(graph, options, folder)
    return {spec.name: spec for values in (session.get_inputs(), session.get_outputs()) for spec in _specs(values)}


def _specs(values: Any) -> list[TensorSpec]:
    found = []
    for value in values:
        element = value.type.removeprefix("tensor(").removesuffix(")")
        shape = tuple(d if isinstance(d, int) else Dim(str(d), 0, 0) for d in value.shape)
        found.append(TensorSpec(value.name, NUMPY_NAMES.get(element, element), shape))
    return found


def _refuse_other(
    session: Any, component: Any, variant: str, folder: Path, state: tuple[tuple[str, str], ...] = ()
) -> None:
    """Raises: BundleError `artifact-does-not-open`."""
    promised = next(each for each in component.signatures if each.name == (variant or STEP))
    found = (_specs(session.get_inputs()), _specs(session.get_outputs()))
    refuse_other_signature(folder, "onnxruntime", promised, found, state)


def _options(model: Path | bytes, threads: int | None, folder: Path) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    # Weights that a graph dequantises itself are multiplied as it says, not by kernels that round activations too.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    # On ARM, KleidiAI's kernels round what they multiply int4 weights with per token, not per block as all others do.
    options.add_session_config_entry("mlas.disable_kleidiai", "1")
    if threads:
        options.intra_op_num_threads = threads
    if isinstance(model, bytes):
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return options


def _open_session(model: Path | bytes, options: Any, folder: Path) -> Any:
    """A session on the processor. Raises: BundleError `artifact-does-not-open` with the runtime's message."""
    import onnxruntime as ort
    from onnxruntime.capi import onnxruntime_pybind11_state as native

    # onnxruntime has an exception for each of its status codes, and no class that they share but Exception.
    kinds: tuple[type[Exception], ...] = tuple(
        kind for kind in vars(native).values() if isinstance(kind, type) and issubclass(kind, Exception)
    ) + (RuntimeError, ValueError)
    try:
        return ort.InferenceSession(model if isinstance(model, bytes) else str(model), options, providers=PROVIDERS)
    except kinds as problem:
        raise errors.artifact_does_not_open(str(folder), "onnxruntime", str(problem)) from problem
