"""Tiny models on their way through the compiler: random checkpoints, traced graphs, and graphs filled with weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgeexport import backends, families, targets
from edgeexport.backends.onnxruntime_runner import OnnxDecoder
from edgeexport.canonical import dialect
from edgeexport.canonical.trace import trace
from edgeexport.checkpoint import WeightReader, open_checkpoint
from edgeexport.core import Array, Artifact, CanonicalModel, Checkpoint, Dim, QuantPlan, Target, TensorSpec, no_progress
from edgeexport.quant import plan
from edgeexport.quant.source import PlannedWeights

FAMILIES = tuple(sorted(families.known()))
CONTEXT = 32
DTYPES = {name: "float16" if name == "qwen3" else "bfloat16" for name in FAMILIES}
"""What each family's tiny checkpoint is stored as, unless a test says otherwise."""


@dataclass(frozen=True)
class Traced:
    """A checkpoint with its canonical graph."""

    checkpoint: Checkpoint
    model: CanonicalModel

    def plan(self, scheme: str) -> QuantPlan:
        classes = dialect.classes(self.model.graph, self.model.weights)
        return plan({name: ref.shape for name, ref in self.model.weights.items()}, classes, scheme)


class Zoo:
    """Tiny models by family, each written and traced once per test session."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.traced = cache(self._traced)
        self.oracle = cache(self._oracle)

    def _traced(self, family: str, dtype: str = "", changes: tuple[tuple[str, Any], ...] = ()) -> Traced:
        """The family's TINY, perhaps with changes and of another dtype, traced with CONTEXT slots."""
        config = {**families.find(family).tiny, **dict(changes)}
        folder = self._folder / f"{len(list(self._folder.iterdir()))}-{family}"
        return traced(write_checkpoint(folder, config, dtype or DTYPES[family]))

    def _oracle(self, *model: Any) -> Any:
        """transformers' model of the same checkpoint, computing in float32."""
        return oracle(self.traced(*model).checkpoint.path)


def write_checkpoint(folder: Path, config: Mapping[str, Any], dtype: str = "float32", seed: int = 0) -> Path:
    """A checkpoint folder: `config` as it is, and random weights as transformers saves them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    with torch.no_grad():  # norms of ones and biases of zeros would hide a mix-up
        for name, parameter in model.named_parameters():
            spread = torch.randn_like(parameter) * 0.3
            parameter.copy_(1 + spread if "norm" in name else spread if parameter.ndim == 1 else 2 * parameter)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(dict(config)))  # a user's file, not what transformers makes of it
    return folder


def traced(folder: Path, context: int = CONTEXT) -> Traced:
    """The checkpoint in this folder and its decoder's canonical graph."""
    checkpoint = open_checkpoint(folder)
    (component,) = families.find(checkpoint.model_type).components(checkpoint, context)
    return Traced(checkpoint, trace(component, checkpoint.tensors))


def oracle(folder: Path) -> Any:
    """transformers' unmodified model, computing in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def reference_logits(model: Any, tokens: Array) -> Array:
    """Logits float32 [T, V] of one sequence int64 [T], in one pass and without a cache."""
    import torch

    with torch.no_grad():
        logits: Array = model(torch.from_numpy(tokens)[None], use_cache=False).logits[0].float().numpy()
    return logits


def filled(model: CanonicalModel, weights: Mapping[str, Array]) -> bytes:
    """The canonical graph as an ONNX file of its own, each reference replaced by these float32 values.

    float32 whatever the checkpoint's dtype, so that dequantised values are not rounded to it.
    """
    graph = model.graph.clone()
    for name, ref in model.weights.items():
        held = graph.graph.initializers[name]
        held.const_value = ir.tensor(weights[name].astype(np.float32).reshape(ref.shape), name=name)
        held.dtype = ir.DataType.FLOAT
    proto: bytes = ir.serde.serialize_model(graph).SerializeToString()
    return proto


def checkpoint_weights(model: CanonicalModel) -> dict[str, Array]:
    """Every weight as float32."""
    with WeightReader() as reader:
        return {name: reader.read(ref) for name, ref in model.weights.items()}


class Decoder:
    """Steps through a canonical graph in ONNX Runtime, feeding each step's caches to the next."""

    def __init__(self, model: CanonicalModel, weights: Mapping[str, Array]) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        self._session = ort.InferenceSession(filled(model, weights), options, providers=["CPUExecutionProvider"])
        self._state = model.state
        caches = {spec.name: spec.shape for spec in model.inputs if spec.name in dict(model.state)}
        self._caches = {name: np.zeros(shape, np.float32) for name, shape in caches.items()}

    def step(self, tokens: Array, position: int) -> Array:
        """Logits [V] of the last token."""
        feeds = {"input_ids": tokens[None], "position": np.array([position], np.int64), **self._caches}
        logits, *present = self._session.run(["logits", *(new for _, new in self._state)], feeds)
        self._caches = dict(zip((old for old, _ in self._state), present, strict=True))
        result: Array = logits.reshape(-1)
        return result


def host_target(**options: Any) -> Target:
    """The target host-ort; with `accuracy_level=1`, integer weights are multiplied in float32."""
    target = targets.load("host-ort")
    return replace(target, options={**target.options, **options})


def compiled(model: CanonicalModel, quant: QuantPlan, folder: Path, **options: Any) -> Artifact:
    """What the ONNX Runtime backend writes into `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    with WeightReader() as reader:
        source = PlannedWeights(reader, model.weights, quant)
        backend = backends.load("onnxruntime")
        return backend.compile(model, host_target(**options), quant, source, folder, no_progress)


def opened(artifact: Artifact, folder: Path, ending: str = ".onnx") -> OnnxDecoder:
    """The artifact's file of this ending, ready to step."""
    file = next(name for name in artifact.files if name.endswith(ending))
    return OnnxDecoder(folder / file, artifact.state, threads=1, folder=folder)


def parsed(
    text: str,
    inputs: Mapping[str, Array],
    outputs: tuple[str, ...],
    constants: Mapping[str, Array],
) -> ir.Model:
    """A graph from nodes in ONNX text, one a line, every value with its dtype and shape."""
    import onnx

    nodes = [onnx.parser.parse_node(line) for line in text.strip().splitlines()]
    for k, node in enumerate(nodes):
        node.name = f"{node.op_type}.{k}"
    kind = onnx.helper.np_dtype_to_tensor_dtype
    graph = onnx.helper.make_graph(
        nodes,
        "decoder",
        [onnx.helper.make_tensor_value_info(name, kind(array.dtype), array.shape) for name, array in inputs.items()],
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UNDEFINED, None) for name in outputs],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    proto = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", dialect.OPSET)], ir_version=dialect.IR_VERSION
    )
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True))


def spec_of(value: ir.Value) -> TensorSpec:
    """Name, dtype and shape of a value."""
    assert value.dtype is not None and value.shape is not None
    sizes = tuple(size if isinstance(size, int) else Dim(str(size), 1, CONTEXT) for size in value.shape)
    return TensorSpec(str(value.name), str(value.dtype.numpy()), sizes)
