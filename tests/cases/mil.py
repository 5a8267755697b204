"""Cases of every operation that the interpreter of ML programs knows, with an oracle where coremltools has none.

An oracle of None is coremltools' own value inference. Others are torch's, or plain numpy where torch lacks the thing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from cases.ops import normal

Oracle = Callable[..., Any]
INFERRED = None


@dataclass(frozen=True)
class MilCase:
    """One call of an operation. `oracle` takes the same arguments."""

    op: str
    inputs: dict[str, Any]
    oracle: Oracle | None = INFERRED
    note: str = ""
    tolerance: float = 2e-6

    def __str__(self) -> str:
        return f"{self.op} {self.note}".strip().replace(" ", "_")


def positive(*shape: int, seed: int = 0) -> np.ndarray:
    return np.abs(normal(*shape, seed=seed)) + np.float32(0.1)


def whole(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def t(x: Any) -> Any:
    """As a tensor, where it is an array."""
    return torch.from_numpy(np.ascontiguousarray(x)) if isinstance(x, np.ndarray) and x.ndim else x


def by_torch(function: Callable[..., Any]) -> Oracle:
    """`function` with tensors for arrays."""

    def oracle(**inputs: Any) -> Any:
        made = function(**{name: t(value) for name, value in inputs.items()})
        return tuple(each.numpy() for each in made) if isinstance(made, tuple) else made.numpy()

    return oracle


X, Y = normal(2, 3, 4), normal(2, 3, 4, seed=1)
BOOLS = X > 0
PICTURE, KERNEL = normal(1, 4, 9, 8), normal(6, 4, 3, 3, seed=1)
UNIT = np.clip(X, -0.9, 0.9)

UNARY = [
    *(MilCase(op, {"x": X}) for op in ("abs", "atan", "ceil", "cos", "exp", "exp2", "floor", "round", "sign", "sin")),
    *(
        MilCase(op, {"x": X})
        for op in ("cosh", "sinh", "square", "tanh", "erf", "relu", "relu6", "sigmoid", "softplus")
    ),
    *(MilCase(op, {"x": X}) for op in ("softsign", "identity")),
    *(MilCase(op, {"x": UNIT}) for op in ("acos", "asin", "atanh", "tan")),
    *(MilCase(op, {"x": positive(2, 3)}) for op in ("sqrt", "rsqrt", "log", "inverse")),
    MilCase("silu", {"x": X}, by_torch(lambda x: F.silu(x))),
    MilCase("logical_not", {"x": BOOLS}),
    MilCase("cast", {"x": 3 * X, "dtype": "int32"}),
    MilCase("cast", {"x": whole(0, 3, -1), "dtype": "bool"}, note="to bool"),
    MilCase("cast", {"x": BOOLS, "dtype": "fp32"}, note="of bool"),
    MilCase("clip", {"x": X, "alpha": np.float32(-0.5), "beta": np.float32(0.25)}),
    MilCase("threshold", {"x": X, "alpha": np.float32(0.1)}),
    MilCase("clamped_relu", {"x": X, "alpha": np.float32(0.2), "beta": np.float32(0.5)}),
    MilCase("elu", {"x": X, "alpha": np.float32(0.7)}),
    MilCase("leaky_relu", {"x": X, "alpha": np.float32(0.1)}),
    MilCase("linear_activation", {"x": X, "alpha": np.float32(0.1), "beta": np.float32(2)}),
    MilCase("prelu", {"x": PICTURE, "alpha": positive(4)}),
    MilCase("scaled_tanh", {"x": X, "alpha": np.float32(0.1), "beta": np.float32(2)}),
    MilCase("sigmoid_hard", {"x": X, "alpha": np.float32(0.4), "beta": np.float32(0.5)}),
    MilCase("softplus_parametric", {"x": X, "alpha": positive(3), "beta": positive(3, seed=1)}),
    MilCase("thresholded_relu", {"x": X, "alpha": np.float32(0.3)}),
    *(
        MilCase("gelu", {"x": X, "mode": mode}, note=mode)
        for mode in ("EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION")
    ),
    MilCase("softmax", {"x": 9 * X, "axis": np.int32(1)}),
]

BINARY = [
    *(
        MilCase(op, {"x": X, "y": Y})
        for op in ("add", "sub", "mul", "maximum", "minimum", "mod", "real_div", "floor_div")
    ),
    *(MilCase(op, {"x": X, "y": Y[:1, :, :1]}, note="broadcast") for op in ("add", "mul", "greater", "less_equal")),
    *(
        MilCase(op, {"x": X, "y": X * BOOLS})
        for op in ("equal", "not_equal", "greater", "greater_equal", "less", "less_equal")
    ),
    *(MilCase(op, {"x": BOOLS, "y": Y > 0}) for op in ("logical_and", "logical_or", "logical_xor")),
    *(MilCase(op, {"x": whole(-7, 7, 5), "y": whole(2, -2, 3)}, note="whole") for op in ("floor_div", "mod", "sub")),
    MilCase("pow", {"x": positive(2, 3), "y": normal(2, 3)}),
    MilCase("select", {"cond": BOOLS, "a": X, "b": Y}),
]

REDUCTIONS = [
    *(
        MilCase(op, {"x": positive(2, 3, 4), "axes": whole(-1, 0), "keep_dims": keep}, note=str(keep))
        for op in (
            "reduce_max",
            "reduce_min",
            "reduce_mean",
            "reduce_sum",
            "reduce_prod",
            "reduce_sum_square",
            "reduce_l1_norm",
            "reduce_l2_norm",
            "reduce_log_sum",
            "reduce_log_sum_exp",
        )
        for keep in (False, True)
    ),
    *(
        MilCase(op, {"x": X, "axis": np.int32(axis), "keep_dims": keep}, note=f"{axis} {keep}")
        for op in ("reduce_argmax", "reduce_argmin")
        for axis, keep in ((1, False), (-1, True))
    ),
    MilCase("cumsum", {"x": X, "axis": np.int32(1)}),
    MilCase("cumsum", {"x": X, "axis": np.int32(-1), "reverse": True}, note="reverse"),
    # coremltools' own inference of exclusive sums fails: it hands an array to numpy as a dtype
    MilCase(
        "cumsum",
        {"x": X, "axis": np.int32(1), "exclusive": True},
        lambda x, **_: np.stack([0 * x[:, 0], x[:, 0], x[:, 0] + x[:, 1]], 1),
        "exclusive",
    ),
    MilCase(
        "cumsum",
        {"x": X, "axis": np.int32(1), "exclusive": True, "reverse": True},
        lambda x, **_: np.stack([x[:, 1] + x[:, 2], x[:, 2], 0 * x[:, 0]], 1),
        "exclusive reverse",
    ),
    MilCase("argsort", {"x": X, "axis": np.int32(-1), "ascending": True}),
    MilCase("argsort", {"x": X, "axis": np.int32(1)}, note="descending"),
    MilCase("topk", {"x": X, "k": np.int32(2), "axis": np.int32(-1)}),
    MilCase("topk", {"x": X, "k": np.int32(2), "axis": np.int32(1), "ascending": True}, note="ascending"),
]

SHAPES = [
    MilCase("reshape", {"x": X, "shape": whole(0, -1)}, lambda x, shape: x.reshape(2, 12), "keeps and fills"),
    MilCase("reshape", {"x": X, "shape": whole(3, 8)}),
    MilCase(
        "reshape_like",
        {
            "x": X,
            "ref_tensors": [normal(3, 5), normal(7, 8)],
            "begins": whole(0, 1),
            "ends": whole(1, 2),
            "end_masks": np.array([False, True]),
        },
        lambda x, **_: x.reshape(3, 8),
    ),
    MilCase("expand_dims", {"x": X, "axes": whole(0, -1)}),
    MilCase("squeeze", {"x": normal(1, 3, 1), "axes": whole(0)}),
    MilCase("squeeze", {"x": normal(1, 3, 1)}, note="all"),
    MilCase("transpose", {"x": X, "perm": whole(2, 0, 1)}),
    MilCase("flatten2d", {"x": X, "axis": np.int32(2)}, lambda x, axis: x.reshape(6, 4)),
    MilCase("shape", {"x": X}, lambda x: np.array(x.shape, np.int32)),
    MilCase("concat", {"values": [X, Y], "axis": np.int32(-1)}),
    MilCase(  # the example in coremltools' own documentation, which its inference does not follow
        "concat",
        {
            "values": [
                np.array([[1, 2], [3, 4], [5, 6]], np.float32),
                np.array([[7, 8], [9, 10], [11, 12]], np.float32),
            ],
            "axis": np.int32(0),
            "interleave": True,
        },
        lambda **_: np.array([[1, 2], [7, 8], [3, 4], [9, 10], [5, 6], [11, 12]]),
        "interleaved",
    ),
    MilCase("stack", {"values": [X, Y], "axis": np.int32(1)}),
    MilCase("split", {"x": X, "num_splits": np.int32(2), "axis": np.int32(2)}),
    MilCase("split", {"x": X, "split_sizes": whole(1, 3), "axis": np.int32(-1)}, note="by sizes"),
    MilCase("tile", {"x": X, "reps": whole(1, 2, 3)}),
    MilCase("reverse", {"x": X, "axes": whole(1, 2)}),
    MilCase("reverse", {"x": X}, note="all"),
    MilCase("pad", {"x": X, "pad": whole(1, 2, 0, 1), "mode": "constant", "constant_val": np.float32(3)}),
    *(
        MilCase("pad", {"x": PICTURE, "pad": whole(1, 2, 2, 0), "mode": mode}, note=mode)
        for mode in ("reflect", "replicate")
    ),
    MilCase(
        "depth_to_space",
        {"x": normal(1, 8, 2, 3), "block_size": np.int32(2)},
        lambda x, block_size: x.reshape(1, 2, 2, 2, 2, 3).transpose(0, 3, 4, 1, 5, 2).reshape(1, 2, 4, 6),
    ),
    MilCase(
        "space_to_depth",
        {"x": normal(1, 2, 4, 6), "block_size": np.int32(2)},
        lambda x, block_size: x.reshape(1, 2, 2, 2, 3, 2).transpose(0, 3, 5, 1, 2, 4).reshape(1, 8, 2, 3),
    ),
    MilCase(
        "pixel_shuffle",
        {"x": normal(1, 8, 2, 3), "upscale_factor": np.int32(2)},
        by_torch(lambda x, upscale_factor: F.pixel_shuffle(x, int(upscale_factor))),
    ),
    MilCase(
        "upsample_nearest_neighbor",
        {"x": PICTURE, "scale_factor_height": np.int32(2), "scale_factor_width": np.int32(3)},
        by_torch(lambda x, scale_factor_height, scale_factor_width: F.interpolate(x, scale_factor=(2, 3))),
    ),
    MilCase("fill", {"shape": whole(2, 3), "value": np.float32(1.5)}),
    MilCase("fill_like", {"ref_tensor": X, "value": np.float32(2)}, lambda ref_tensor, value: np.full((2, 3, 4), 2.0)),
    MilCase("range_1d", {"start": np.int32(2), "end": np.int32(9), "step": np.int32(3)}),
    MilCase("one_hot", {"indices": whole(2, 0), "one_hot_vector_size": np.int32(4)}, lambda **_: np.eye(4)[[2, 0]]),
    *(
        MilCase("band_part", {"x": X, "lower": np.int32(low), "upper": np.int32(high)}, note=f"{low} {high}")
        for low, high in ((-1, 0), (0, -1), (1, 1))
    ),
    MilCase("non_zero", {"x": X * BOOLS}),
]

SLICES = [
    MilCase("slice_by_index", {"x": X, "begin": whole(0, 1, 3), "end": whole(2, 3, 0), "stride": whole(1, 1, -1)}),
    MilCase(
        "slice_by_index",
        {
            "x": X,
            "begin": whole(1, 0, 1),
            "end": whole(0, 2, 3),
            "begin_mask": np.array([False, True, False]),
            "end_mask": np.array([True, False, False]),
            "squeeze_mask": np.array([True, False, False]),
        },
        note="masks",
    ),
    MilCase("slice_by_size", {"x": X, "begin": whole(0, 1, 2), "size": whole(1, -1, 2)}),
    MilCase(
        "slice_update", {"x": X, "update": normal(2, 1, 4, seed=5), "begin": whole(0, 2, 0), "end": whole(2, 3, 4)}
    ),
    MilCase(
        "slice_update",
        {
            "x": X,
            "update": normal(2, 1, 4, seed=5),
            "begin": whole(9, 1, 9),
            "end": whole(9, 2, 9),
            "begin_mask": np.array([True, False, True]),
            "end_mask": np.array([True, False, True]),
        },
        note="masks",
    ),
    MilCase("gather", {"x": X, "indices": whole(2, 0, 1), "axis": np.int32(1)}),
    MilCase(
        "gather",
        {"x": X, "indices": np.array([[1, 0], [2, 2]], np.int32), "axis": np.int32(1), "batch_dims": np.int32(1)},
        lambda x, indices, **_: np.stack([x[0][indices[0]], x[1][indices[1]]]),
        "by batch",
    ),
    MilCase("gather_along_axis", {"x": X, "indices": np.argsort(X, axis=1).astype(np.int32), "axis": np.int32(1)}),
    MilCase(
        "gather_nd", {"x": X, "indices": np.array([[1, 2], [0, 1]], np.int32)}, lambda x, indices: x[[1, 0], [2, 1]]
    ),
    *(
        MilCase(
            "scatter",
            {"data": X, "indices": whole(0, 2), "updates": positive(2, 2, 4), "axis": np.int32(1), "mode": mode},
            oracle,
            mode,
        )
        for mode, oracle in (
            ("update", lambda data, updates, **_: np.stack([updates[:, 0], data[:, 1], updates[:, 1]], 1)),
            (
                "add",
                lambda data, updates, **_: np.stack(
                    [data[:, 0] + updates[:, 0], data[:, 1], data[:, 2] + updates[:, 1]], 1
                ),
            ),
            (
                "max",
                lambda data, updates, **_: np.stack(
                    [np.maximum(data[:, 0], updates[:, 0]), data[:, 1], np.maximum(data[:, 2], updates[:, 1])], 1
                ),
            ),
        )
    ),
    MilCase(
        "scatter_along_axis",
        {
            "data": X,
            "indices": np.argsort(Y, axis=1).astype(np.int32),
            "updates": Y,
            "axis": np.int32(1),
            "mode": "add",
        },
        by_torch(lambda data, indices, updates, **_: data.scatter_add(1, indices.long(), updates)),
    ),
    MilCase(
        "scatter_nd",
        {"data": X, "indices": np.array([[1, 2]], np.int32), "updates": normal(1, 4, seed=7), "mode": "update"},
        lambda data, updates, **_: np.stack([data[0], np.stack([data[1, 0], data[1, 1], updates[0]])]),
    ),
]


def _conv(
    x: Any,
    weight: Any,
    bias: Any = None,
    strides: Any = None,
    pad: Any = None,
    dilations: Any = None,
    groups: Any = 1,
    **_: Any,
) -> Any:
    rank = x.ndim - 2
    sides = [0] * (2 * rank) if pad is None else pad.tolist()
    padded = F.pad(x, [each for i in reversed(range(rank)) for each in sides[2 * i : 2 * i + 2]])
    step = [1] * rank if strides is None else strides.tolist()
    spread = [1] * rank if dilations is None else dilations.tolist()
    return (F.conv1d if rank == 1 else F.conv2d)(padded, weight, bias, step, 0, spread, int(groups))


def _conv_transpose(x: Any, weight: Any, strides: Any = None, groups: Any = 1, pad: Any = None, **_: Any) -> Any:
    step = 1 if strides is None else strides.tolist()
    return F.conv_transpose2d(x, weight, None, step, 0 if pad is None else int(pad[0]), 0, int(groups))


LAYERS = [
    MilCase("linear", {"x": X, "weight": normal(5, 4), "bias": normal(5)}),
    MilCase("matmul", {"x": X, "y": normal(2, 4, 5)}),
    MilCase("matmul", {"x": X, "y": normal(5, 4), "transpose_y": True}, note="transposed"),
    MilCase("matmul", {"x": normal(2, 4, 3), "y": normal(2, 4, 5), "transpose_x": True}, note="x transposed"),
    MilCase(
        "einsum",
        {"values": [normal(2, 3, 4), normal(2, 4, 5)], "equation": "bij,bjk->bik"},
        lambda values, equation: values[0] @ values[1],
    ),
    MilCase(
        "scaled_dot_product_attention",
        {"query": normal(1, 2, 3, 4), "key": normal(1, 2, 5, 4), "value": normal(1, 2, 5, 4, seed=1)},
    ),
    MilCase(
        "scaled_dot_product_attention",
        {
            "query": normal(1, 2, 3, 4),
            "key": normal(1, 2, 5, 4),
            "value": normal(1, 2, 5, 6),
            "attn_mask": np.tril(np.ones((3, 5), bool)),
        },
        by_torch(lambda query, key, value, attn_mask: F.scaled_dot_product_attention(query, key, value, attn_mask)),
        "bool mask",
    ),
    MilCase(
        "scaled_dot_product_attention",
        {
            "query": normal(1, 2, 3, 4),
            "key": normal(1, 2, 5, 4),
            "value": normal(1, 2, 5, 6),
            "attn_mask": normal(1, 1, 3, 5),
        },
        by_torch(lambda query, key, value, attn_mask: F.scaled_dot_product_attention(query, key, value, attn_mask)),
        "float mask",
    ),
    MilCase("conv", {"x": PICTURE, "weight": KERNEL, "bias": normal(6)}, by_torch(_conv), tolerance=1e-5),
    MilCase(
        "conv",
        {
            "x": PICTURE,
            "weight": normal(6, 2, 3, 3),
            "strides": whole(2, 1),
            "pad_type": "custom",
            "pad": whole(1, 2, 0, 1),
            "dilations": whole(1, 2),
            "groups": np.int32(2),
        },
        by_torch(_conv),
        "strides, padding, dilations, groups",
        1e-5,
    ),
    MilCase(
        "conv",
        {"x": PICTURE, "weight": normal(4, 1, 3, 3), "groups": np.int32(4)},
        by_torch(_conv),
        "for each channel",
        1e-5,
    ),
    MilCase(
        "conv",
        {
            "x": normal(2, 5, 12),
            "weight": normal(7, 5, 3),
            "strides": whole(2),
            "pad_type": "custom",
            "pad": whole(1, 1),
        },
        by_torch(_conv),
        "over time",
        1e-5,
    ),
    MilCase(
        "conv",
        {"x": PICTURE, "weight": KERNEL, "pad_type": "same", "strides": whole(2, 2)},
        by_torch(lambda x, weight, **_: F.conv2d(F.pad(x, [0, 1, 1, 1]), weight, stride=2)),
        "same",
        1e-5,
    ),
    MilCase(
        "conv",
        {"x": PICTURE, "weight": KERNEL, "pad_type": "same_lower", "strides": whole(2, 2)},
        by_torch(lambda x, weight, **_: F.conv2d(F.pad(x, [1, 0, 1, 1]), weight, stride=2)),
        "same_lower",
        1e-5,
    ),
    MilCase(
        "conv_transpose",
        {"x": PICTURE, "weight": normal(4, 3, 3, 2), "strides": whole(2, 3)},
        by_torch(_conv_transpose),
        tolerance=1e-5,
    ),
    MilCase(
        "conv_transpose",
        {
            "x": PICTURE,
            "weight": normal(4, 3, 3, 2),
            "groups": np.int32(2),
            "pad_type": "custom",
            "pad": whole(1, 1, 1, 1),
        },
        by_torch(_conv_transpose),
        "groups",
        1e-5,
    ),
    MilCase(
        "max_pool",
        {
            "x": PICTURE,
            "kernel_sizes": whole(3, 3),
            "strides": whole(2, 2),
            "pad_type": "custom",
            "pad": whole(1, 1, 1, 1),
        },
        by_torch(lambda x, **_: F.max_pool2d(x, 3, 2, 1)),
    ),
    MilCase(
        "max_pool",
        {"x": PICTURE, "kernel_sizes": whole(2, 3), "strides": whole(2, 2), "ceil_mode": True},
        by_torch(lambda x, **_: F.max_pool2d(x, (2, 3), 2, ceil_mode=True)),
        "ceil",
    ),
    MilCase(
        "avg_pool",
        {
            "x": PICTURE,
            "kernel_sizes": whole(3, 3),
            "strides": whole(2, 2),
            "pad_type": "custom",
            "pad": whole(1, 1, 1, 1),
        },
        by_torch(lambda x, **_: F.avg_pool2d(x, 3, 2, 1)),
    ),
    MilCase(
        "avg_pool",
        {
            "x": PICTURE,
            "kernel_sizes": whole(3, 3),
            "strides": whole(2, 2),
            "pad_type": "custom",
            "pad": whole(1, 1, 1, 1),
            "exclude_padding_from_average": True,
        },
        by_torch(lambda x, **_: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)),
        "without padding",
    ),
    MilCase(
        "layer_norm",
        {"x": X, "axes": whole(-1), "gamma": normal(4), "beta": normal(4, seed=1), "epsilon": np.float32(1e-3)},
    ),
    MilCase("layer_norm", {"x": X, "axes": whole(1, 2)}, note="plain"),
    MilCase(
        "batch_norm",
        {
            "x": PICTURE,
            "mean": normal(4),
            "variance": positive(4),
            "gamma": normal(4),
            "beta": normal(4),
            "epsilon": np.float32(1e-3),
        },
        by_torch(
            lambda x, mean, variance, gamma, beta, epsilon: F.batch_norm(x, mean, variance, gamma, beta, eps=1e-3)
        ),
        tolerance=1e-5,
    ),
    MilCase(
        "instance_norm",
        {"x": PICTURE, "gamma": normal(4), "beta": normal(4), "epsilon": np.float32(1e-3)},
        by_torch(lambda x, gamma, beta, epsilon: F.instance_norm(x, weight=gamma, bias=beta, eps=1e-3)),
        tolerance=1e-5,
    ),
    MilCase("l2_norm", {"x": PICTURE, "epsilon": np.float32(1e-6)}),
]

BYTES = np.random.default_rng(3).integers(-8, 8, (6, 8)).astype(np.int8)
COMPRESSED = [
    MilCase(
        "constexpr_blockwise_shift_scale",
        {"data": BYTES, "scale": positive(6, 2)},
        lambda data, scale: data * scale.repeat(4, 1),
    ),
    MilCase(
        "constexpr_blockwise_shift_scale",
        {"data": BYTES, "scale": positive(3, 1), "offset": whole(1, -2, 3).astype(np.int8)[:, None]},
        lambda data, scale, offset: (data - offset.repeat(2, 0)) * scale.repeat(2, 0),
        "offset",
    ),
    MilCase(
        "constexpr_blockwise_shift_scale",
        {"data": BYTES, "scale": -positive(6, 2), "offset": 9 * normal(6, 2, seed=4)},
        lambda data, scale, offset: (data - offset.repeat(4, 1)) * scale.repeat(4, 1),
        "an offset that is no whole number",
    ),
    MilCase(
        "constexpr_affine_dequantize",
        {"quantized_data": BYTES, "zero_point": np.int8(3), "scale": positive(8), "axis": np.int32(1)},
        lambda quantized_data, zero_point, scale, axis: (quantized_data.astype(np.float32) - 3) * scale,
    ),
    MilCase(
        "constexpr_cast",
        {"source_val": X.astype(np.float16), "output_dtype": "fp32"},
        lambda source_val, output_dtype: source_val,
    ),
    MilCase(
        "constexpr_lut_to_dense",
        {
            "indices": np.array([[2, 3], [3, 0], [1, 0], [3, 0], [2, 1], [0, 3]], np.uint8),
            "lut": np.array([1, 5, 9, 13, 2, 10, 18, 26], np.float32).reshape(2, 1, 4, 1),
        },
        # the example in coremltools' own documentation
        lambda indices, lut: np.array([[9, 13], [13, 1], [5, 1], [26, 2], [18, 10], [2, 26]], np.float32),
    ),
    MilCase(
        "constexpr_lut_to_dense",
        {
            "indices": np.array([[0, 0], [1, 0]], np.uint8),
            "lut": np.arange(6, dtype=np.float32).reshape(1, 1, 2, 3),
            "vector_axis": np.int32(0),
        },
        lambda indices, lut, vector_axis: np.array([[0, 0], [1, 1], [2, 2], [3, 0], [4, 1], [5, 2]]),
        "vectors",
    ),
    MilCase(
        "constexpr_lut_to_dense",
        {
            "indices": np.array([0b00_10_01_11], np.uint8),
            "lut": np.array([5, 6, 7, 8], np.float32),
            "shape": np.array([2, 2], np.uint32),
        },
        lambda indices, lut, shape: np.array([[8, 6], [7, 5]]),
        "of iOS 16",
    ),
    MilCase(
        "constexpr_sparse_to_dense",
        {"nonzero_data": np.array([5, 6], np.float32), "mask": np.array([[0, 1], [1, 0]], np.uint8)},
        lambda nonzero_data, mask: np.array([[0, 5], [6, 0]]),
    ),
    MilCase(
        "constexpr_sparse_to_dense",
        {
            "nonzero_data": np.array([5, 6], np.float32),
            "mask": np.array([0b0110], np.uint8),
            "shape": np.array([2, 2], np.uint32),
        },
        lambda nonzero_data, mask, shape: np.array([[0, 5], [6, 0]]),
        "of iOS 16",
    ),
    MilCase("quantize", {"input": X, "scale": np.float32(0.05), "output_dtype": "int8", "zero_point": np.int8(3)}),
    MilCase(
        "quantize", {"input": X, "scale": positive(3), "output_dtype": "uint8", "axis": np.int32(1)}, note="by axis"
    ),
    MilCase(
        "dequantize",
        {"input": BYTES, "scale": positive(8), "zero_point": np.arange(8, dtype=np.int8), "axis": np.int32(1)},
        lambda input, scale, zero_point, axis: (input.astype(np.float32) - zero_point) * scale,
    ),
]

MIL: list[MilCase] = [*UNARY, *BINARY, *REDUCTIONS, *SHAPES, *SLICES, *LAYERS, *COMPRESSED]
