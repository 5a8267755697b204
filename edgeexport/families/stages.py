"""The torch side of the generic decoder: transformers' own modules, cut into stages that trace to the dialect.

Nothing here computes a model's arithmetic anew. Three things are swapped while a layer is traced, each for one that
emits a single ONNX op instead of many: the attention function (transformers' AttentionInterface), the cache, and
the rotary and RMSNorm functions. The last two are recognised by their numbers, not by their names: a function that
does not equal the op on random inputs is left as it is, and the dialect check then says what it decomposed into.
"""

from __future__ import annotations

import copy
import sys
import types
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from edgeexport import errors
from edgeexport.core import Array, Stage, TensorRef
from edgeexport.families.decoder import missing_tensors

ATTENTION = "edgeexport"
ROPE_VERSION = 23
ATTENTION_VERSION = 24


def transformers_config(config: Mapping[str, Any]) -> Any:
    """transformers' configuration object from config.json's values; no remote code, no class guessed."""
    values = {key: value for key, value in config.items() if key not in ("model_type", "transformers_version", "dtype")}
    return AutoConfig.for_model(config["model_type"], **copy.deepcopy(values))


def fake_model(config: Mapping[str, Any]) -> Any:
    """transformers' model at full depth with fake float32 weights: shapes without storage."""
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(
            transformers_config(config), dtype=torch.float32, attn_implementation=ATTENTION
        )
    return model.eval()


def rope_tables(config: Mapping[str, Any], context: int) -> dict[str, Array]:
    """cos and sin for positions 0..context-1 as the model computes them: float32 [context, rotary_dim / 2] each."""
    settings = transformers_config(config)
    settings.num_hidden_layers = 1
    rotary = type(fake_model({**config, "num_hidden_layers": 1}).model.rotary_emb)(settings)
    with torch.no_grad():
        cos, sin = rotary(torch.zeros(1, 1), torch.arange(context)[None])
    half = cos.shape[-1] // 2
    if not (torch.equal(cos[..., :half], cos[..., half:]) and torch.equal(sin[..., :half], sin[..., half:])):
        raise errors.rope_not_static(type(rotary).__name__, ("tables whose two halves are equal",))
    return {"rope.cos": cos[0, :, :half].numpy().copy(), "rope.sin": sin[0, :, :half].numpy().copy()}


def decoder_stages(config: Mapping[str, Any], tensors: Mapping[str, TensorRef], context: int) -> list[Stage]:
    """The stages of a causal language model: embed, one per layer, head.

    Raises: CheckpointError when a parameter of the model is not in the checkpoint or has another shape.
    """
    model = fake_model(config)
    layers = model.model.layers
    lm_head = "model.embed_tokens.weight" if config.get("tie_word_embeddings", False) else "lm_head.weight"
    rotary_dim = 2 * rope_tables(config, 1)["rope.cos"].shape[-1]

    stages = [
        Stage(
            name="embed",
            kind="embed",
            module=Embed(model.model.embed_tokens),
            inputs=("input_ids", "position"),
            outputs=("hidden", "positions", "kv_length"),
            parameters={"embed.weight": "model.embed_tokens.weight"},
        )
    ]
    for i, layer in enumerate(layers):
        stages.append(
            Stage(
                name=f"layers.{i}",
                kind=_layer_kind(layer),
                module=Layer(layer, rotary_dim, context),
                inputs=(
                    "hidden",
                    "position",
                    "positions",
                    "kv_length",
                    "rope.cos",
                    "rope.sin",
                    f"past_key.{i}",
                    f"past_value.{i}",
                ),
                outputs=("hidden", f"present_key.{i}", f"present_value.{i}"),
                parameters={f"layer.{name}": f"model.layers.{i}.{name}" for name, _ in layer.named_parameters()},
            )
        )
    head = {f"norm.{name}": f"model.norm.{name}" for name, _ in model.model.norm.named_parameters()}
    head |= {f"head.{name}": f"lm_head.{name}" for name, _ in model.lm_head.named_parameters()}
    head["head.weight"] = lm_head
    stages.append(Stage("head", "head", Head(model.model.norm, model.lm_head), ("hidden",), ("logits",), head))
    expected = {
        stage.parameters[name]: tuple(parameter.shape)
        for stage in stages
        for name, parameter in stage.module.named_parameters()
    }
    missing_tensors(expected, tensors)
    return stages


