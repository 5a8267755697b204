"""The family `autoglm_phone`: picture, sound and text, each through a component of its own into one decoder.

Components: `vision`, `audio`, `embed`, `fusion`, `decoder`. Features are not spliced into the text: through `fusion`,
every token attends to them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgeexport.core import Checkpoint, Component, Dim, Geometry, OracleModel, Stage, TensorSpec
from edgeexport.families.autoglm_phone.config import MODEL_TYPE, PRESETS, Config, from_dict
from edgeexport.families.autoglm_phone.preparation import audio_contract, image_contract
from edgeexport.families.decoder import (
    DECODER_OPS,
    decoder_component,
    embed_component,
    geometry_of,
    refuse_context,
    refuse_rope,
)
from edgeexport.session.preprocess import Preprocess

if TYPE_CHECKING:
    from edgeexport.families.autoglm_phone.stages import Parts
    from edgeexport.families.stages import TextModel

OPS = DECODER_OPS | {"BatchNormalization", "Clip", "Concat", "Conv", "Gelu", "LayerNormalization", "Split", "Sub"}
QUESTIONS: Mapping[str, str] = {
    "picture": "Which digit is in the picture?",
    "sound": "Which word do you hear?",
    "picture and sound": "Which digit do you see and which do you hear?",
}
"""What mini was trained to answer."""
MAX_FEATURES = 8192
"""Features that the pictures and sounds of one prompt may have together."""


@dataclass(frozen=True)
class AutoGlmPhoneFamily:
    """The three-modality reference architecture. `ignored` are suffixes of tensors that only training reads."""

    model_type: str = MODEL_TYPE
    ops: frozenset[str] = OPS
    kernels: tuple[str, ...] = ()
    questions: Mapping[str, str] = field(default_factory=lambda: QUESTIONS)
    table: str = "decoder.model.embed_tokens.weight"
    head: str = "decoder.lm_head.weight"
    prefix: str = ""
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq", "num_batches_tracked")

    @property
    def tiny(self) -> Mapping[str, Any]:
        """The smallest preset."""
        return PRESETS["tiny"]

    def geometry(self, config: Mapping[str, Any]) -> Geometry:
        """The decoder's numbers. Raises: CheckpointError `bad-config`."""
        return geometry_of(from_dict(config).text_config)

    def completed(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The values with those that the configuration's class of its decoder sets where they are left out."""
        from edgeexport.families import find, known

        text = from_dict(config).text_config
        kind = str(text["model_type"])
        return {**config, "text_config": find(kind).completed(text) if kind in known() else text}

    def untied(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The values with lm_head a matrix of its own."""
        return {**config, "text_config": {**config["text_config"], "tie_word_embeddings": False}}

    def unused(self, checkpoint: Checkpoint) -> frozenset[str]:
        """Checkpoint tensors that the model does not read: recomputed buffers, counters, a tied head."""
        names = {name for name in checkpoint.tensors if name.endswith(self.ignored)}
        if self.geometry(checkpoint.config).tied:
            names.add(self.head)
        return frozenset(names & checkpoint.tensors.keys())

    def components(self, checkpoint: Checkpoint, context: int, shapes: Mapping[str, Any]) -> list[Component]:
        """vision, audio, embed, fusion, decoder. `shapes` is of no use here: pictures have one size.

        Raises: UsageError `context-too-long`; ExportError `rope-not-static`; CheckpointError `bad-config`.
        """
        config, geometry, tensors = from_dict(checkpoint.config), self.geometry(checkpoint.config), checkpoint.tensors
        audio_contract(config)
        refuse_context(context, geometry)
        refuse_rope(config.text_config)

        @functools.cache
        def parts() -> Parts:
            from edgeexport.families.autoglm_phone.stages import load_parts

            return load_parts(config, tied=geometry.tied)

        def text() -> TextModel:
            return parts().text

        def stages(which: str) -> Callable[[], list[Stage]]:
            def cut() -> list[Stage]:
                from edgeexport.families.autoglm_phone import stages

                made: list[Stage] = getattr(stages, f"{which}_stages")(parts(), tensors)
                return made

            return cut

        return [
            _vision(config, stages("vision")),
            _audio(config, stages("audio")),
            embed_component(text, tensors, geometry, context),
            _fusion(config, geometry, context, stages("fusion")),
            decoder_component(text, tensors, geometry, context, embeds=True),
        ]

    def preprocess(self, checkpoint: Checkpoint, shapes: Mapping[str, Any]) -> Preprocess:
        """The contract of pictures and sound, from config.json. Raises: CheckpointError `bad-config`."""
        config = from_dict(checkpoint.config)
        return Preprocess(image=image_contract(config), audio=audio_contract(config), joining="attend")

    def oracle(self, config: Mapping[str, Any]) -> OracleModel:
        """The unmodified torch model of model.py. Needs torch."""
        from edgeexport.families.autoglm_phone.stages import oracle

        return oracle(from_dict(config))


def _vision(config: Config, stages: Callable[[], list[Stage]]) -> Component:
    """pixels float32 [1, 3, size, size] -> features float32 [1, positions, align_dim]."""
    vision = config.vision_config
    pixels = TensorSpec("pixels", "float32", (1, 3, vision.image_size, vision.image_size))
    features = TensorSpec("features", "float32", (1, vision.positions, config.align_dim))
    return Component("vision", (pixels,), (features,), (), stages, {each.name: each for each in (pixels, features)})


def _audio(config: Config, stages: Callable[[], list[Stage]]) -> Component:
    """mel float32 [1, n_mels, frames] -> features float32 [1, positions, align_dim]."""
    audio = config.audio_config
    mel = TensorSpec("mel", "float32", (1, audio.n_mels, audio.frames))
    hidden = TensorSpec("hidden", "float32", (1, audio.positions, audio.hidden_size))
    features = TensorSpec("features", "float32", (1, audio.positions, config.align_dim))
    return Component("audio", (mel,), (features,), (), stages, {each.name: each for each in (mel, hidden, features)})


def _fusion(config: Config, geometry: Geometry, context: int, stages: Callable[[], list[Stage]]) -> Component:
    """inputs_embeds float32 [1, T, hidden], features float32 [1, M, align_dim] -> fused float32 [1, T, hidden]."""
    tokens = Dim("T", 1, context)
    embeds = TensorSpec("inputs_embeds", "float32", (1, tokens, geometry.hidden))
    features = TensorSpec("features", "float32", (1, Dim("M", 1, MAX_FEATURES), config.align_dim))
    fused = TensorSpec("fused", "float32", (1, tokens, geometry.hidden))
    specs = (embeds, features)
    return Component("fusion", specs, (fused,), (), stages, {each.name: each for each in (*specs, fused)})


FAMILY = AutoGlmPhoneFamily()
