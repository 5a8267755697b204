"""The generic decoder: any causal language model of transformers whose layers follow Llama's calling convention.

The torch side (the stages that are traced) lives in stages.py; here is what sizes, plans and graphs need to know
without importing torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgeexport import errors
from edgeexport.core import Array, Checkpoint, Component, Dim, Geometry, Stage, TensorRef, TensorSpec

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


@dataclass(frozen=True)
class DecoderFamily:
    """One `model_type`. `tiny` is a random-weight configuration small enough for every test."""

    model_type: str
    ops: frozenset[str]
    tiny: Mapping[str, Any]
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    """Suffixes of checkpoint tensors that the model recomputes and never reads."""

    def geometry(self, config: Mapping[str, Any]) -> Geometry:
        """Layers, heads and sizes from config.json.

        Raises: CheckpointError `bad-config` when a number is missing, not a positive integer, or contradicts another.
        """
        hidden = _positive(config, "hidden_size")
        heads = _positive(config, "num_attention_heads")
        kv_heads = _positive(config, "num_key_value_heads") if config.get("num_key_value_heads") is not None else heads
        head_dim = _positive(config, "head_dim") if config.get("head_dim") is not None else hidden // heads
        if heads % kv_heads:
            raise errors.bad_config("num_key_value_heads", kv_heads, f"it must divide num_attention_heads {heads}")
        return Geometry(
            layers=_positive(config, "num_hidden_layers"),
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocab=_positive(config, "vocab_size"),
            max_context=_positive(config, "max_position_embeddings"),
            tied=bool(config.get("tie_word_embeddings", False)),
        )

    def unused(self, checkpoint: Checkpoint) -> frozenset[str]:
        """Checkpoint tensors that this model does not read, and rightly so (a tied head, recomputed buffers)."""
        names = {name for name in checkpoint.tensors if name.endswith(self.ignored)}
        if self.geometry(checkpoint.config).tied:
            names.add("lm_head.weight")
        return frozenset(names & checkpoint.tensors.keys())

    def components(self, checkpoint: Checkpoint, context: int) -> list[Component]:
        """The parts of the model: for a plain decoder, one.

        Raises: UsageError `context-too-long`; ExportError `rope-not-static`.
        """
        geometry = self.geometry(checkpoint.config)
        if context > geometry.max_context:
            raise errors.context_too_long(context, geometry.max_context)
        rope = checkpoint.config.get("rope_parameters") or checkpoint.config.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, Mapping) else "default"
        if kind not in STATIC_ROPE:
            raise errors.rope_not_static(str(kind), STATIC_ROPE)
        return [decoder_component(checkpoint, geometry, context)]


def decoder_component(checkpoint: Checkpoint, geometry: Geometry, context: int) -> Component:
    """The decoder at batch 1 with `context` cache slots (S).

    inputs   input_ids int64 [1,T]; position int64 [1]; past_key.{i}, past_value.{i} float32 [1,KV,S,D]
    outputs  logits float32 [1,1,V] of the last token; present_key.{i}, present_value.{i}
    """
    tokens = Dim("T", 1, context)
    cache = (1, geometry.kv_heads, context, geometry.head_dim)
    past = [f"past_{kind}.{i}" for i in range(geometry.layers) for kind in ("key", "value")]
    present = [name.replace("past", "present") for name in past]
    specs = (
        TensorSpec("input_ids", "int64", (1, tokens)),
        TensorSpec("position", "int64", (1,)),
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
    )

    def stages() -> list[Stage]:
        from edgeexport.families.stages import decoder_stages

        return decoder_stages(checkpoint.config, checkpoint.tensors, context)

    def constants() -> Mapping[str, Array]:
        from edgeexport.families.stages import rope_tables

        return rope_tables(checkpoint.config, context)

    return Component(
        name="decoder",
        inputs=specs,
        outputs=outputs,
        state=tuple(zip(past, present, strict=True)),
        stages=stages,
        values={spec.name: spec for spec in (*specs, *outputs, *inner)},
        constants=constants,
    )


def missing_tensors(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, TensorRef]) -> None:
    """Compare the model's parameters with the checkpoint's index, all at once.

    Raises: CheckpointError with one finding per tensor that is missing or has another shape.
    """
    problems = [errors.missing_tensor(name, shape, found) for name, shape in expected.items() if name not in found]
    problems += [
        errors.shape_mismatch(name, shape, found[name].shape)
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    if problems:
        raise errors.CheckpointError(*problems)


def _positive(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 40:
        raise errors.bad_config(key, value, "a positive integer is needed")
    return value
