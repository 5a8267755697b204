"""The three-modality model in torch: each part is a module of its own that loads and runs without the others."""

from __future__ import annotations

from typing import Any

import msgspec
import torch
from torch import nn
from transformers import AutoModelForCausalLM, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from edgeexport.families.autoglm_phone.config import AudioConfig, Config, VisionConfig
from edgeexport.families.configured import blamed, transformers_config

NORM_EPSILON = 1e-3
"""EfficientNet's batch norms."""


class AutoGLMPhone(nn.Module):
    """The whole model. Its state_dict's names are the checkpoint's: vision.*, audio.*, align.image.*, align.audio.*,
    fusion.*, decoder.*."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.vision = Vision(config.vision_config)
        self.audio = audio_encoder(config.audio_config)
        self.align = nn.ModuleDict({"image": image_align(config), "audio": audio_align(config)})
        self.fusion = Fusion(config.hidden_size, config.align_dim, config.fusion_heads)
        self.decoder = decoder(config)

    def encode_image(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """float32 [B, 3, size, size] -> features [B, M, align_dim]."""
        features: torch.Tensor = self.align["image"](self.vision(pixel_values))
        return features

    def encode_audio(self, input_features: torch.Tensor) -> torch.Tensor:
        """float32 [B, n_mels, frames] -> features [B, M, align_dim]."""
        features: torch.Tensor = self.align["audio"](self.audio(input_features).last_hidden_state)
        return features

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """int64 [B, T] -> [B, T, hidden]."""
        embeds: torch.Tensor = self.decoder.get_input_embeddings()(input_ids)
        return embeds

    def fuse(self, embeds: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """[B, T, hidden] and [B, M, align_dim], the modalities one after the other in any order -> [B, T, hidden]."""
        fused: torch.Tensor = self.fusion(embeds, features)
        return fused

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        **decoding: Any,
    ) -> torch.Tensor:
        """Logits [B, T, vocab]. Text alone goes past the fusion: it is the decoder's own answer, bit for bit.

        `decoding` is for the decoder: logits_to_keep, past_key_values.
        """
        features = [self.encode_image(pixel_values)] if pixel_values is not None else []
        features += [self.encode_audio(input_features)] if input_features is not None else []
        embeds = self.embed(input_ids)
        if features:
            embeds = self.fuse(embeds, torch.cat(features, 1))
        logits: torch.Tensor = self.decoder(inputs_embeds=embeds, **decoding).logits
        return logits


class Align(nn.Module):
    """Features of a tower into the space that all modalities share: [B, M, width] -> [B, M, align_dim].

    What is added at the end is learned, for each position or for all: it says of which modality a feature is, and
    where in a picture it lies. Sound needs no places, since Whisper's features carry their time.
    """

    def __init__(self, width: int, align_dim: int, positions: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, align_dim)
        self.norm = nn.LayerNorm(align_dim)
        self.position = nn.Parameter(torch.zeros(positions, align_dim))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        aligned: torch.Tensor = self.norm(self.project(features)) + self.position
        return aligned


class Fusion(nn.Module):
    """Gated cross-attention between the decoder's embeddings and what it does with them.

    Every token looks at all features in the shared space, several heads side by side, and mixes what it finds with
    itself, channel by channel: out = g * attended + (1 - g) * query. A gate near 0 shuts a bad picture out.
    """

    def __init__(self, hidden: int, align_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(hidden, align_dim)
        self.query_norm = nn.LayerNorm(align_dim)
        self.output = nn.Linear(align_dim, hidden)
        self.gate = nn.Linear(2 * align_dim, hidden)

    def forward(self, embeds: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """embeds [B, T, hidden], features [B, M, align_dim] -> [B, T, hidden]."""
        aligned, found = self.find(embeds, features)
        gate = torch.sigmoid(self.gate(torch.cat((aligned, found), -1)))
        return gate * self.output(found) + (1 - gate) * embeds

    def find(self, embeds: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What each token is in the shared space, and what it finds there, both [B, T, align_dim]."""
        aligned = self.query_norm(self.query(embeds))
        keys = self._by_heads(features)
        found = nn.functional.scaled_dot_product_attention(self._by_heads(aligned), keys, keys)
        return aligned, found.transpose(1, 2).flatten(2)

    def _by_heads(self, x: torch.Tensor) -> torch.Tensor:
        """[B, N, heads * D] -> [B, heads, N, D]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Vision(nn.Module):
    """A CNN of the EfficientNet-lite kind: [B, 3, size, size] -> [B, side * side, head], row by row.

    Source: M. Tan and Q. V. Le, EfficientNet, arXiv:1905.11946; lite: no squeeze-and-excitation, ReLU6.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size, width = config.image_size, config.stem
        self.stem = ConvNorm(3, width, 3, 2, size)
        size = self.stem.out_size
        blocks = []
        for stage in config.stages:
            for i in range(stage.repeats):
                stride = stage.stride if i == 0 else 1
                blocks.append(InvertedBottleneck(width, stage.width, stage.kernel, stride, stage.expand, size))
                size, width = blocks[-1].out_size, stage.width
        self.blocks = nn.Sequential(*blocks)
        self.head = ConvNorm(width, config.head, 1, 1, size)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        feature_map = self.head(self.blocks(self.stem(pixels)))
        features: torch.Tensor = feature_map.flatten(2).transpose(1, 2)
        return features


