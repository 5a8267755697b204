"""The torch side of GLM-4V: transformers' own vision modules cut into stages for one fixed patch grid."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForImageTextToText
from transformers.vision_utils import get_vision_position_ids

from edgeexport import errors
from edgeexport.core import Array, Example, OracleModel, Stage, TensorRef
from edgeexport.families.stages import (
    WHOLE_ATTENTION,
    TextModel,
    fake_model,
    missing_parameters,
    only_rows,
    oracle_model,
    padded,
    rms_norm_as_op,
    rms_norms,
    rotary_layout,
    rotate_as_op,
)


@dataclass(frozen=True)
class Glm4vParts:
    """A fake model's vision tower and decoder."""

    vision: Any
    text: TextModel


def load_parts(config: Mapping[str, Any], sections: tuple[int, ...], *, tied: bool) -> Glm4vParts:
    """transformers' model under fake tensors, at full depth."""
    model = fake_model(config, AutoModelForImageTextToText)
    vision = model.model.visual
    vision.config._attn_implementation = WHOLE_ATTENTION
    text = TextModel(model.model.language_model, model.lm_head, "model.language_model.", "lm_head", tied, sections)
    return Glm4vParts(vision, text)


def vision_tables(parts: Glm4vParts, grid: tuple[int, int], prefix: str) -> dict[str, Array]:
    """Everything that depends on the grid alone: rotary cos and sin float32 [1, N, head_dim / 2], and the bicubic
    sampling of the position table as a matrix float32 [N, positions]: positions of the patches = matrix @ table.

    Both come out of the model's own modules; the matrix is what its sampling makes of an identity table.
    """
    vision = parts.vision
    shape = torch.tensor([[1, *grid]])
    where = get_vision_position_ids(shape, vision.spatial_merge_size)
    rotary = type(vision.rotary_pos_emb)(vision.config)
    count = grid[0] * grid[1]
    embeddings = vision.embeddings
    with torch.no_grad():
        cos, sin = rotary(torch.zeros(1), where)
        probe = type(embeddings)(_Sized(vision.config, embeddings.num_positions))
        probe.position_embedding.weight = nn.Parameter(torch.eye(embeddings.num_positions), requires_grad=False)
        sampled = probe(
            torch.zeros(count, embeddings.num_positions), torch.tensor([count]), shape, where[:, 0], where[:, 1]
        )
    half = cos.shape[-1] // 2
    if not (torch.equal(cos[:, :half], cos[:, half:]) and torch.equal(sin[:, :half], sin[:, half:])):
        raise errors.rope_not_static(type(rotary).__name__, ("tables whose two halves are equal",))
    return {
        f"{prefix}.cos": cos[None, :, :half].numpy().copy(),
        f"{prefix}.sin": sin[None, :, :half].numpy().copy(),
        f"{prefix}.sampling": sampled.numpy().copy(),
    }


class _Sized:
    """A vision config of another hidden size, for a module that reads nothing else from it."""

    def __init__(self, config: Any, hidden_size: int) -> None:
        self.hidden_size, self.image_size, self.patch_size = hidden_size, config.image_size, config.patch_size


def vision_stages(
    parts: Glm4vParts, tensors: Mapping[str, TensorRef], grid: tuple[int, int], prefix: str
) -> list[Stage]:
    """patches -> blocks -> features. Raises: CheckpointError for parameters that the checkpoint lacks."""
    vision = parts.vision
    where = "model.visual."
    stages = [
        Stage(
            "patch", "patch", Patches(vision), ("patches", f"{prefix}.sampling"), ("hidden",),
            {
                "project.weight": f"{where}patch_embed.proj.weight",
                "project.bias": f"{where}patch_embed.proj.bias",
                "norm.weight": f"{where}post_conv_layernorm.weight",
                "table": f"{where}embeddings.position_embedding.weight",
            },
        )
    ]  # fmt: skip
    for i, block in enumerate(vision.blocks):
        names = {f"block.{name}": f"{where}blocks.{i}.{name}" for name, _ in block.named_parameters()}
        inputs = ("hidden", f"{prefix}.cos", f"{prefix}.sin")
        stages.append(Stage(f"blocks.{i}", "block", Block(block, grid[0] * grid[1]), inputs, ("hidden",), names))
    merge = {f"merger.{name}": f"{where}merger.{name}" for name, _ in vision.merger.named_parameters()}
    merge |= {"norm.weight": f"{where}post_layernorm.weight"}
    merge |= {f"downsample.{name}": f"{where}downsample.{name}" for name in ("weight", "bias")}
    stages.append(Stage("merge", "merge", Merge(vision), ("hidden",), ("features",), merge))
    missing_parameters(stages, tensors)
    return stages


