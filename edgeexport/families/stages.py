"""The torch side of the generic decoder: transformers' own modules, cut into stages that trace to the dialect.

Nothing here computes a model's arithmetic anew. Three things are swapped while a layer is traced, each for one that
emits a single ONNX op instead of many: the attention function (transformers' AttentionInterface), the cache, and
the rotary and RMSNorm functions. The last two are recognised by their numbers, not by their names: a function that
does not equal the op on random inputs is left as it is, and the dialect check then says what it decomposed into.
"""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AutoModelForCausalLM

from edgeexport import errors
from edgeexport.core import Array, Example, OracleModel, Stage, TensorRef
from edgeexport.families.configured import blamed, transformers_config
from edgeexport.families.decoder import missing_tensors

ATTENTION = "edgeexport"
WHOLE_ATTENTION = "edgeexport_flash"
"""transformers takes the path without data-dependent splits where the implementation's name contains "flash"."""
ROPE_VERSION = 23
ATTENTION_VERSION = 24


def fake_model(config: Mapping[str, Any], auto: Any = AutoModelForCausalLM) -> Any:
    """transformers' model at full depth with fake float32 weights: shapes without storage.

    Raises: CheckpointError `bad-config`.
    """
    made = transformers_config(config)
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings(), blamed(config):
        warnings.simplefilter("ignore")
        model = auto.from_config(made, dtype=torch.float32, attn_implementation=ATTENTION)
    return model.eval()


@dataclass(frozen=True)
class TextModel:
    """Where a model keeps its decoder: `body` has embed_tokens, layers, norm and rotary_emb; `prefix` and `head_name`
    are what the checkpoint's tensors of body and head begin with."""

    body: Any
    head: Any
    prefix: str
    head_name: str
    tied: bool
    sections: tuple[int, ...] = ()
    """M-RoPE: how many rotary pairs take their angle from each of the position rows, in turn."""


def causal_model(config: Mapping[str, Any]) -> TextModel:
    """The parts of a plain causal language model."""
    model = fake_model(config)
    return TextModel(model.model, model.lm_head, "model.", "lm_head", bool(config.get("tie_word_embeddings", False)))


def rope_tables(text: TextModel, context: int) -> dict[str, Array]:
    """cos and sin for positions 0..context-1 as the model computes them: float32 [context, rotary_dim / 2] each, cut
    into the columns of each M-RoPE section where the model has them."""
    rotary = type(text.body.rotary_emb)(text.body.rotary_emb.config)
    with torch.no_grad():
        where = torch.arange(context)[None]
        cos, sin = (
            _half(table[0]) for table in rotary(torch.zeros(1, 1), where.expand(3, 1, -1) if text.sections else where)
        )
    if cos is None or sin is None:
        raise errors.rope_not_static(type(rotary).__name__, ("tables of which one half repeats the other",))
    if not (cos.isfinite().all() and sin.isfinite().all()):
        rope = getattr(text.body.config, "rope_parameters", None)
        raise errors.bad_config("rope_parameters", rope, "the angles that follow from it are not finite numbers")
    tables = {"rope.cos": cos, "rope.sin": sin}
    if not text.sections:
        return {name: table.numpy().copy() for name, table in tables.items()}
    return {
        f"{name}.{i}": part.numpy().copy()
        for name, table in tables.items()
        for i, part in enumerate(table.split(list(text.sections), -1))
    }


def _half(table: torch.Tensor) -> torch.Tensor | None:
    """One column per rotary pair of a table [S, rotary_dim] that has each twice: halves alike, or neighbours alike."""
    width = table.shape[-1] // 2
    if torch.equal(table[:, :width], table[:, width:]):
        return table[:, :width]
    return table[:, 0::2] if torch.equal(table[:, 0::2], table[:, 1::2]) else None


def embed_stages(text: TextModel, tensors: Mapping[str, TensorRef]) -> list[Stage]:
    """The looked-up embeddings as a component of their own: input_ids -> inputs_embeds."""
    module = Lookup(text.body.embed_tokens)
    name = f"{text.prefix}embed_tokens.weight"
    missing_tensors({name: tuple(text.body.embed_tokens.weight.shape)}, tensors)
    return [Stage("embed", "embed", module, ("input_ids",), ("inputs_embeds",), {"embed.weight": name})]