class InvertedBottleneck(nn.Module):
    """MBConv: widen by 1x1, filter each channel by itself, narrow by 1x1; added to its input where the shapes agree."""

    def __init__(self, width: int, out: int, kernel: int, stride: int, expand: int, size: int) -> None:
        super().__init__()
        inner = width * expand
        self.expand = ConvNorm(width, inner, 1, 1, size) if expand != 1 else nn.Identity()
        self.depthwise = ConvNorm(inner, inner, kernel, stride, size, groups=inner)
        self.out_size = self.depthwise.out_size
        self.project = ConvNorm(inner, out, 1, 1, self.out_size, activation=False)
        self.residual = stride == 1 and width == out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.project(self.depthwise(self.expand(x)))
        return x + out if self.residual else out


class ConvNorm(nn.Module):
    """Convolution, batch norm, and ReLU6 with `activation`, over a map of `size` x `size`.

    The padding is TensorFlow's SAME: where the total is odd, the one more lies right and below.
    """

    def __init__(
        self, width: int, out: int, kernel: int, stride: int, size: int, *, groups: int = 1, activation: bool = True
    ) -> None:
        super().__init__()
        self.out_size = -(-size // stride)
        total = max((self.out_size - 1) * stride + kernel - size, 0)
        self.before, self.after = total // 2, total - total // 2
        even = self.before if self.before == self.after else 0
        self.conv = nn.Conv2d(width, out, kernel, stride, padding=even, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(out, eps=NORM_EPSILON)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.before != self.after:
            x = nn.functional.pad(x, (self.before, self.after, self.before, self.after))
        out: torch.Tensor = self.norm(self.conv(x))
        return nn.functional.relu6(out) if self.activation else out


def image_align(config: Config) -> Align:
    """The alignment of a picture's features."""
    return Align(config.vision_config.head, config.align_dim, config.vision_config.positions)


def audio_align(config: Config) -> Align:
    """The alignment of a clip's features."""
    return Align(config.audio_config.hidden_size, config.align_dim, 1)


def audio_encoder(config: AudioConfig) -> Any:
    """transformers' Whisper encoder over a window of `frames`: [B, n_mels, frames] -> [B, positions, hidden_size].

    Raises: CheckpointError `bad-config`.
    """
    with blamed({"audio_config": msgspec.to_builtins(config)}):
        return WhisperEncoder(
            WhisperConfig(
                num_mel_bins=config.n_mels,
                d_model=config.hidden_size,
                encoder_layers=config.layers,
                encoder_attention_heads=config.heads,
                encoder_ffn_dim=config.intermediate_size,
                max_source_positions=config.positions,
            )
        )


def decoder(config: Config) -> Any:
    """The causal language model that `text_config` names, in float32. Raises: CheckpointError `bad-config`."""
    made = transformers_config(config.text_config)
    with blamed(config.text_config):
        return AutoModelForCausalLM.from_config(made, dtype=torch.float32)
