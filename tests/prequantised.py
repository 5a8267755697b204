"""Checkpoints that come quantised, written for the tests: a tiny Llama whose matrices have random codes, packed as the
methods' own tools pack them, and what those codes stand for by the methods' own formulas.

Both are written from the formats' descriptions with loops over single integers, and share nothing with the reader."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Rng = np.random.Generator

HIDDEN, INNER, VOCAB, LAYERS, KV = 128, 256, 288, 2, 64
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KV, HIDDEN), "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip
"""Rows and width of a layer's matrices."""

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": HIDDEN,
    "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 10000.0,
    "tie_word_embeddings": False, "bos_token_id": 256, "eos_token_id": 257,
}  # fmt: skip

Parts = dict[str, Array]
"""A module's tensors by the last part of their names; bfloat16 and float8 as ml_dtypes."""


@dataclass(frozen=True)
class Variant:
    """One way to come quantised: the settings in config.json, and how one matrix is made: rng, rows and width to its
    parts and the float32 matrix that they stand for. `carried`: a runtime that takes everything keeps its codes in the
    scheme `scheme`. Modules in `plain` are not quantised, and `extra` tensors say nothing of weights."""

    settings: Mapping[str, Any]
    make: Callable[[Rng, int, int], tuple[Parts, Array]]
    bits: int = 4
    scheme: str = "int4-b32"
    carried: bool = True
    zeros: bool = False
    plain: tuple[str, ...] = ()
    extra: Mapping[str, Array] = field(default_factory=dict)