def decoder_stages(
    text: TextModel, tensors: Mapping[str, TensorRef], context: int, *, embeds: bool = False
) -> list[Stage]:
    """The stages of a causal language model: embed (or, with `embeds`, positions alone), one per layer, head.

    Raises: CheckpointError when a parameter of the model is not in the checkpoint or has another shape.
    """
    layers = text.body.layers
    rotary_dim = 2 * sum(table.shape[-1] for name, table in rope_tables(text, 1).items() if name.startswith("rope.cos"))
    embedding = f"{text.prefix}embed_tokens.weight"
    first = "inputs_embeds" if embeds else "hidden"
    rope = ("cos", "sin") if text.sections else ("positions", "rope.cos", "rope.sin")
    if text.sections:
        tables = [f"rope.{kind}.{i}" for kind in ("cos", "sin") for i in range(len(text.sections))]
        check_sections(text)
        stages = [
            Stage(
                "positions", "positions", SectionAngles(len(text.sections)),
                ("inputs_embeds", "position", "rope_positions", *tables), ("kv_length", "cos", "sin"), {},
            )
        ]  # fmt: skip
    elif embeds:
        stages = [
            Stage("positions", "positions", Positions(), ("inputs_embeds", "position"), ("positions", "kv_length"), {})
        ]
    else:
        stages = [
            Stage(
                "embed", "embed", Embed(text.body.embed_tokens), ("input_ids", "position"),
                ("hidden", "positions", "kv_length"), {"embed.weight": embedding},
            )
        ]  # fmt: skip
    for i, layer in enumerate(layers):
        cache = (f"past_key.{i}", f"past_value.{i}")
        module = (SectionLayer if text.sections else Layer)(layer, rotary_dim, context)
        stages.append(
            Stage(
                name=f"layers.{i}",
                kind=_layer_kind(layer),
                module=module,
                inputs=(first if i == 0 else "hidden", "position", "kv_length", *rope, *cache),
                outputs=("hidden", f"present_key.{i}", f"present_value.{i}"),
                parameters={f"layer.{name}": f"{text.prefix}layers.{i}.{name}" for name, _ in layer.named_parameters()},
            )
        )
    head = {f"norm.{name}": f"{text.prefix}norm.{name}" for name, _ in text.body.norm.named_parameters()}
    head |= {f"head.{name}": f"{text.head_name}.{name}" for name, _ in text.head.named_parameters()}
    if text.tied:
        head["head.weight"] = embedding
    stages.append(Stage("head", "head", Head(text.body.norm, text.head), ("hidden",), ("logits",), head))
    missing_parameters(stages, tensors)
    return stages


def missing_parameters(stages: Sequence[Stage], tensors: Mapping[str, TensorRef]) -> None:
    """Raises: CheckpointError with every parameter of the stages that the checkpoint lacks or has in another shape."""
    expected: dict[str, tuple[int, ...]] = {}
    for stage in stages:
        held = dict([*stage.module.named_parameters(), *stage.module.named_buffers()])
        expected |= {tensor: tuple(held[name].shape) for name, tensor in stage.parameters.items()}
    missing_tensors(expected, tensors)


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


class Lookup(nn.Module):
    """input_ids [1,T] -> inputs_embeds [1,T,hidden]."""

    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.embed = embed

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        looked_up: torch.Tensor = self.embed(input_ids)
        return looked_up


class Positions(nn.Module):
    """inputs_embeds [1,T,hidden], position [1] -> positions [1,T], kv_length [1]."""

    def forward(self, inputs_embeds: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, ...]:
        length = inputs_embeds.shape[1]
        return position[:, None] + torch.arange(length)[None], position + length