def glm4v_oracle(config: Mapping[str, Any]) -> OracleModel:
    """The whole model: pictures, text, and what joins them; all examples are one batch."""
    model = oracle_model(config, AutoModelForImageTextToText)
    vision, text = model.model.visual, model.model.language_model
    token, merge = int(config["image_token_id"]), int(vision.spatial_merge_size)
    lengths: dict[str, list[int]] = {}

    def logits(examples: Sequence[Example], firsts: Sequence[int]) -> list[Array]:
        batch = padded(examples)
        pictures = [each for example in examples for each in example.encoder_inputs]
        grids = [each.grid for each in pictures if each.grid is not None]
        lengths["vision"] = [rows * columns for rows, columns in grids]
        lengths["embed"] = [len(example.tokens) for example in examples]
        given = {}
        if pictures:
            given = {
                "pixel_values": torch.from_numpy(np.concatenate([each.inputs["patches"] for each in pictures])),
                "image_grid_thw": torch.tensor([(1, rows * merge, columns * merge) for rows, columns in grids]),
                "mm_token_type_ids": (batch == token).int(),
            }
        with only_rows(model.get_output_embeddings(), examples, firsts) as split:
            return split(model(input_ids=batch, use_cache=False, **given).logits)

    return OracleModel(
        model=model,
        layers=tuple(text.layers),
        logits=logits,
        encoders={
            "vision": (vision, lambda output: output.pooler_output.split(lengths["vision"])),
            "embed": (text.embed_tokens, lambda rows: [row[:n] for row, n in zip(rows, lengths["embed"], strict=True)]),
        },
        read_by={vision.embeddings.position_embedding: vision.embeddings},
    )


class Kernel(nn.Module):
    """A convolution whose windows do not overlap, as the multiplication it is: [N, K] -> [N, out].

    Its weight [out, ...] is read as rows of K: the same bytes.
    """

    def __init__(self, convolution: Any) -> None:
        super().__init__()
        plain = convolution.kernel_size == convolution.stride and set(convolution.padding) == {0}
        if not (plain and set(convolution.dilation) == {1} and convolution.groups == 1):
            raise errors.trace_failed("vision", type(convolution).__name__, "its windows overlap or have gaps")
        with convolution.weight.fake_mode:
            self.weight = nn.Parameter(torch.empty(convolution.weight.shape[0], convolution.weight[0].numel()))
            self.bias = nn.Parameter(torch.empty(convolution.weight.shape[0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class Patches(nn.Module):
    """patches [N, 3 * temporal * patch^2], sampling [N, positions] -> hidden [N, hidden]."""

    def __init__(self, vision: Any) -> None:
        super().__init__()
        self.project = Kernel(vision.patch_embed.proj)
        self.norm = vision.post_conv_layernorm
        self.table = vision.embeddings.position_embedding.weight
        self.norms = rms_norms(self.norm)

    def forward(self, patches: torch.Tensor, sampling: torch.Tensor) -> torch.Tensor:
        with rms_norm_as_op(self.norms):
            hidden: torch.Tensor = self.norm(self.project(patches)) + sampling @ self.table
        return hidden


class Block(nn.Module):
    """One block over all N patches of a picture: hidden [N, hidden], cos and sin [1, N, head_dim / 2]."""

    def __init__(self, block: Any, count: int) -> None:
        super().__init__()
        self.block, self.count = block, count
        self.norms = rms_norms(block)
        self.room: Any = sys.modules[type(block.attn).__module__]
        self.apply_rotary = self.room.apply_rotary_pos_emb_vision
        self.interleaved = rotary_layout(self._by_heads, block.attn.head_dim, block.attn.head_dim)

    def forward(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        with self._rotary_as_op(), rms_norm_as_op(self.norms):
            out: torch.Tensor = self.block(
                hidden, cu_seqlens=None, max_seqlen=self.count, position_embeddings=(cos, sin)
            )
        return out

    def _by_heads(self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[Any, Any]:
        """The model's function, which takes [N, H, D], on [1, H, N, D]."""
        pair = self.apply_rotary(q[0].transpose(0, 1), k[0].transpose(0, 1), cos[0], sin[0])
        return pair[0].transpose(0, 1)[None], pair[1].transpose(0, 1)[None]

    @contextmanager
    def _rotary_as_op(self) -> Iterator[None]:
        def emit(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[Any, Any]:
            def rotate(x: torch.Tensor) -> torch.Tensor:
                turned = rotate_as_op(x.transpose(0, 1)[None], (cos, sin), {"interleaved": self.interleaved})
                return turned[0].transpose(0, 1)

            return rotate(q), rotate(k)

        self.room.apply_rotary_pos_emb_vision = emit
        try:
            yield
        finally:
            self.room.apply_rotary_pos_emb_vision = self.apply_rotary


class Merge(nn.Module):
    """hidden [N, hidden] -> features [N / merge^2, out_hidden]."""

    def __init__(self, vision: Any) -> None:
        super().__init__()
        self.norm, self.merger = vision.post_layernorm, vision.merger
        self.downsample = Kernel(vision.downsample)
        self.merge = int(vision.spatial_merge_size)
        self.norms = rms_norms(self.norm)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with rms_norm_as_op(self.norms):
            hidden = self.norm(hidden)
        windows = hidden.view(-1, self.merge, self.merge, hidden.shape[-1]).permute(0, 3, 1, 2)
        features: torch.Tensor = self.merger(self.downsample(windows.flatten(1)))
        return features
