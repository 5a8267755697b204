"""The generic decoder: any causal language model of transformers whose layers follow Llama's calling convention.

The torch side (the stages that are traced) lives in stages.py; here is what sizes, plans and graphs need to know
without importing torch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgeexport import errors
from edgeexport.core import Array, Checkpoint, Component, Dim, Geometry, OracleModel, Stage, TensorRef, TensorSpec
from edgeexport.limits import UNTRUSTED

if TYPE_CHECKING:
    from edgeexport.families.stages import TextModel

DECODER_OPS = frozenset(
    {
        "Add", "Attention", "Cast", "Gather", "MatMul", "Mul", "RMSNormalization", "Range", "Reshape",
        "RotaryEmbedding", "Shape", "Sigmoid", "Slice", "Squeeze", "TensorScatter", "Transpose", "Unsqueeze",
    }
)  # fmt: skip
"""Dialect ops of a decoder's graph; a test compares it with what the trace of every family emits."""

STATIC_ROPE = {"default", "linear", "llama3", "yarn"}
"""Rotary types whose table depends on the position alone. `dynamic` and `longrope` also depend on the length of the
sequence, so that no fixed table is right for them."""

ROPE_NUMBERS = frozenset(
    {
        "attention_factor", "beta_fast", "beta_slow", "factor", "high_freq_factor", "low_freq_factor", "mscale",
        "mscale_all_dim", "original_max_position_embeddings", "partial_rotary_factor", "rope_theta",
    }
)  # fmt: skip
"""What transformers' rotary types compute with, and does not check."""


