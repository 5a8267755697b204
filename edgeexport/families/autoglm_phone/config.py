"""config.json of the three-modality model: its schema, and the presets as data."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Struct

from edgeexport import errors
from edgeexport.limits import UNTRUSTED

MODEL_TYPE: Final = "autoglm_phone"

Width = Annotated[int, Meta(ge=1, le=65_536)]
Depth = Annotated[int, Meta(ge=1, le=1_024)]
Level = Annotated[float, Meta(ge=-1_000.0, le=1_000.0)]
Spread = Annotated[float, Meta(ge=1e-6, le=1_000.0)]


class VisionStage(Struct, frozen=True, forbid_unknown_fields=True):
    """A run of inverted bottlenecks (MBConv); the first of them has the stride, all have `width` channels out."""

    repeats: Depth
    kernel: Literal[3, 5, 7]
    stride: Literal[1, 2]
    expand: Annotated[int, Meta(ge=1, le=16)]
    width: Width


class VisionConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """A CNN of the EfficientNet-lite kind over a square picture, normalised as `(byte / 255 - mean) / std`."""

    image_size: Annotated[int, Meta(ge=8, le=1_024)]
    mean: tuple[Level, Level, Level]
    std: tuple[Spread, Spread, Spread]
    stem: Width
    stages: Annotated[tuple[VisionStage, ...], Meta(min_length=1, max_length=64)]
    head: Width

    @property
    def side(self) -> int:
        """Rows, and columns, of the feature map: every stride 2 halves, rounding up."""
        size = -(-self.image_size // 2)
        for stage in self.stages:
            size = -(-size // stage.stride)
        return size

    @property
    def positions(self) -> int:
        """Features of one picture."""
        return self.side**2


class AudioConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """Whisper's encoder over a log-mel window of `seconds`; two frames make one feature."""

    sample_rate: Annotated[int, Meta(ge=16_000, le=48_000)]
    n_fft: Annotated[int, Meta(ge=32, le=4_096, multiple_of=2)]
    hop_length: Annotated[int, Meta(ge=16, le=4_096)]
    n_mels: Annotated[int, Meta(ge=1, le=256)]
    seconds: Annotated[float, Meta(gt=0.0, le=600.0)]
    hidden_size: Width
    layers: Depth
    heads: Width
    intermediate_size: Annotated[int, Meta(ge=1, le=1 << 20)]

    @property
    def frames(self) -> int:
        """Columns of the spectrogram."""
        return round(self.seconds * self.sample_rate) // self.hop_length

    @property
    def positions(self) -> int:
        """Features of one clip."""
        return self.frames // 2


class Config(Struct, frozen=True, forbid_unknown_fields=True):
    """The whole of config.json. `text_config` is the config of a causal language model of transformers."""

    vision_config: VisionConfig
    audio_config: AudioConfig
    text_config: dict[str, Any]
    align_dim: Width = 512
    fusion_heads: Width = 8
    model_type: Literal["autoglm_phone"] = MODEL_TYPE
    architectures: tuple[Literal["AutoGLMPhone"]] = ("AutoGLMPhone",)

    @property
    def hidden_size(self) -> int:
        """Width of the decoder's embeddings."""
        return int(self.text_config["hidden_size"])


def from_dict(values: Mapping[str, Any]) -> Config:
    """The config that anyone may have written. Raises: CheckpointError `bad-config`."""
    try:
        config = msgspec.convert(dict(values), Config)
    except (msgspec.ValidationError, ValueError, OverflowError) as problem:
        raise errors.bad_config("value", "autoglm_phone", str(problem)[:400]) from problem
    blocks = sum(stage.repeats for stage in config.vision_config.stages)
    if blocks > UNTRUSTED.layers:
        raise errors.bad_config("vision_config.stages", blocks, f"they have more than {UNTRUSTED.layers} blocks")
    audio, text = config.audio_config, config.text_config
    samples = audio.seconds * audio.sample_rate
    if abs(samples - round(samples)) > 1e-6 or round(samples) % (2 * audio.hop_length):
        raise errors.bad_config("audio_config.seconds", audio.seconds, "a window of whole pairs of hops is needed")
    _refuse_remainder("fusion_heads", config.fusion_heads, "align_dim", config.align_dim)
    _refuse_remainder("audio_config.heads", audio.heads, "audio_config.hidden_size", audio.hidden_size)
    hidden, kind = text.get("hidden_size"), text.get("model_type")
    if not isinstance(hidden, int) or isinstance(hidden, bool) or not 0 < hidden <= 65_536:
        raise errors.bad_config("text_config.hidden_size", hidden, "a positive integer is needed")
    if not isinstance(kind, str) or kind == MODEL_TYPE:
        raise errors.bad_config("text_config.model_type", kind, "a causal language model of transformers is needed")
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """The values of config.json: plain lists, numbers and text, in the order of the schema."""
    values: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(config))
    return {"model_type": values.pop("model_type"), "architectures": values.pop("architectures"), **values}


