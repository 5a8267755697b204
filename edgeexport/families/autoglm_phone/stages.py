"""The torch side of the export: the parts of model.py cut into stages that trace to the dialect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from edgeexport.core import Array, Example, OracleModel, Stage, TensorRef
from edgeexport.families.autoglm_phone.config import Config
from edgeexport.families.autoglm_phone.model import AutoGLMPhone
from edgeexport.families.stages import (
    ATTENTION,
    WHOLE_ATTENTION,
    TextModel,
    attention_over_all,
    empty_model,
    missing_parameters,
    only_rows,
)


@dataclass(frozen=True)
class Parts:
    """A fake model: shapes without storage."""

    model: AutoGLMPhone
    text: TextModel


def load_parts(config: Config, *, tied: bool) -> Parts:
    """The model at full depth under fake tensors."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = AutoGLMPhone(config).eval()
    model.decoder.config._attn_implementation = ATTENTION
    model.audio.config._attn_implementation = WHOLE_ATTENTION
    decoder = model.decoder
    return Parts(model, TextModel(decoder.model, decoder.lm_head, "decoder.model.", "decoder.lm_head", tied))


def vision_stages(parts: Parts, tensors: Mapping[str, TensorRef]) -> list[Stage]:
    """pixels -> features, the CNN as one stage. Raises: CheckpointError for tensors that the checkpoint lacks."""
    seen = Seen(parts.model.vision, parts.model.align["image"])
    return _checked(
        [_stage("picture", seen, ("pixels",), ("features",), {"tower": "vision", "align": "align.image"})], tensors
    )


def audio_stages(parts: Parts, tensors: Mapping[str, TensorRef]) -> list[Stage]:
    """mel -> layers -> features. Raises: CheckpointError for tensors that the checkpoint lacks."""
    tower: Any = parts.model.audio
    names = {"conv1": "audio.conv1", "conv2": "audio.conv2", "positions": "audio.embed_positions.weight"}
    stages = [_stage("front", Front(tower), ("mel",), ("hidden",), names)]
    for i, layer in enumerate(tower.layers):
        names = {"layer": f"audio.layers.{i}"}
        stages.append(_stage(f"layers.{i}", Layer(layer), ("hidden",), ("hidden",), names, kind="layer"))
    heard = Seen(tower.layer_norm, parts.model.align["audio"])
    stages.append(
        _stage("align", heard, ("hidden",), ("features",), {"tower": "audio.layer_norm", "align": "align.audio"})
    )
    return _checked(stages, tensors)


def fusion_stages(parts: Parts, tensors: Mapping[str, TensorRef]) -> list[Stage]:
    """inputs_embeds, features -> fused. Raises: CheckpointError for tensors that the checkpoint lacks."""
    module = Fused(parts.model.fusion)
    return _checked(
        [_stage("fusion", module, ("inputs_embeds", "features"), ("fused",), {"fusion": "fusion"})], tensors
    )


def _stage(
    name: str, module: nn.Module, inputs: tuple[str, ...], outputs: tuple[str, ...], prefixes: Mapping[str, str],
    *, kind: str | None = None,
) -> Stage:  # fmt: skip
    """A stage whose parts' tensors, norms' running means among them, are called `prefixes` in the checkpoint."""
    parameters = {}
    for key, _ in [*module.named_parameters(), *module.named_buffers()]:
        part, _, rest = key.partition(".")
        if part in prefixes and not key.endswith("num_batches_tracked"):
            parameters[key] = f"{prefixes[part]}.{rest}" if rest else prefixes[part]
    return Stage(name, kind or name, module, inputs, outputs, parameters)


def _checked(stages: list[Stage], tensors: Mapping[str, TensorRef]) -> list[Stage]:
    missing_parameters(stages, tensors)
    return stages


class Seen(nn.Module):
    """A tower, or the end of one, and the alignment behind it: -> features [1, M, align_dim]."""

    def __init__(self, tower: nn.Module, align: nn.Module) -> None:
        super().__init__()
        self.tower, self.align = tower, align

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.align(self.tower(x))
        return features


class Front(nn.Module):
    """What Whisper's encoder does before its layers: mel [1, n_mels, frames] -> hidden [1, frames / 2, width].

    Source: transformers 5.23, `WhisperEncoder.forward`.
    """

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.conv1, self.conv2, self.positions = tower.conv1, tower.conv2, tower.embed_positions.weight

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        x = nn.functional.gelu(self.conv1(mel))
        x = nn.functional.gelu(self.conv2(x))
        hidden: torch.Tensor = x.permute(0, 2, 1) + self.positions
        return hidden


class Layer(nn.Module):
    """One layer of Whisper's encoder: hidden [1, N, width]."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out = self.layer(hidden, None)
        return out[0] if isinstance(out, tuple) else out


class Fused(nn.Module):
    """The gated cross-attention: inputs_embeds [1, T, hidden], features [1, M, align_dim] -> [1, T, hidden]."""

    def __init__(self, fusion: nn.Module) -> None:
        super().__init__()
        self.fusion = fusion

    def forward(self, embeds: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        with _attention_as_op():
            fused: torch.Tensor = self.fusion(embeds, features)
        return fused


@contextmanager
def _attention_as_op() -> Any:
    """Within, scaled_dot_product_attention is one Attention op."""
    plain = nn.functional.scaled_dot_product_attention
    nn.functional.scaled_dot_product_attention = attention_over_all
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = plain


def oracle(config: Config) -> OracleModel:
    """The unmodified model; the decoder runs all examples as one batch."""
    model = empty_model(lambda: AutoGLMPhone(config))

    def logits(examples: Sequence[Example], firsts: Sequence[int]) -> list[Array]:
        rows = [_fed(model, example) for example in examples]
        batch = torch.zeros(len(rows), max(len(row) for row in rows), config.hidden_size)
        for each, row in zip(batch, rows, strict=True):
            each[: len(row)] = row  # what comes later changes no causal logits
        with only_rows(model.decoder.get_output_embeddings(), examples, firsts) as split:
            return split(model.decoder(inputs_embeds=batch, use_cache=False).logits)

    embedding = model.decoder.get_input_embeddings()
    modules = {
        "vision": model.align["image"],
        "audio": model.align["audio"],
        "embed": embedding,
        "fusion": model.fusion,
    }
    return OracleModel(
        model=model,
        layers=tuple(model.decoder.model.layers),
        logits=logits,
        encoders={name: (module, lambda output: [output]) for name, module in modules.items()},
    )


def _fed(model: AutoGLMPhone, example: Example) -> torch.Tensor:
    """What the decoder reads of one example: float32 [T, hidden]."""
    features = []
    for each in example.encoder_inputs:
        encode = model.encode_image if each.component == "vision" else model.encode_audio
        features.append(encode(*(torch.from_numpy(array) for array in each.inputs.values())))
    embeds = model.embed(torch.from_numpy(example.tokens)[None])
    return (model.fuse(embeds, torch.cat(features, 1)) if features else embeds)[0]
