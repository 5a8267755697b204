"""What the layers of ML programs mean, in numpy: products, convolutions, norms, attention, compressed constants.

As coreml_interpreter_ops, whose table this fills further.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from edgeexport.backends.coreml_interpreter_ops import OPS, ints, op, softmax
from edgeexport.core import Array

__all__ = ["OPS"]


# products


@op("linear")
def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x [..., K] times weight [N, K] transposed. As one matrix: numpy would loop over the leading axes. One row goes
    the other way round, as a matrix times a vector, which is ten times as fast."""
    rows = x.reshape(-1, x.shape[-1])
    product = weight @ rows[0] if len(rows) == 1 else rows @ weight.T
    found = product.reshape(*x.shape[:-1], weight.shape[0])
    return found if bias is None else found + bias


@op("matmul")
def matmul(x: Array, y: Array, transpose_x: Any = False, transpose_y: Any = False) -> Array:
    left = x.swapaxes(-1, -2) if transpose_x else x
    right = y.swapaxes(-1, -2) if transpose_y else y
    if right.ndim == 2 and left.ndim > 2:
        return (left.reshape(-1, left.shape[-1]) @ right).reshape(*left.shape[:-1], right.shape[-1])
    return left @ right


@op("einsum")
def einsum(values: Sequence[Array], equation: str) -> Array:
    found: Array = np.einsum(equation, *values, optimize=True)
    return found


@op("scaled_dot_product_attention")
def attention(query: Array, key: Array, value: Array, attn_mask: Array | None = None) -> Array:
    scores = query @ key.swapaxes(-1, -2) / np.float32(math.sqrt(query.shape[-1]))
    if attn_mask is not None:
        scores = np.where(attn_mask, scores, -np.inf) if attn_mask.dtype == bool else scores + attn_mask
    return softmax(scores) @ value


# windows