def _refuse_remainder(key: str, heads: int, of: str, width: int) -> None:
    if width % heads:
        raise errors.bad_config(key, heads, f"it must divide {of} {width}")


LITE_STAGES: Final = (
    VisionStage(1, 3, 1, 1, 16),
    VisionStage(2, 3, 2, 6, 24),
    VisionStage(2, 5, 2, 6, 40),
    VisionStage(3, 3, 2, 6, 80),
    VisionStage(3, 5, 1, 6, 112),
    VisionStage(4, 5, 2, 6, 192),
    VisionStage(1, 3, 1, 6, 320),
)
"""EfficientNet-lite0. Source: tensorflow/tpu, efficientnet/lite/efficientnet_lite_builder.py."""


def lite_stages(width: float, depth: float) -> tuple[VisionStage, ...]:
    """The stages of a wider and deeper EfficientNet-lite: widths rounded to multiples of 8, never down by more than a
    tenth; repeats rounded up, but for the first and the last stage, which keep theirs."""
    last = len(LITE_STAGES) - 1
    return tuple(
        msgspec.structs.replace(
            stage,
            width=_round_width(stage.width * width),
            repeats=stage.repeats if i in (0, last) else math.ceil(stage.repeats * depth),
        )
        for i, stage in enumerate(LITE_STAGES)
    )


def _round_width(width: float) -> int:
    rounded = max(8, int(width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * width else rounded


def _lite(width: float, depth: float, image_size: int = 224) -> VisionConfig:
    """Bytes are normalised to (byte - 127) / 128, as EfficientNet-lite was trained."""
    return VisionConfig(
        image_size=image_size,
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
        stem=32,
        stages=lite_stages(width, depth),
        head=1280,
    )


def _whisper(hidden_size: int, layers: int, seconds: float) -> AudioConfig:
    """Whisper's sizes: heads of 64, four times the width inside."""
    return AudioConfig(
        sample_rate=16_000, n_fft=400, hop_length=160, n_mels=80, seconds=seconds,
        hidden_size=hidden_size, layers=layers, heads=hidden_size // 64, intermediate_size=4 * hidden_size,
    )  # fmt: skip


def _glm(layers: int, hidden_size: int, heads: int, intermediate_size: int) -> dict[str, Any]:
    return {
        "architectures": ["Glm4ForCausalLM"],
        "model_type": "glm4",
        "vocab_size": 151_552,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
        "attention_bias": True,
        "tie_word_embeddings": False,
        "pad_token_id": 151_329,
        "eos_token_id": [151_329, 151_336, 151_338],
    }


_SMOLLM2: Final[Mapping[str, Any]] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1_536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 8_192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
    "tie_word_embeddings": True,
    "mlp_bias": False,
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}

_TINY_TEXT: Final[Mapping[str, Any]] = {
    **_glm(layers=2, hidden_size=32, heads=4, intermediate_size=64),
    "vocab_size": 320,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_TINY: Final = Config(
    vision_config=VisionConfig(
        image_size=32,
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
        stem=8,
        stages=(VisionStage(1, 3, 1, 1, 8), VisionStage(2, 3, 2, 2, 8), VisionStage(1, 5, 2, 2, 16)),
        head=24,
    ),
    audio_config=AudioConfig(
        sample_rate=16_000, n_fft=400, hop_length=160, n_mels=80, seconds=0.32,
        hidden_size=16, layers=2, heads=2, intermediate_size=32,
    ),
    text_config=dict(_TINY_TEXT),
    align_dim=32,
    fusion_heads=4,
)  # fmt: skip

_PRESETS: Final[Mapping[str, Config]] = {
    "9b": Config(_lite(1.4, 1.8), _whisper(1_024, 24, 30.0), _glm(40, 4_096, 32, 13_696)),
    "3b": Config(_lite(0.7, 0.9), _whisper(512, 12, 30.0), _glm(20, 2_048, 16, 6_848)),
    "mini": Config(_lite(1.0, 1.0), _whisper(384, 4, 4.0), dict(_SMOLLM2)),
    "tiny": _TINY,
}

PRESETS: Final[Mapping[str, Mapping[str, Any]]] = {name: to_dict(config) for name, config in _PRESETS.items()}
"""config.json of each size. `9b`: GLM-4-9B's decoder; `3b`: half its layers and half of every width (1.7 billion
parameters; 3b is what the student is called); `mini`: towers that can be installed; `tiny`: for tests."""


def preset(name: str) -> Config:
    """The config of a preset's name, a copy of its own."""
    return from_dict(copy.deepcopy(dict(PRESETS[name])))
