"""Tiny models on their way through the compiler: random checkpoints, traced graphs, and graphs filled with weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgeexport import backends, families, steps, targets
from edgeexport.backends.onnxruntime_runner import OnnxDecoder
from edgeexport.backends.storage import read_rows
from edgeexport.bundle.artifacts import OpenArtifacts
from edgeexport.bundle.cache import Cache
from edgeexport.canonical import dialect
from edgeexport.checkpoint import WeightReader, open_checkpoint
from edgeexport.console import Console
from edgeexport.core import Array, Artifact, CanonicalModel, Checkpoint, Dim, QuantPlan, Target, TensorSpec, no_progress
from edgeexport.job import Job
from edgeexport.quant import plan
from edgeexport.quant.source import PlannedWeights, Samples, no_samples
from edgeexport.session.inputs import Inputs
from edgeexport.session.preprocess import Preprocess
from edgeexport.session.runner import Call

FAMILIES = tuple(sorted(families.known()))
TEXT_FAMILIES = tuple(name for name in FAMILIES if "vision_config" not in families.find(name).tiny)
CONTEXT = 32
TOKENS = np.random.default_rng(1).integers(3, 300, CONTEXT)
"""A text for every tiny model: no placeholder of a picture among its tokens."""
DTYPES = {name: "float16" if name == "qwen3" else "bfloat16" for name in FAMILIES}
"""What each family's tiny checkpoint is stored as, unless a test says otherwise."""
SHAPES = {"vision": {"screens": [[56, 84], [84, 56]], "max_pixels": 56 * 84}}
"""Two grids of 4 x 6 and 6 x 4 patches, where a model has patches."""
PROCESSOR = {
    "image_processor_type": "Glm4vImageProcessor",
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 400},
}
"""preprocessor_config.json of the tiny models with patches."""


@dataclass(frozen=True)
class Traced:
    """A checkpoint with the canonical graphs of its components: `parts` by (component, variant)."""

    checkpoint: Checkpoint
    parts: Mapping[tuple[str, str], CanonicalModel]

    @property
    def model(self) -> CanonicalModel:
        """The decoder."""
        return self.parts["decoder", ""]

    @property
    def contract(self) -> Preprocess | None:
        return families.find(self.checkpoint.model_type).preprocess(self.checkpoint, SHAPES)

    def variants(self, component: str) -> list[CanonicalModel]:
        """The graphs of one component, which read the same weights."""
        return [model for (name, _), model in self.parts.items() if name == component]

    def plan(self, scheme: str, component: str = "decoder") -> QuantPlan:
        model = self.variants(component)[0]
        classes = dialect.classes(model.graph, model.weights, component)
        return plan({name: ref.shape for name, ref in model.weights.items()}, classes, scheme)

    def components(self) -> list[str]:
        return list(dict.fromkeys(component for component, _ in self.parts))


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
        """The original model of the same checkpoint, computing in float32."""
        return oracle(self.traced(*model).checkpoint.path)


def write_checkpoint(folder: Path, config: Mapping[str, Any], dtype: str = "float32", seed: int = 0) -> Path:
    """A checkpoint folder: `config` as it is, and random weights as transformers saves them."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    torch.manual_seed(seed)
    model = _original(folder)
    with torch.no_grad():  # norms of ones and biases of zeros would hide a mix-up
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            spread = torch.randn_like(tensor.float()) * 0.3
            if name.endswith("running_var"):
                tensor.copy_(1 + spread.abs())
            elif name in dict(model.named_parameters()) or name.endswith("running_mean"):
                tensor.copy_(1 + spread if "norm" in name else spread if tensor.ndim == 1 else 2 * tensor)
    model.to(getattr(torch, dtype))
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
        # a user's file, not what transformers makes of it
        (folder / "config.json").write_text(json.dumps(dict(config)))
    else:
        save_file(model.state_dict(), folder / "model.safetensors")
    if "vision_config" in config:
        (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


def strengthened(folder: Path) -> Path:
    """The checkpoint with weights of a magnitude that makes attention and rotary positions matter."""
    from safetensors.numpy import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if weight.ndim > 1:
            weights[name] = weight / weight.std() * np.float32(1.5 / np.sqrt(weight[0].size))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def _original(folder: Path, **loading: Any) -> Any:
    """The torch model of a checkpoint folder: its weights where there are `loading` options, else random ones."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] == "autoglm_phone":
        from safetensors.torch import load_file

        from edgeexport.families.autoglm_phone.config import from_dict
        from edgeexport.families.autoglm_phone.model import AutoGLMPhone

        model = AutoGLMPhone(from_dict(config))
        if loading:
            model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.float()
    auto = AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM
    if loading:
        return auto.from_pretrained(folder, **loading)
    return auto.from_config(AutoConfig.from_pretrained(folder))