class SectionAngles(nn.Module):
    """M-RoPE, once for all layers: inputs_embeds [1,T,hidden], position [1], rope_positions [3,1,T] and the tables'
    sections -> kv_length [1], cos and sin [1,T,rotary_dim/2]. Section i takes its angle from position row i mod 3."""

    def __init__(self, sections: int) -> None:
        super().__init__()
        self.sections = sections

    def forward(
        self, inputs_embeds: torch.Tensor, position: torch.Tensor, rope_positions: torch.Tensor, *tables: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        cos, sin = (
            torch.cat([nn.functional.embedding(rope_positions[i % 3], table) for i, table in enumerate(half)], -1)
            for half in (tables[: self.sections], tables[self.sections :])
        )
        return position + inputs_embeds.shape[1], cos, sin


class Layer(nn.Module):
    """One decoder layer with its slice of the cache, rotated by tables cos and sin [S, rotary_dim/2]."""

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
        kv_length: torch.Tensor,
        positions: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        past_key: torch.Tensor,
        past_value: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        return self.run(hidden, position, kv_length, (cos, sin, positions), past_key, past_value)

    def run(
        self,
        hidden: torch.Tensor,
        position: torch.Tensor,
        kv_length: torch.Tensor,
        rotary: tuple[torch.Tensor, ...],
        past_key: torch.Tensor,
        past_value: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """`rotary` is what RotaryEmbedding takes behind its first input."""
        cache = LayerCache(past_key, past_value, position)
        with rotary_as_op(self, rotary), rms_norm_as_op(self.norms):
            hidden = self.layer(
                hidden,
                attention_mask=None,
                position_ids=None,
                past_key_values=cache,
                use_cache=True,
                position_embeddings=rotary[:2],
                edgeexport=(kv_length, self.context),
            )
        if isinstance(hidden, tuple):
            hidden = hidden[0]
        return hidden, cache.key, cache.value


class SectionLayer(Layer):
    """A layer whose angles come per token: cos and sin [1,T,rotary_dim/2]."""

    def forward(  # type: ignore[override]
        self,
        hidden: torch.Tensor,
        position: torch.Tensor,
        kv_length: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        past_key: torch.Tensor,
        past_value: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        return self.run(hidden, position, kv_length, (cos, sin), past_key, past_value)


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


def whole_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, *, scaling: float, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """transformers' attention interface over one picture or sound, each position attending to all."""
    return attention_over_all(query, key, value, scale=float(scaling)).transpose(1, 2), None


def attention_over_all(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float | None = None
) -> torch.Tensor:
    """torch's scaled_dot_product_attention without a mask, [B,H,T,D] over [B,H,S,D], as one Attention op."""
    return torch.onnx.ops.symbolic(
        "Attention", (query, key, value), {"scale": scale or float(query.shape[-1]) ** -0.5},
        dtype=query.dtype, shape=query.shape, version=ATTENTION_VERSION,
    )  # fmt: skip


AttentionInterface.register(ATTENTION, attention_as_op)
AttentionInterface.register(WHOLE_ATTENTION, whole_attention)


@contextmanager
def rotary_as_op(stage: Layer, rotary: tuple[torch.Tensor, ...]) -> Iterator[None]:
    """Within, the attention's `apply_rotary_pos_emb` emits RotaryEmbedding over `rotary`: tables [S, rotary_dim/2] and
    the tokens' positions in them, or the tokens' own cos and sin [1,T,rotary_dim/2]."""
    room: Any = sys.modules[type(stage.layer.self_attn).__module__]
    attributes = {"interleaved": stage.interleaved, "rotary_embedding_dim": stage.rotary_dim}

    def emit(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *_: Any) -> tuple[Any, Any]:
        return rotate_as_op(q, rotary, attributes), rotate_as_op(k, rotary, attributes)

    room.apply_rotary_pos_emb = emit
    try:
        yield
    finally:
        room.apply_rotary_pos_emb = stage.apply_rotary


def rotate_as_op(x: torch.Tensor, rotary: tuple[torch.Tensor, ...], attributes: Mapping[str, int]) -> torch.Tensor:
    """RotaryEmbedding of x [B,H,T,D]."""
    return torch.onnx.ops.symbolic(
        "RotaryEmbedding", (x, *rotary), dict(attributes), dtype=x.dtype, shape=x.shape, version=ROPE_VERSION
    )


def rotary_layout(apply_rotary: Any, head_dim: int, rotary_dim: int) -> int:
    """Which RotaryEmbedding a model's own rotary function is: 0 half-split, 1 interleaved.

    Found by running it on random numbers beside both layouts as ONNX defines them, over tables that hold each angle
    twice, as halves or as neighbours: whichever the model's own tables do. Source: ONNX RotaryEmbedding-23.

    Raises: ExportError `rope-not-recognised` when it is neither.
    """
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        q = torch.randn(1, 2, 3, head_dim, generator=generator)
        angle = torch.randn(1, 3, rotary_dim // 2, generator=generator)
        for doubled in (torch.cat((angle, angle), -1), angle.repeat_interleave(2, -1)):
            got = apply_rotary(q, q, doubled.cos(), doubled.sin())[0]
            for interleaved in (0, 1):
                if torch.allclose(got, _rotate(q, angle.cos()[:, None], angle.sin()[:, None], interleaved), atol=1e-5):
                    return interleaved
    raise errors.rope_not_recognised(apply_rotary.__module__)


def check_sections(text: TextModel) -> None:
    """Hold the sections against the model's own rotary embedding, on three position rows that differ.

    Raises: ExportError `rope-not-recognised`.
    """
    rotary = type(text.body.rotary_emb)(text.body.rotary_emb.config)
    rows = torch.tensor([[[3, 5, 7, 1]], [[2, 4, 0, 6]], [[7, 1, 6, 2]]])
    tables = [torch.from_numpy(table) for table in rope_tables(text, 8).values()]
    with torch.no_grad():
        want = rotary(torch.zeros(1, 1), rows)
        got = SectionAngles(len(text.sections))(torch.zeros(1, 4, 1), torch.zeros(1, dtype=torch.int64), rows, *tables)
    for ours, theirs in zip(got[1:], want, strict=True):
        half = _half(theirs[0])
        if half is None or not torch.equal(ours[0], half):
            raise errors.rope_not_recognised(type(rotary).__module__)


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


def oracle_model(config: Mapping[str, Any], auto: Any = AutoModelForCausalLM) -> Any:
    """transformers' unmodified model, without storage. Raises: CheckpointError `bad-config`."""
    made = transformers_config(config)

    def make() -> Any:
        with blamed(config):
            model = auto.from_config(made, dtype=torch.float32)
        model.tie_weights()
        return model

    return empty_model(make)


def empty_model(make: Callable[[], Any]) -> Any:
    """What `make` makes, on the meta device, but for its computed buffers (rotary frequencies), which are real."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make().eval()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if "rotary" in name or "rotary" in type(child).__name__.lower():
                setattr(module, name, type(child)(child.config))
    return model


def causal_oracle(config: Mapping[str, Any]) -> OracleModel:
    """A plain causal language model: all examples are one batch."""
    model = oracle_model(config)

    def logits(examples: Sequence[Example], firsts: Sequence[int]) -> list[Array]:
        with only_rows(model.get_output_embeddings(), examples, firsts) as split:
            return split(model(input_ids=padded(examples), use_cache=False).logits)

    return OracleModel(model, tuple(model.model.layers), logits)


@contextmanager
def only_rows(
    head: nn.Module, examples: Sequence[Example], firsts: Sequence[int]
) -> Iterator[Callable[[torch.Tensor], list[Array]]]:
    """Within, the lm_head multiplies nothing but the rows that are asked for: of each example [T] those from its
    `first` on. A batch's longest prompt has many rows of a large vocabulary that nobody reads.

    Gives the function that splits the logits [1, rows, V] into float32 [T - first, V] for each example.
    """
    counts = [len(example.tokens) - first for example, first in zip(examples, firsts, strict=True)]

    def choose(_: nn.Module, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
        rows = zip(args[0], firsts, counts, strict=True)
        return torch.cat([row[first : first + count] for row, first, count in rows])[None]

    hook = head.register_forward_pre_hook(choose)
    try:
        yield lambda logits: [each.numpy() for each in logits[0].split(counts)]
    finally:
        hook.remove()


def padded(examples: Sequence[Example]) -> torch.Tensor:
    """Token ids int64 [examples, longest], zeros behind the shorter ones: what comes later changes no causal logits."""
    length = max(len(example.tokens) for example in examples)
    batch = torch.zeros(len(examples), length, dtype=torch.int64)
    for row, example in zip(batch, examples, strict=True):
        row[: len(example.tokens)] = torch.from_numpy(example.tokens)
    return batch