def words(integers: Array, bits: int, axis: int, order: tuple[int, ...] | None = None) -> Array:
    """Integers of `bits` bits packed into int32 along an axis, whose last word is filled up with zeros."""
    each = 32 // bits
    moved = np.moveaxis(integers.astype(np.int64) & (2**bits - 1), axis, -1)
    out = np.zeros((*moved.shape[:-1], -(-moved.shape[-1] // each)), np.uint32)
    for word in range(out.shape[-1]):
        for place in range(each):
            at = word * each + (order[place] if order else place)
            if at < moved.shape[-1]:
                out[..., word] |= (moved[..., at] << (bits * place)).astype(np.uint32)
    return np.ascontiguousarray(np.moveaxis(out, -1, axis)).view(np.int32)


def _scales(rng: Rng, shape: tuple[int, ...], levels: float) -> Array:
    return rng.uniform(0.5, 2.0, shape) * 0.08 / levels


def _stand_for(codes: Array, zeros: Array, scales: Array, groups: Array) -> Array:
    """scale * (code - zero), all of one matrix [N, K], its scales and zeros [N, groups], one number after the other."""
    out = np.zeros(codes.shape, np.float32)
    for k in range(codes.shape[1]):
        group = int(groups[k])
        out[:, k] = scales[:, group].astype(np.float32) * (codes[:, k].astype(np.float32) - zeros[:, group])
    return out


def gptq(
    bits: int = 4, group: int = 32, symmetric: bool = True, stored_less: int = 1, order: bool = False,
    index: bool = True,
) -> Callable[[Rng, int, int], tuple[Parts, Array]]:  # fmt: skip
    """AutoGPTQ's `QuantLinear.pack`; one less for each zero point as GPTQModel takes it off, with borrows."""

    def make(rng: Rng, rows: int, width: int) -> tuple[Parts, Array]:
        size = width if group == -1 else group
        count = -(-width // size)
        codes = rng.integers(0, 2**bits, (rows, width))
        zeros = np.full((rows, count), 2 ** (bits - 1))
        if not symmetric:
            zeros = rng.integers(0, 2**bits, (rows, count))
        scales = _scales(rng, (rows, count), 2 ** (bits - 1)).astype(np.float16)
        groups = np.arange(width) // size
        if order:
            groups = rng.permutation(groups)
        less = sum(stored_less << place for place in range(0, 32, bits))
        parts = {
            "qweight": words(codes, bits, 1).T,
            "qzeros": (words(zeros.T, bits, 1).view(np.uint32) - np.uint32(less)).view(np.int32),
            "scales": scales.T,
            "g_idx": groups.astype(np.int32),
        }
        if not index:
            del parts["g_idx"]
        return parts, _stand_for(codes, zeros, scales, groups)

    return make


def awq(group: int = 64) -> Callable[[Rng, int, int], tuple[Parts, Array]]:
    """AutoAWQ's `WQLinear_GEMM.from_linear`."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def make(rng: Rng, rows: int, width: int) -> tuple[Parts, Array]:
        size = width if group == -1 else group
        codes = rng.integers(0, 16, (rows, width))
        zeros = rng.integers(0, 16, (rows, width // size))
        scales = _scales(rng, zeros.shape, 8).astype(np.float16)
        parts = {
            "qweight": words(codes.T, 4, 1, order), "qzeros": words(zeros.T, 4, 1, order), "scales": scales.T,
        }  # fmt: skip
        return parts, _stand_for(codes, zeros, scales, np.arange(width) // size)

    return make


def compressed(
    bits: int = 4, group: int = 32, symmetric: bool = True, packed: bool = True, order: bool = False,
    dtype: Any = ml_dtypes.bfloat16,
) -> Callable[[Rng, int, int], tuple[Parts, Array]]:  # fmt: skip
    """compressed-tensors' pack-quantized and, where not `packed`, int-quantized."""

    def make(rng: Rng, rows: int, width: int) -> tuple[Parts, Array]:
        size = width if group == -1 else group
        middle = 2 ** (bits - 1)
        codes = rng.integers(-middle, middle, (rows, width))
        zeros = np.zeros((rows, width // size), np.int64)
        if not symmetric:
            zeros = rng.integers(-middle, middle, zeros.shape)
        scales = _scales(rng, zeros.shape, middle).astype(dtype)
        groups = np.arange(width) // size
        if order:
            groups = rng.permutation(groups)
        parts: Parts = {"weight_scale": scales}
        if packed:
            parts["weight_packed"] = words(codes + middle, bits, 1)
            parts["weight_shape"] = np.array([rows, width], np.int64)
        else:
            parts["weight"] = codes.astype(np.int8)
        if not symmetric:
            parts["weight_zero_point"] = words(zeros + middle, bits, 0) if packed else zeros.astype(np.int8)
        if order:
            parts["weight_g_idx"] = groups.astype(np.int32)
        return parts, _stand_for(codes, zeros, scales, groups)

    return make


def float8(
    block: tuple[int, int] | None, name: str = "weight_scale_inv", whole: bool = False, dtype: Any = np.float32
) -> Callable[[Rng, int, int], tuple[Parts, Array]]:
    """DeepSeek's blocks, or, where there is no block, a scale per row, or one for the `whole` matrix."""

    def make(rng: Rng, rows: int, width: int) -> tuple[Parts, Array]:
        numbers = (rng.standard_normal((rows, width)) * 60).astype(ml_dtypes.float8_e4m3fn)
        tall, wide = block or (rows if whole else 1, width)
        scales = _scales(rng, (-(-rows // tall), -(-width // wide)), 128).astype(dtype)
        out = numbers.astype(np.float32)
        for r in range(rows):
            for c in range(scales.shape[1]):
                out[r, c * wide : (c + 1) * wide] *= np.float32(scales[r // tall, c])
        return {"weight": numbers, name: scales.reshape(()) if whole else scales}, out

    return make


def _group(bits: int, group: int, symmetric: bool = True, kind: str = "int", **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "symmetric": symmetric, "group_size": group, **more}
    return {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}


def _gptq_settings(bits: int = 4, group: int = 32, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, "sym": True, **more}


def _compressed_settings(form: str, groups: dict[str, Any]) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"]}


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [64, 96]}
PER_ROW = {"strategy": "channel", "kind": "float"}

VARIANTS: Mapping[str, Variant] = {
    "gptq symmetric": Variant(_gptq_settings(), gptq()),
    "gptq groups of 128": Variant(_gptq_settings(group=128), gptq(group=128)),
    "gptq one group": Variant(_gptq_settings(group=-1), gptq(group=-1)),
    "gptq without g_idx": Variant(_gptq_settings(group=64), gptq(group=64, index=False)),
    "gptq with zero points": Variant(_gptq_settings(sym=False), gptq(symmetric=False), zeros=True),
    "gptq v2 with zero points": Variant(
        _gptq_settings(sym=False, checkpoint_format="gptq_v2"), gptq(symmetric=False, stored_less=0), zeros=True
    ),
    "gptq act-order": Variant(_gptq_settings(desc_act=True), gptq(order=True), carried=False),
    "gptq uneven groups": Variant(_gptq_settings(group=96), gptq(group=96), carried=False),
    "gptq int8": Variant(_gptq_settings(bits=8), gptq(bits=8), bits=8, scheme="int8"),
    "gptq int8 with zero points": Variant(
        _gptq_settings(bits=8, sym=False), gptq(bits=8, symmetric=False), bits=8, scheme="int8", carried=False
    ),
    "awq": Variant(AWQ, awq(), zeros=True),
    "awq one group": Variant({**AWQ, "group_size": -1}, awq(-1), zeros=True),
    "awq, one module plain": Variant(
        {**AWQ, "modules_to_not_convert": ["o_proj"]}, awq(), zeros=True, plain=("self_attn.o_proj",)
    ),
    "pack-quantized": Variant(_compressed_settings("pack-quantized", _group(4, 32)), compressed()),
    "pack-quantized, float32 scales": Variant(
        _compressed_settings("pack-quantized", _group(4, 128)), compressed(group=128, dtype=np.float32)
    ),
    "pack-quantized with zero points": Variant(
        _compressed_settings("pack-quantized", _group(4, 32, False)), compressed(symmetric=False), zeros=True
    ),
    "pack-quantized act-order": Variant(
        _compressed_settings("pack-quantized", _group(4, 32, actorder="group")), compressed(order=True), carried=False
    ),
    "pack-quantized int8": Variant(
        _compressed_settings("pack-quantized", _group(8, 64)), compressed(8, 64), bits=8, scheme="int8"
    ),
    "int-quantized": Variant(
        _compressed_settings("int-quantized", _group(8, 0, strategy="channel")), compressed(8, -1, packed=False),
        bits=8, scheme="int8", plain=("mlp.down_proj",),
    ),
    "float-quantized": Variant(
        _compressed_settings("float-quantized", _group(8, 0, **PER_ROW)), float8(None, "weight_scale"),
        bits=8, scheme="fp8", extra={"model.layers.0.self_attn.k_scale": np.float32([0.5])},
    ),
    "fp8 blocks": Variant(FP8, float8((64, 96)), bits=8, scheme="int8", carried=False),
    "fp8 blocks, bfloat16 scales": Variant(
        {**FP8, "weight_block_size": [128, 128]}, float8((128, 128), dtype=ml_dtypes.bfloat16),
        bits=8, scheme="int8", carried=False,
    ),
    "fp8 one scale": Variant(
        {**FP8, "weight_block_size": None, "activation_scheme": "static"}, float8(None, whole=True), bits=8,
        scheme="fp8", extra={"model.layers.1.mlp.up_proj.activation_scale": np.float32(0.5)},
    ),
}  # fmt: skip
"""Methods and their variants, by names for people."""


def tensors_of(variant: Variant, seed: int = 0) -> tuple[Parts, Parts]:
    """A whole model's tensors as they are stored, and the float32 ones that its matrices stand for."""
    rng = np.random.default_rng(seed)
    stored: Parts = {"model.norm.weight": np.float16(1 + 0.1 * rng.standard_normal(HIDDEN)), **variant.extra}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        stored[name] = (0.5 * rng.standard_normal((VOCAB, HIDDEN))).astype(np.float16)
    wanted: Parts = {}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            stored[f"{at}.{norm}.weight"] = np.float16(1 + 0.1 * rng.standard_normal(HIDDEN))
        for module, (rows, width) in SHAPES.items():
            name = f"{at}.{module}"
            if module in variant.plain:
                stored[f"{name}.weight"] = (0.1 * rng.standard_normal((rows, width))).astype(np.float16)
                continue
            parts, wanted[f"{name}.weight"] = variant.make(rng, rows, width)
            stored |= {f"{name}.{part}": array for part, array in parts.items()}
    return stored, wanted


def write(folder: Path, variant: Variant, stored: Mapping[str, Array]) -> Path:
    """A checkpoint folder of these tensors."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, "quantization_config": variant.settings}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: np.ascontiguousarray(array) for name, array in stored.items()}, folder / "model.safetensors")
    return folder