def traced(folder: Path, context: int = CONTEXT, shapes: Mapping[str, Any] = SHAPES) -> Traced:
    """The checkpoint in this folder and the canonical graphs of its components; as a build, from the cache where a
    model of the same shapes was traced before."""
    checkpoint = open_checkpoint(folder)
    aim = replace(targets.load("host-ort"), shapes=shapes)
    job = Job(checkpoint, aim, "fp32", context, "L1", families.find(checkpoint.model_type))
    models = [model for part in steps.trace(job, Cache(), Console(quiet=True)) for model in part.models]
    return Traced(checkpoint, {(model.component, model.variant): model for model in models})


def oracle(folder: Path) -> Any:
    """The unmodified model, computing in float32."""
    import torch

    return _original(folder, dtype=torch.float32, attn_implementation="eager").eval()


def reference_logits(model: Any, tokens: Array) -> Array:
    """Logits float32 [T, V] of one text int64 [T], in one pass and without a cache."""
    import torch

    with torch.no_grad():
        given = model(torch.from_numpy(tokens)[None], use_cache=False)
        logits: Array = getattr(given, "logits", given)[0].float().numpy()
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


def checkpoint_weights(found: Traced) -> dict[str, Array]:
    """Every weight of every component as float32."""
    with WeightReader() as reader:
        return {name: reader.read(ref) for model in found.parts.values() for name, ref in model.weights.items()}


class Graph:
    """A component without state as a canonical graph in ONNX Runtime, over these weights."""

    def __init__(self, model: CanonicalModel, weights: Mapping[str, Array]) -> None:
        self._session = _session(model, weights)
        self._outputs = [spec.name for spec in model.outputs]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return dict(zip(self._outputs, self._session.run(self._outputs, dict(inputs)), strict=True))


def _session(model: CanonicalModel, weights: Mapping[str, Array]) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return ort.InferenceSession(filled(model, weights), options, providers=["CPUExecutionProvider"])


class Decoder:
    """Steps through the canonical graphs of a text in ONNX Runtime, feeding each step's caches to the next."""

    def __init__(self, found: Traced, weights: Mapping[str, Array]) -> None:
        model = found.model
        self._session = _session(model, weights)
        self._state = model.state
        caches = {spec.name: spec.shape for spec in model.inputs if spec.name in dict(model.state)}
        self._caches = {name: np.zeros(shape, np.float32) for name, shape in caches.items()}
        graphs = {name: Graph(part, weights) for (name, _), part in found.parts.items() if name == "embed"}
        contract = found.contract
        self._inputs = Inputs(contract, lambda name, _, given: graphs[name].run(given)) if contract else None

    def step(self, tokens: Array, position: int) -> Array:
        """Logits [V] of the last token."""
        feeds = {**call_of(self._inputs, tokens, position).inputs(), **self._caches}
        logits, *present = self._session.run(["logits", *(new for _, new in self._state)], feeds)
        self._caches = dict(zip((old for old, _ in self._state), present, strict=True))
        result: Array = logits.reshape(-1)
        return result


def call_of(inputs: Inputs | None, tokens: Array, position: int) -> Call:
    """A decoder's call for a piece of a text."""
    if inputs is None:
        return Call(tokens, position)
    fed = inputs.feed(tokens, (), position)
    return Call(fed.embeds, position, fed.rope)


def assert_built(
    folder: Path, artifacts: Mapping[str, Artifact], found: Traced, weights: Mapping[str, Array], *, exact: bool = True
) -> None:
    """What a backend wrote of every component computes what the canonical graphs compute over these weights, and holds
    exactly them; `exact` asks the runner for float32 activations."""
    opened = OpenArtifacts(lambda component: (folder, artifacts[component]), 1, exact=exact)
    assert_computes(opened, found, weights)
    assert_stores(folder, artifacts, found, weights)
    opened.decoder.close()
    opened.close()


