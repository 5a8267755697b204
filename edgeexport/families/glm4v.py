"""GLM-4.1V, and AutoGLM-Phone-9B: a vision transformer over a fixed patch grid, and GLM-4's decoder with M-RoPE.

Components: `vision` (one variant per picture grid), `embed`, `decoder`. The session splices the picture's features
into the embeddings where the prompt has image tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from edgeexport import errors
from edgeexport.core import Array, Checkpoint, Component, Geometry, OracleModel, Stage, TensorSpec
from edgeexport.families.decoder import (
    DECODER_OPS,
    decoder_component,
    embed_component,
    flag,
    geometry_of,
    positive,
    refuse_context,
    refuse_rope,
    rope_of,
)

if TYPE_CHECKING:
    from edgeexport.families.glm4v_stages import Glm4vParts
    from edgeexport.families.stages import TextModel
    from edgeexport.session.image_contract import PatchContract
    from edgeexport.session.preprocess import Preprocess

GLM4V_OPS = DECODER_OPS - {"Range"} | {"Concat", "Gelu", "LayerNormalization", "Split"}


@dataclass(frozen=True)
class Glm4vFamily:
    """One `model_type` whose modules are transformers' Glm4v. `tiny` as in `DecoderFamily`."""

    model_type: str
    tiny: Mapping[str, Any]
    ops: frozenset[str] = GLM4V_OPS
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")
    questions: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=lambda: {"num_key_value_heads": 2})
    """Of the text model, as in `DecoderFamily`."""
    table: str = "model.language_model.embed_tokens.weight"
    head: str = "lm_head.weight"
    prefix: str = "model."
    kernels: tuple[str, ...] = ("visual.patch_embed.proj.weight", "visual.downsample.weight")

    def geometry(self, config: Mapping[str, Any]) -> Geometry:
        """The text model's numbers. Raises: CheckpointError `bad-config`."""
        return geometry_of({**section(config, "text_config"), "tie_word_embeddings": _tied(config)})

    def completed(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The values with those that the configuration's class sets where they are left out."""
        return {**config, "text_config": {**self.defaults, **section(config, "text_config")}}

    def untied(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The values with lm_head a matrix of its own."""
        text = {**section(config, "text_config"), "tie_word_embeddings": False}
        return {**config, "tie_word_embeddings": False, "text_config": text}

    def unused(self, checkpoint: Checkpoint) -> frozenset[str]:
        """Checkpoint tensors that this model does not read: recomputed buffers, a tied head."""
        names = {name for name in checkpoint.tensors if name.endswith(self.ignored)}
        if _tied(checkpoint.config):
            names.add(self.head)
        return frozenset(names & checkpoint.tensors.keys())

    def components(self, checkpoint: Checkpoint, context: int, shapes: Mapping[str, Any]) -> list[Component]:
        """vision (one per grid of the target's [shapes.vision]), embed, decoder.

        Raises: UsageError `context-too-long`; ExportError `rope-not-static`; CheckpointError `bad-config`.
        """
        geometry = self.geometry(checkpoint.config)
        text_config = section(checkpoint.config, "text_config")
        refuse_context(context, geometry)
        refuse_rope(text_config)
        sections = mrope_sections(text_config, geometry)

        @functools.cache
        def parts() -> Glm4vParts:
            from edgeexport.families.glm4v_stages import load_parts

            return load_parts(checkpoint.config, sections, tied=_tied(checkpoint.config))

        def text() -> TextModel:
            return parts().text

        vision = [
            self._vision(parts, checkpoint, grid, geometry.hidden) for grid in self.preprocess(checkpoint, shapes).grids
        ]
        return [
            *vision,
            embed_component(text, checkpoint.tensors, geometry, context),
            decoder_component(text, checkpoint.tensors, geometry, context, embeds=True, rope_pairs=sum(sections)),
        ]

    def preprocess(self, checkpoint: Checkpoint, shapes: Mapping[str, Any]) -> Preprocess:
        """The picture's contract: from the checkpoint's processor, with the grids of the target's [shapes.vision].

        Raises: CheckpointError `bad-config`, `bad-preprocessor`; UsageError `shapes-missing`, `image-too-narrow`.
        """
        from edgeexport.session.image_contract import contract_from_processor
        from edgeexport.session.images import smart_grid
        from edgeexport.session.preprocess import Preprocess

        wanted = shapes.get("vision")
        if not wanted:
            raise errors.shapes_missing("vision", "screens = [[2400, 1080]] and max_pixels = 401408")
        image = contract_from_processor(checkpoint.processor)
        most = min(image.max_pixels, image.temporal_patch_size * wanted["max_pixels"])
        image = msgspec.structs.replace(image, max_pixels=max(most, image.min_pixels))
        grids = dict.fromkeys(smart_grid(height, width, image) for height, width in wanted["screens"])
        image = msgspec.structs.replace(image, grids=tuple(grids))
        _agree(image, section(checkpoint.config, "vision_config"))
        start, token, end = (
            _token_id(checkpoint.config, name)
            for name in ("image_start_token_id", "image_token_id", "image_end_token_id")
        )
        return Preprocess(image=image, image_token_id=token, image_ids=(start, token, end), position_rows=3)

    def oracle(self, config: Mapping[str, Any]) -> OracleModel:
        """transformers' unmodified model. Needs torch."""
        from edgeexport.families.glm4v_stages import glm4v_oracle

        return glm4v_oracle(config)

    def _vision(self, parts: Any, checkpoint: Checkpoint, grid: tuple[int, int], hidden: int) -> Component:
        """pixel patches float32 [N, 3 * temporal * patch^2] of one grid -> features float32 [N / merge^2, hidden]."""
        config = section(checkpoint.config, "vision_config")
        rows, columns = grid
        count = rows * columns
        patch = 3 * positive(config, "temporal_patch_size") * positive(config, "patch_size") ** 2
        width = positive(config, "hidden_size")
        merged = count // positive(config, "spatial_merge_size") ** 2
        specs = (TensorSpec("patches", "float32", (count, patch)),)
        outputs = (TensorSpec("features", "float32", (merged, hidden)),)
        inner = (TensorSpec("hidden", "float32", (count, width)),)
        prefix = f"vision.{rows}x{columns}"

        def stages() -> list[Stage]:
            from edgeexport.families.glm4v_stages import vision_stages

            return vision_stages(parts(), checkpoint.tensors, grid, prefix)

        def constants() -> Mapping[str, Array]:
            from edgeexport.families.glm4v_stages import vision_tables

            return vision_tables(parts(), grid, prefix)

        return Component(
            name="vision",
            inputs=specs,
            outputs=outputs,
            state=(),
            stages=stages,
            values={spec.name: spec for spec in (*specs, *outputs, *inner)},
            constants=constants,
            variant=f"{rows}x{columns}",
        )


def section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A sub-config. Raises: CheckpointError `bad-config` where it is missing: class defaults are another model's."""
    value = config.get(name)
    if not isinstance(value, Mapping):
        raise errors.bad_config(name, value, "a table of values is needed; the class defaults belong to another model")
    return value


def mrope_sections(config: Mapping[str, Any], geometry: Geometry) -> tuple[int, ...]:
    """How many rotary pairs each position row turns. Raises: CheckpointError `bad-config`.

    transformers reads `rope_parameters` (older files: `rope_scaling` and `rope_theta`), and so does this.
    """
    rope = rope_of(config)
    sections = rope.get("mrope_section")
    if not isinstance(sections, list) or not all(type(size) is int and size > 0 for size in sections):
        raise errors.bad_config("rope_parameters.mrope_section", sections, "a list of positive integers is needed")
    factor = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor <= 1:
        raise errors.bad_config("partial_rotary_factor", factor, "a number above 0 and up to 1 is needed")
    pairs = int(geometry.head_dim * factor) // 2
    if sum(sections) != pairs:
        raise errors.bad_config(
            "rope_parameters.mrope_section", sections, f"the sections must add up to {pairs} rotary pairs"
        )
    return tuple(sections)


def _token_id(config: Mapping[str, Any], name: str) -> int:
    """A token's id. Raises: CheckpointError `bad-config` where it is missing: class defaults are another model's."""
    value, vocab = config.get(name), positive(section(config, "text_config"), "vocab_size")
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < vocab:
        raise errors.bad_config(name, value, f"a token id below {vocab} is needed")
    return value


def _agree(image: PatchContract, vision: Mapping[str, Any]) -> None:
    """Raises: CheckpointError `bad-config` where the processor cuts other patches than the model reads."""
    cut = {
        "patch_size": image.patch_size,
        "temporal_patch_size": image.temporal_patch_size,
        "spatial_merge_size": image.merge_size,
    }
    for name, size in cut.items():
        if vision.get(name) != size:
            why = f"preprocessor_config.json has {size}, and the two must agree"
            raise errors.bad_config(f"vision_config.{name}", vision.get(name), why)


def _tied(config: Mapping[str, Any]) -> bool:
    text = config.get("text_config")
    inner = flag(text, "tie_word_embeddings") if isinstance(text, Mapping) else False
    return flag(config, "tie_word_embeddings") or inner


TINY: dict[str, Any] = {
    "architectures": ["Glm4vForConditionalGeneration"],
    "model_type": "glm4v",
    "image_token_id": 300,
    "video_token_id": 301,
    "image_start_token_id": 302,
    "image_end_token_id": 303,
    "video_start_token_id": 304,
    "video_end_token_id": 305,
    "tie_word_embeddings": False,
    "text_config": {
        "model_type": "glm4v_text",
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 500000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
        },
        "pad_token_id": 0,
        "eos_token_id": [2],
    },
    "vision_config": {
        "model_type": "glm4v_vision",
        "depth": 2,
        "hidden_size": 64,
        "num_heads": 4,
        "in_channels": 3,
        "image_size": 56,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 64,
        "intermediate_size": 128,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
    },
}
"""Ids, theta and sections unlike transformers' class defaults, so that a default that slips in is noticed."""

FAMILY = Glm4vFamily(model_type="glm4v", tiny=TINY)