@dataclass(frozen=True)
class DecoderFamily:
    """One `model_type`. `tiny` is a random-weight configuration small enough for every test."""

    model_type: str
    ops: frozenset[str]
    tiny: Mapping[str, Any]
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    """Suffixes of checkpoint tensors that the model recomputes and never reads."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What the configuration's class sets and config.json may leave out, where that is not what `geometry_of` takes."""
    table: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    prefix: str = "model."
    kernels: tuple[str, ...] = ()
    questions: Mapping[str, str] = field(default_factory=dict)

    def geometry(self, config: Mapping[str, Any]) -> Geometry:
        """Layers, heads and sizes from config.json. Raises: CheckpointError `bad-config`."""
        return geometry_of(config)

    def completed(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The values with those that the configuration's class sets where they are left out."""
        return {**self.defaults, **config}

    def untied(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The values with lm_head a matrix of its own."""
        return {**config, "tie_word_embeddings": False}

    def unused(self, checkpoint: Checkpoint) -> frozenset[str]:
        """Checkpoint tensors that this model does not read, and rightly so (a tied head, recomputed buffers)."""
        names = {name for name in checkpoint.tensors if name.endswith(self.ignored)}
        if self.geometry(checkpoint.config).tied:
            names.add(self.head)
        return frozenset(names & checkpoint.tensors.keys())

    def components(self, checkpoint: Checkpoint, context: int, shapes: Mapping[str, Any]) -> list[Component]:
        """The parts of the model: for a plain decoder, one. `shapes` is the target's, of no use here.

        Raises: UsageError `context-too-long`; ExportError `rope-not-static`.
        """
        geometry = self.geometry(checkpoint.config)
        refuse_context(context, geometry)
        refuse_rope(checkpoint.config)

        @functools.cache
        def text() -> TextModel:
            from edgeexport.families.stages import causal_model

            return causal_model(checkpoint.config)

        return [decoder_component(text, checkpoint.tensors, geometry, context)]

    def preprocess(self, checkpoint: Checkpoint, shapes: Mapping[str, Any]) -> None:
        """Text alone needs no preparation."""

    def oracle(self, config: Mapping[str, Any]) -> OracleModel:
        """transformers' unmodified model. Needs torch."""
        from edgeexport.families.stages import causal_oracle

        return causal_oracle(config)


def geometry_of(config: Mapping[str, Any]) -> Geometry:
    """Layers, heads and sizes from the values of a text model's config.

    Raises: CheckpointError `bad-config` when a number is missing, not a positive integer, or contradicts another.
    """
    hidden = positive(config, "hidden_size")
    heads = positive(config, "num_attention_heads", most=UNTRUSTED.heads)
    kv_heads = positive(config, "num_key_value_heads") if config.get("num_key_value_heads") is not None else heads
    if config.get("head_dim") is None and heads > hidden:
        raise errors.bad_config("num_attention_heads", heads, f"hidden_size {hidden} leaves no width for a head")
    given = config.get("head_dim") is not None
    head_dim = positive(config, "head_dim", most=UNTRUSTED.head_dim) if given else hidden // heads
    if heads % kv_heads:
        raise errors.bad_config("num_key_value_heads", kv_heads, f"it must divide num_attention_heads {heads}")
    return Geometry(
        layers=positive(config, "num_hidden_layers", most=UNTRUSTED.layers),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=positive(config, "vocab_size"),
        max_context=positive(config, "max_position_embeddings"),
        tied=flag(config, "tie_word_embeddings"),
    )


def refuse_context(context: int, geometry: Geometry) -> None:
    """Raises: UsageError `context-too-long`."""
    if context > geometry.max_context:
        raise errors.context_too_long(context, geometry.max_context)


def refuse_rope(config: Mapping[str, Any]) -> None:
    """Raises: ExportError `rope-not-static` for a rotary type that no fixed table is right for; CheckpointError
    `bad-config`."""
    rope = rope_of(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str):
        raise errors.bad_config("rope_parameters.rope_type", kind, "the name of a rotary type is needed")
    if kind not in STATIC_ROPE:
        raise errors.rope_not_static(kind[:80], STATIC_ROPE)


def rope_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """`rope_parameters`, in older files `rope_scaling`; empty where there is neither. Raises: CheckpointError
    `bad-config`, also for a number of either that is none."""
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = config.get(key) or {}
    if not isinstance(rope, Mapping):
        raise errors.bad_config(key, rope, "a table of values is needed")
    for at, values in (("", config), (f"{key}.", rope)):
        for name in ROPE_NUMBERS & values.keys():
            value = values[name]
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise errors.bad_config(f"{at}{name}", value, "a number is needed")
    return rope


def decoder_component(
    text: Callable[[], TextModel],
    tensors: Mapping[str, TensorRef],
    geometry: Geometry,
    context: int,
    *,
    embeds: bool = False,
    rope_pairs: int = 0,
) -> Component:
    """The decoder at batch 1 with `context` cache slots (S).

    inputs   input_ids int64 [1,T], or with `embeds` inputs_embeds float32 [1,T,hidden]; position int64 [1];
             with `rope_pairs` (M-RoPE, rotary_dim / 2) rope_positions int64 [3,1,T];
             past_key.{i}, past_value.{i} float32 [1,KV,S,D]
    outputs  logits float32 [1,1,V] of the last token; present_key.{i}, present_value.{i}
    """
    tokens = Dim("T", 1, context)
    cache = (1, geometry.kv_heads, context, geometry.head_dim)
    past = [f"past_{kind}.{i}" for i in range(geometry.layers) for kind in ("key", "value")]
    present = [name.replace("past", "present") for name in past]
    fed = (
        TensorSpec("inputs_embeds", "float32", (1, tokens, geometry.hidden))
        if embeds
        else TensorSpec("input_ids", "int64", (1, tokens))
    )
    rope = (TensorSpec("rope_positions", "int64", (3, 1, tokens)),) if rope_pairs else ()
    specs = (
        fed,
        TensorSpec("position", "int64", (1,)),
        *rope,
        *(TensorSpec(name, "float32", cache) for name in past),
    )
    outputs = (
        TensorSpec("logits", "float32", (1, 1, geometry.vocab)),
        *(TensorSpec(name, "float32", cache) for name in present),
    )
    inner = (
        TensorSpec("hidden", "float32", (1, tokens, geometry.hidden)),
        TensorSpec("positions", "int64", (1, tokens)),
        TensorSpec("kv_length", "int64", (1,)),
        TensorSpec("cos", "float32", (1, tokens, rope_pairs)),
        TensorSpec("sin", "float32", (1, tokens, rope_pairs)),
    )

    def stages() -> list[Stage]:
        from edgeexport.families.stages import decoder_stages

        return decoder_stages(text(), tensors, context, embeds=embeds)

    def constants() -> Mapping[str, Array]:
        from edgeexport.families.stages import rope_tables

        return rope_tables(text(), context)

    return Component(
        name="decoder",
        inputs=specs,
        outputs=outputs,
        state=tuple(zip(past, present, strict=True)),
        stages=stages,
        values={spec.name: spec for spec in (*specs, *outputs, *inner)},
        constants=constants,
    )


def embed_component(
    text: Callable[[], TextModel], tensors: Mapping[str, TensorRef], geometry: Geometry, context: int
) -> Component:
    """The embedding table by itself: input_ids int64 [1,T] -> inputs_embeds float32 [1,T,hidden]."""
    tokens = Dim("T", 1, context)
    specs = (TensorSpec("input_ids", "int64", (1, tokens)),)
    outputs = (TensorSpec("inputs_embeds", "float32", (1, tokens, geometry.hidden)),)

    def stages() -> list[Stage]:
        from edgeexport.families.stages import embed_stages

        return embed_stages(text(), tensors)

    return Component("embed", specs, outputs, (), stages, {spec.name: spec for spec in (*specs, *outputs)})


def missing_tensors(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, TensorRef]) -> None:
    """Compare the model's parameters with the checkpoint's index, all at once. A convolution's kernel may stand for
    the matrix [out, K] of its rows.

    Raises: CheckpointError with one finding per tensor that is missing or has another shape.
    """
    problems = [errors.missing_tensor(name, shape, found) for name, shape in expected.items() if name not in found]
    problems += [
        errors.shape_mismatch(name, shape, found[name].shape)
        for name, shape in expected.items()
        if name in found and found[name].shape != shape and not _kernel_rows(found[name].shape, shape)
    ]
    if problems:
        raise errors.CheckpointError(*problems)


def unread_tensors(
    tensors: Mapping[str, TensorRef],
    used: Set[str],
    unused: Set[str],
    rows: Callable[[str, int, int], Array],
) -> list[str]:
    """The checkpoint's tensors that no part of the model reads, sorted: neither `used` nor rightly `unused`, nor a bias
    of zeros, as some tools (AutoGPTQ) give every matrix that they quantise."""

    def adds_nothing(name: str) -> bool:
        shape = tensors[name].shape
        return name.endswith(".bias") and len(shape) == 1 and not rows(name, 0, shape[0]).any()

    return sorted(name for name in tensors.keys() - used - unused if not adds_nothing(name))


def _kernel_rows(found: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return len(found) > len(shape) == 2 and found[0] == shape[0] and math.prod(found[1:]) == shape[1]


def positive(config: Mapping[str, Any], key: str, *, most: int = UNTRUSTED.size) -> int:
    """A size from config.json. Raises: CheckpointError `bad-config`."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
        raise errors.bad_config(key, value, f"a positive integer is needed, {most} at most")
    return value


def flag(config: Mapping[str, Any], key: str) -> bool:
    """A switch from config.json, off where it is not there. Raises: CheckpointError `bad-config`."""
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise errors.bad_config(key, value, "true or false is needed")
    return bool(value)