def assert_computes(opened: OpenArtifacts, found: Traced, weights: Mapping[str, Array]) -> None:
    """Open artifacts give what the canonical graphs give over these weights: a text in pieces of several lengths to
    the cache's last slot (logits 1e-5), and every component without state on random inputs (1e-4)."""
    inputs = Inputs(found.contract, opened.run) if found.contract else None
    expected = Decoder(found, weights)
    position = 0
    for count in (7, 5, *[1] * 12, 3, *[1] * 5):
        tokens = TOKENS[position : position + count]
        call = call_of(inputs, tokens, position)
        got = opened.decoder.step(call.fed, position, call.rope)
        np.testing.assert_allclose(got, expected.step(tokens, position), atol=1e-5)
        position += count
    assert position == CONTEXT
    for (component, variant), model in found.parts.items():
        if component in ("decoder", "embed"):
            continue
        given = {spec.name: normal(spec.shape) for spec in model.inputs}
        features = opened.run(component, variant, given)
        for key, want in Graph(model, weights).run(given).items():
            np.testing.assert_allclose(features[key], want, atol=1e-4, rtol=1e-4)


def assert_stores(folder: Path, artifacts: Mapping[str, Artifact], found: Traced, weights: Mapping[str, Array]) -> None:
    """The artifacts' files hold exactly these weights, read back and dequantised."""
    for component, artifact in artifacts.items():
        assert artifact.weights.keys() == found.variants(component)[0].weights.keys()
        for key, weight in artifact.weights.items():
            rows = read_rows(folder, weight, 0, weight.shape[0])
            np.testing.assert_array_equal(rows.reshape(weight.shape), weights[key])


def normal(shape: tuple[int | Dim, ...]) -> Array:
    """float32 numbers of order 1, seven where a size is free."""
    sizes = [size if isinstance(size, int) else 7 for size in shape]
    return np.random.default_rng(sizes).standard_normal(sizes, np.float32)


def host_target(**options: Any) -> Target:
    """The target host-ort; with `accuracy_level=1`, integer weights are multiplied in float32."""
    target = targets.load("host-ort")
    return replace(target, options={**target.options, **options})


def compiled(model: CanonicalModel | list[CanonicalModel], quant: QuantPlan, folder: Path, **options: Any) -> Artifact:
    """What the ONNX Runtime backend writes of a component into `folder`, which is made."""
    models = model if isinstance(model, list) else [model]
    return written(backends.load("onnxruntime"), models, host_target(**options), quant, folder)


def written(
    backend: backends.Backend, models: list[CanonicalModel], target: Target, quant: QuantPlan, folder: Path,
    samples: Samples = no_samples,
) -> Artifact:  # fmt: skip
    """What a backend writes of a component, of which it refuses nothing, into `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    assert [finding for model in models for finding in backend.check(model, target, quant)] == []
    with WeightReader() as reader:
        source = PlannedWeights(reader, models[0].weights, quant, samples)
        return backend.compile(models, target, quant, source, folder, no_progress)


def positive(quant: QuantPlan) -> QuantPlan:
    """The plan as backends with `positive_scales` get it."""
    formats = {name: replace(fmt, positive=True) if fmt.integer else fmt for name, fmt in quant.formats.items()}
    return replace(quant, formats=formats)


def stored_weights(
    found: Traced, scheme: str, as_planned: Callable[[QuantPlan], QuantPlan] = lambda quant: quant
) -> dict[str, Array]:
    """Every weight of every component as the scheme rounds it, as float32; `as_planned` is what a backend makes of a
    plan."""
    stored = {}
    with WeightReader() as reader:
        for component in found.components():
            weights = found.variants(component)[0].weights
            source = PlannedWeights(reader, weights, as_planned(found.plan(scheme, component)))
            stored |= {name: source.stored_rows(name, 0, ref.shape[0]) for name, ref in weights.items()}
    return stored


def opened(artifact: Artifact, folder: Path, ending: str = ".onnx") -> OnnxDecoder:
    """The decoder's file of this ending, ready to step."""
    file = next(name for name in artifact.files if name.endswith(ending))
    return OnnxDecoder(folder / file, artifact, threads=1, folder=folder)


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