def _layer_kind(layer: nn.Module) -> str:
    """Layers with the same kind trace to the same graph: same classes, parameter shapes and attention settings."""
    attention = layer.self_attn
    shapes = [(name, tuple(parameter.shape)) for name, parameter in layer.named_parameters()]
    flags = {
        name: value
        for name, value in vars(attention).items()
        if isinstance(value, (int, float, str, bool, type(None))) and name not in ("layer_idx", "training")
    }
    return repr((type(layer).__name__, type(attention).__name__, shapes, sorted(flags.items(), key=str)))


class Embed(nn.Module):
    """input_ids [1,T], position [1] -> hidden [1,T,hidden], positions [1,T], kv_length [1]."""

    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.embed = embed

    def forward(self, input_ids: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, ...]:
        length = input_ids.shape[1]
        return self.embed(input_ids), position[:, None] + torch.arange(length)[None], position + length


class Layer(nn.Module):
    """One decoder layer with its slice of the cache."""

    def __init__(self, layer: nn.Module, rotary_dim: int, context: int) -> None:
        super().__init__()
        self.layer = layer
        self.context = context
        self.rotary_dim = rotary_dim
        self.apply_rotary = sys.modules[type(layer.self_attn).__module__].apply_rotary_pos_emb
        self.interleaved = rotary_layout(self.apply_rotary, int(layer.self_attn.head_dim), rotary_dim)
        self.norms = rms_norms(layer)

    def forward(
        self,
        hidden: torch.Tensor,
        position: torch.Tensor,
        positions: torch.Tensor,
        kv_length: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        past_key: torch.Tensor,
        past_value: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        cache = LayerCache(past_key, past_value, position)
        with rotary_as_op(self, positions), rms_norm_as_op(self.norms):
            hidden = self.layer(
                hidden,
                attention_mask=None,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                position_embeddings=(cos, sin),
                edgeexport=(kv_length, self.context),
            )
        if isinstance(hidden, tuple):
            hidden = hidden[0]
        return hidden, cache.key, cache.value


class Head(nn.Module):
    """hidden [1,T,hidden] -> logits [1,1,V] of the last token."""

    def __init__(self, norm: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.head = head
        self.norms = rms_norms(norm)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with rms_norm_as_op(self.norms):
            logits: torch.Tensor = self.head(self.norm(hidden[:, -1:]))
        return logits


class LayerCache:
    """What a layer takes for its Cache: `update` writes at `position` and gives the whole cache back."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor, position: torch.Tensor) -> None:
        self.key, self.value, self.position = key, value, position

    def update(self, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.key = self._scatter(self.key, key)
        self.value = self._scatter(self.value, value)
        return self.key, self.value

    def get_seq_length(self, *_: Any) -> int:
        return 0

    def _scatter(self, past: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        return torch.onnx.ops.symbolic(
            "TensorScatter",
            (past, update, self.position),
            {"axis": -2, "mode": "linear"},
            dtype=past.dtype,
            shape=past.shape,
            version=ATTENTION_VERSION,
        )


def attention_as_op(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    edgeexport: tuple[torch.Tensor, int],
    dropout: float = 0.0,
    sliding_window: int | None = None,
    position_ids: Any = None,
    use_cache: Any = None,
    is_causal: bool | None = None,
    **unknown: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface as one Attention op; what the op cannot express is refused, not dropped."""
    kv_length, context = edgeexport
    changed = {name for name, argument in unknown.items() if argument is not None}
    if sliding_window is not None and sliding_window < context:
        changed.add(f"sliding_window={sliding_window}")
    if dropout or is_causal is False:
        changed.add("dropout" if dropout else "is_causal=False")
    if changed:
        raise errors.attention_not_plain(type(module).__name__, sorted(changed))
    scale = float(scaling) if scaling is not None else float(query.shape[-1]) ** -0.5
    out = torch.onnx.ops.symbolic(
        "Attention",
        (query, key, value, None, None, None, kv_length),
        {"is_causal": 1, "scale": scale},
        dtype=query.dtype,
        shape=query.shape,
        version=ATTENTION_VERSION,
    )
    return out.transpose(1, 2), None


AttentionInterface.register(ATTENTION, attention_as_op)


@contextmanager
def rotary_as_op(stage: Layer, positions: torch.Tensor) -> Iterator[None]:
    """Within, the attention's `apply_rotary_pos_emb` emits RotaryEmbedding over (cos, sin) tables [S, rotary_dim/2]."""
    room: Any = sys.modules[type(stage.layer.self_attn).__module__]
    attributes = {"interleaved": stage.interleaved, "rotary_embedding_dim": stage.rotary_dim}

    def emit(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *_: Any) -> tuple[Any, Any]:
        def rotate(x: torch.Tensor) -> torch.Tensor:
            return torch.onnx.ops.symbolic(
                "RotaryEmbedding",
                (x, cos, sin, positions),
                attributes,
                dtype=x.dtype,
                shape=x.shape,
                version=ROPE_VERSION,
            )

        return rotate(q), rotate(k)

    room.apply_rotary_pos_emb = emit
    try:
        yield
    finally:
        room.apply_rotary_pos_emb = stage.apply_rotary


def rotary_layout(apply_rotary: Any, head_dim: int, rotary_dim: int) -> int:
    """Which RotaryEmbedding a model's own rotary function is: 0 half-split, 1 interleaved.

    Found by running it on random numbers beside both layouts as ONNX defines them. Source: ONNX RotaryEmbedding-23.

    Raises: ExportError `rope-not-recognised` when it is neither.
    """
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        q = torch.randn(1, 2, 3, head_dim, generator=generator)
        angle = torch.randn(1, 3, rotary_dim // 2, generator=generator)
        cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
        got = apply_rotary(q, q, cos, sin)[0]
        for interleaved in (0, 1):
            if torch.allclose(got, _rotate(q, angle.cos()[:, None], angle.sin()[:, None], interleaved), atol=1e-5):
                return interleaved
    raise errors.rope_not_recognised(apply_rotary.__module__)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: int) -> torch.Tensor:
    """ONNX RotaryEmbedding-23 on x [B,H,T,D] with cos, sin [B,1,T,R/2]; dims from R on pass through."""
    rotary = 2 * cos.shape[-1]
    rotated, rest = x[..., :rotary], x[..., rotary:]
    if interleaved:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        out = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    else:
        a, b = rotated.chunk(2, -1)
        out = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
    return torch.cat((out, rest), -1)


def rms_norms(root: nn.Module) -> list[nn.Module]:
    """The norms at and under `root` whose numbers are those of RMSNormalization."""
    return [module for module in root.modules() if _is_rms_norm(module)]


@contextmanager
def rms_norm_as_op(norms: list[nn.Module]) -> Iterator[None]:
    """Within, these norms are traced as one RMSNormalization each."""
    for module in norms:
        module.forward = types.MethodType(_rms_norm, module)
    try:
        yield
    finally:
        for module in norms:
            del module.forward


def _rms_norm(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    return nn.functional.rms_norm(hidden, (hidden.shape[-1],), module.weight, module.variance_epsilon)


def _is_rms_norm(module: nn.Module) -> bool:
    """Whether a small real copy of the module equals x / sqrt(mean(x^2) + eps) * weight."""
    if list(dict(module.named_parameters())) != ["weight"] or not hasattr(module, "variance_epsilon"):
        return False
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        probe = type(module)(8, eps=module.variance_epsilon)
        probe.weight.copy_(torch.randn(8, generator=generator))
        x = torch.randn(2, 8, generator=generator)
        return bool(torch.allclose(probe(x), _rms_norm(probe, x), atol=1e-5))


def as_numpy(tensor: torch.Tensor) -> Array:
    """A detached float32 copy for those who do not know torch."""
    return np.asarray(tensor.detach().float().cpu().numpy())