def _windows(x: Array, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> Array:
    """[N, C, *out, *kernel] of x [N, C, *in]."""
    spans = [(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True)]
    axes = tuple(range(2, x.ndim))
    view = sliding_window_view(x, spans, axis=axes)
    steps = (slice(None), slice(None), *(slice(None, None, step) for step in strides))
    found: Array = view[(*steps, *(slice(None, None, dilation) for dilation in dilations))]
    return found


def _padding(
    x: Array, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], pad_type: str, pad: Array | None
) -> list[tuple[int, int]]:
    """(before, after) of each axis in space."""
    if pad_type == "valid":
        return [(0, 0)] * len(kernel)
    if pad_type == "custom":
        sides = ints(pad) if pad is not None else [0] * (2 * len(kernel))
        return list(zip(sides[::2], sides[1::2], strict=True))
    if pad_type not in ("same", "same_lower"):
        raise ValueError(f"there is no padding {pad_type}")
    found = []
    for size, window, step, dilation in zip(x.shape[2:], kernel, strides, dilations, strict=True):
        total = max(0, (-(-size // step) - 1) * step + (window - 1) * dilation + 1 - size)
        less, more = total // 2, total - total // 2
        found.append((less, more) if pad_type == "same" else (more, less))
    return found


PLACES = frozenset({"strides", "pad_type", "pad", "groups"})


def is_product(
    kernel: Sequence[int], strides: Array | None = None, pad_type: str = "valid", pad: Array | None = None,
    groups: Any = 1,
) -> bool:  # fmt: skip
    """Whether a convolution by a kernel of this shape is a matrix product: one point, each point in its own place."""
    padded = pad_type == "custom" and pad is not None and any(ints(pad))
    moved = strides is not None and set(ints(strides)) != {1}
    return set(kernel[2:]) == {1} and int(groups) == 1 and not padded and not moved


@op("conv")
def conv(
    x: Array, weight: Array, bias: Array | None = None, strides: Array | None = None, pad_type: str = "valid",
    pad: Array | None = None, dilations: Array | None = None, groups: Any = 1,
) -> Array:  # fmt: skip
    """x [N, C, *in], weight [O, C / groups, *kernel]."""
    rank, kernel = x.ndim - 2, weight.shape[2:]
    if weight.shape[1] == x.shape[1] and is_product(weight.shape, strides, pad_type, pad, groups):
        found = np.matmul(weight.reshape(weight.shape[:2]), x.reshape(*x.shape[:2], -1))
        found = found.reshape(x.shape[0], weight.shape[0], *x.shape[2:])
        return found if bias is None else found + bias.reshape(-1, *[1] * rank)
    steps = ints(strides) if strides is not None else [1] * rank
    spread = ints(dilations) if dilations is not None else [1] * rank
    sides = _padding(x, kernel, steps, spread, pad_type, pad)
    seen = _windows(np.pad(x, [(0, 0), (0, 0), *sides]), kernel, steps, spread)
    batch, channels, *out = seen.shape[: 2 + rank]
    parts, size = int(groups), int(np.prod(kernel, dtype=np.int64))
    if channels % parts or weight.shape[0] % parts or weight.shape[1] != channels // parts:
        raise ValueError(f"{channels} channels in {parts} groups do not fit a weight of {list(weight.shape)}")
    order = (0, *range(2, 2 + rank), 1, *range(2 + rank, 2 + 2 * rank))
    columns = seen.transpose(order).reshape(-1, parts, channels // parts * size)
    rows = weight.reshape(parts, weight.shape[0] // parts, -1)
    product = np.matmul(columns.transpose(1, 0, 2), rows.transpose(0, 2, 1))  # [groups, positions, O / groups]
    found = product.transpose(1, 0, 2).reshape(batch, *out, weight.shape[0])
    found = np.moveaxis(found, -1, 1)
    return found if bias is None else found + bias.reshape(-1, *[1] * rank)


@op("conv_transpose")
def conv_transpose(
    x: Array, weight: Array, bias: Array | None = None, pad: Array | None = None, output_shape: Array | None = None,
    pad_type: str = "valid", strides: Array | None = None, dilations: Array | None = None, groups: Any = 1,
) -> Array:  # fmt: skip
    """x [N, C, *in], weight [C, O / groups, *kernel]: a convolution of x with zeros between."""
    rank, parts = x.ndim - 2, int(groups)
    steps = ints(strides) if strides is not None else [1] * rank
    spread = ints(dilations) if dilations is not None else [1] * rank
    if pad_type not in ("valid", "custom"):
        raise ValueError(f"the padding {pad_type} is not supported")
    sides = _padding(x, weight.shape[2:], steps, spread, pad_type, pad)
    wide = np.zeros((*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], steps, strict=True))), x.dtype)
    wide[(slice(None), slice(None), *(slice(None, None, s) for s in steps))] = x
    reach = [(k - 1) * d for k, d in zip(weight.shape[2:], spread, strict=True)]
    grown = np.pad(wide, [(0, 0), (0, 0), *((r, r) for r in reach)])
    turned = np.flip(weight, tuple(range(2, weight.ndim)))
    grouped = turned.reshape(parts, weight.shape[0] // parts, *weight.shape[1:]).swapaxes(1, 2)
    kernel = grouped.reshape(parts * weight.shape[1], weight.shape[0] // parts, *weight.shape[2:])
    whole = conv(grown, kernel, None, None, "valid", None, np.array(spread), parts)
    if output_shape is not None:
        stops = [before + size for (before, _), size in zip(sides, ints(output_shape)[2:], strict=True)]
    else:
        stops = [n - after for n, (_, after) in zip(whole.shape[2:], sides, strict=True)]
    cut = tuple(slice(before, stop) for (before, _), stop in zip(sides, stops, strict=True))
    found = whole[(slice(None), slice(None), *cut)]
    return found if bias is None else found + bias.reshape(-1, *[1] * rank)


def _pooled(
    x: Array, kernel_sizes: Array, strides: Array | None, pad_type: str, pad: Array | None, ceil_mode: Any, empty: float
) -> Array:
    """[N, C, *out, *kernel]; outside the picture is `empty`."""
    kernel, rank = ints(kernel_sizes), x.ndim - 2
    steps = ints(strides) if strides is not None else [1] * rank
    sides = _padding(x, kernel, steps, [1] * rank, pad_type, pad)
    if ceil_mode:
        sizes = zip(x.shape[2:], kernel, steps, sides, strict=True)
        sides = [(a, b + (-(size + a + b - window)) % step) for size, window, step, (a, b) in sizes]
    return _windows(np.pad(x, [(0, 0), (0, 0), *sides], constant_values=empty), kernel, steps, [1] * rank)


@op("max_pool")
def max_pool(
    x: Array, kernel_sizes: Array, strides: Array | None = None, pad_type: str = "valid", pad: Array | None = None,
    ceil_mode: Any = False,
) -> Array:  # fmt: skip
    seen = _pooled(x, kernel_sizes, strides, pad_type, pad, ceil_mode, -np.inf)
    return seen.max(axis=tuple(range(x.ndim, seen.ndim)))


@op("avg_pool")
def avg_pool(
    x: Array, kernel_sizes: Array, strides: Array | None = None, pad_type: str = "valid", pad: Array | None = None,
    exclude_padding_from_average: Any = False, ceil_mode: Any = False,
) -> Array:  # fmt: skip
    seen = _pooled(x, kernel_sizes, strides, pad_type, pad, ceil_mode, 0)
    axes = tuple(range(x.ndim, seen.ndim))
    if not exclude_padding_from_average:
        return seen.mean(axis=axes)
    counted = _pooled(np.ones_like(x), kernel_sizes, strides, pad_type, pad, ceil_mode, 0).sum(axis=axes)
    return seen.sum(axis=axes) / counted


# norms


@op("layer_norm")
def layer_norm(
    x: Array, axes: Array | None = None, gamma: Array | None = None, beta: Array | None = None, epsilon: Any = 1e-5
) -> Array:
    over = tuple(range(x.ndim)) if axes is None else tuple(each % x.ndim for each in ints(axes))
    centred = x - x.mean(axis=over, keepdims=True)
    found = centred / np.sqrt(np.square(centred).mean(axis=over, keepdims=True) + epsilon)
    shape = [size if i in over else 1 for i, size in enumerate(x.shape)]
    if gamma is not None:
        found = found * gamma.reshape(shape)
    return found if beta is None else found + beta.reshape(shape)


@op("batch_norm")
def batch_norm(
    x: Array, mean: Array, variance: Array, gamma: Array | None = None, beta: Array | None = None, epsilon: Any = 1e-5
) -> Array:
    shape = (-1, *[1] * (x.ndim - 2))
    found = (x - mean.reshape(shape)) / np.sqrt(variance.reshape(shape) + epsilon)
    if gamma is not None:
        found = found * gamma.reshape(shape)
    return found if beta is None else found + beta.reshape(shape)


@op("instance_norm")
def instance_norm(x: Array, gamma: Array | None = None, beta: Array | None = None, epsilon: Any = 1e-5) -> Array:
    over, shape = tuple(range(2, x.ndim)), (-1, *[1] * (x.ndim - 2))
    found = layer_norm(x, np.array(over), None, None, epsilon)
    if gamma is not None:
        found = found * gamma.reshape(shape)
    return found if beta is None else found + beta.reshape(shape)


@op("l2_norm")
def l2_norm(x: Array, epsilon: Any = 1e-6) -> Array:
    """Over the last three axes."""
    over = tuple(range(max(0, x.ndim - 3), x.ndim))
    return x / np.sqrt(np.square(x).sum(axis=over, keepdims=True) + epsilon)


# constants that are stored small


@op("constexpr_blockwise_shift_scale")
def blockwise_shift_scale(data: Array, scale: Array, offset: Array | None = None) -> Array:
    """scale * (data - offset), one scale and offset for each block. iOS 18."""
    if data.ndim != scale.ndim or any(size % count for size, count in zip(data.shape, scale.shape, strict=True)):
        raise ValueError(f"scales of {list(scale.shape)} do not fit data of {list(data.shape)}")
    blocks = [part for size, n in zip(data.shape, scale.shape, strict=True) for part in (n, size // n)]
    apart = [part for count in scale.shape for part in (count, 1)]
    wide = data.reshape(blocks).astype(np.float32)
    if offset is not None:
        wide = wide - offset.reshape(apart)
    return (wide * scale.reshape(apart)).reshape(data.shape)


@op("constexpr_affine_dequantize")
def affine_dequantize(quantized_data: Array, zero_point: Array, scale: Array, axis: Array) -> Array:
    """scale * (data - zero_point) along one axis. iOS 16."""
    shape = [1] * quantized_data.ndim
    shape[int(axis)] = -1
    low = zero_point.astype(np.float32).reshape(shape if zero_point.ndim else ())
    return (quantized_data.astype(np.float32) - low) * scale.reshape(shape if scale.ndim else ())


@op("constexpr_cast")
def constexpr_cast(source_val: Array, output_dtype: str) -> Array:
    return source_val.astype(np.float32)


@op("dequantize")
def dequantize(input: Array, scale: Array, zero_point: Array | None = None, axis: Any = None) -> Array:
    """scale * (input - zero_point). iOS 17."""
    shape = [1] * input.ndim
    if axis is not None:
        shape[int(axis)] = -1
    wide = input.astype(np.float32)
    if zero_point is not None:
        wide = wide - zero_point.astype(np.float32).reshape(shape if zero_point.ndim else ())
    return wide * scale.reshape(shape if scale.ndim else ())


@op("quantize")
def quantize(
    input: Array, scale: Array, output_dtype: str, zero_point: Array | None = None, axis: Any = None
) -> Array:  # fmt: skip
    """round(input / scale) + zero_point, within the type. iOS 17."""
    shape = [1] * input.ndim
    if axis is not None:
        shape[int(axis)] = -1
    wide = np.round(input / scale.reshape(shape if scale.ndim else ()))
    if zero_point is not None:
        wide = wide + zero_point.astype(np.float32).reshape(shape if zero_point.ndim else ())
    limits = np.iinfo(output_dtype)
    return np.clip(wide, limits.min, limits.max).astype(output_dtype)


def lut_to_dense(indices: Array, lut: Array, vector_axis: Array | None = None) -> Array:
    """A palette for each block, iOS 18: lut [*blocks, colours, vector]."""
    rank, vector = indices.ndim, lut.shape[-1]
    if lut.ndim != rank + 2:
        raise ValueError(f"a palette of rank {lut.ndim} does not fit indices of rank {rank}")
    which = [
        np.arange(size).reshape([-1 if i == axis else 1 for i in range(rank)]) // (size // lut.shape[axis])
        for axis, size in enumerate(indices.shape)
    ]
    taken = lut[(*which, indices)]  # [*indices, vector]
    if vector == 1:
        return taken[..., 0]
    at = int(vector_axis) % rank if vector_axis is not None else rank - 1
    sizes = list(indices.shape)
    sizes[at] *= vector
    return np.moveaxis(taken, -1, at + 1).reshape(sizes)


def old_lut_to_dense(indices: Array, lut: Array, shape: Array) -> Array:
    """One palette, iOS 16: indices are bits in a row of bytes."""
    sizes = ints(shape)
    count, bits = int(np.prod(sizes, dtype=np.int64)), int(math.log2(lut.size))
    stream = np.unpackbits(indices.view(np.uint8), bitorder="little")[: count * bits].reshape(count, bits)
    return lut[(stream << np.arange(bits, dtype=np.uint8)).sum(axis=1, dtype=np.uint8)].reshape(sizes)


@op("constexpr_lut_to_dense")
def constexpr_lut_to_dense(
    indices: Array, lut: Array, vector_axis: Array | None = None, shape: Array | None = None
) -> Array:
    """iOS 16 and iOS 18 gave one name to two operations; the shape tells which."""
    return lut_to_dense(indices, lut, vector_axis) if shape is None else old_lut_to_dense(indices, lut, shape)


@op("constexpr_sparse_to_dense")
def sparse_to_dense(nonzero_data: Array, mask: Array, shape: Array | None = None) -> Array:
    """Where the mask has a one comes the next of the data. iOS 16 has a mask of bits, and a shape; iOS 18 has uint1."""
    if shape is not None:
        sizes = ints(shape)
        count = int(np.prod(sizes, dtype=np.int64))
        mask = np.unpackbits(mask.view(np.uint8), bitorder="little")[:count].reshape(sizes)
    found = np.zeros(mask.shape, np.float32)
    found[mask.astype(bool)] = nonzero_data.reshape(-1)
    return found
