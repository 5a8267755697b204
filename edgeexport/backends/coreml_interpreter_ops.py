"""What each operation of ML programs means, in numpy: numbers, shapes and places. Layers are in coreml_interpreter_nn.

One function per operation. Its parameters have the operation's own names, so that optional ones are defaults. Floating
numbers come as float32 whatever their declared type, and who calls rounds the result to it.
Source: the operations' definitions in coremltools 9, converters/mil/mil/ops/defs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from edgeexport.core import Array

Op = Callable[..., Any]
OPS: dict[str, Op] = {}
"""Operation to its meaning: an array, or a tuple of them."""


def op(*names: str) -> Callable[[Op], Op]:
    """Put a function into the table."""

    def register(function: Op) -> Op:
        for name in names:
            if name in OPS:
                raise AssertionError(f"{name} has two meanings")
            OPS[name] = function
        return function

    return register


def ints(array: Array) -> list[int]:
    """A vector (or a number) of whole numbers, as Python's."""
    return [int(each) for each in np.ravel(array)]


# element by element

_UNARY: dict[str, Callable[[Array], Array]] = {
    "abs": np.abs, "acos": np.arccos, "asin": np.arcsin, "atan": np.arctan, "atanh": np.arctanh, "ceil": np.ceil,
    "cos": np.cos, "cosh": np.cosh, "exp": np.exp, "exp2": np.exp2, "floor": np.floor, "identity": np.array,
    "logical_not": np.logical_not, "round": np.round, "sign": np.sign, "sin": np.sin, "sinh": np.sinh,
    "sqrt": np.sqrt, "square": np.square, "tan": np.tan, "tanh": np.tanh,
}  # fmt: skip
_BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add, "equal": np.equal, "floor_div": np.floor_divide, "greater": np.greater,
    "greater_equal": np.greater_equal, "less": np.less, "less_equal": np.less_equal, "logical_and": np.logical_and,
    "logical_or": np.logical_or, "logical_xor": np.logical_xor, "maximum": np.maximum, "minimum": np.minimum,
    "mod": np.mod, "mul": np.multiply, "not_equal": np.not_equal, "pow": np.power, "real_div": np.true_divide,
    "sub": np.subtract,
}  # fmt: skip
for _name, _unary in _UNARY.items():
    op(_name)(lambda x, _unary=_unary: _unary(x))
for _name, _binary in _BINARY.items():
    op(_name)(lambda x, y, _binary=_binary: _binary(x, y))


@op("cast")
def cast(x: Array, dtype: str) -> Array:
    """Towards zero where a number becomes whole. To float16 it is rounded by who calls, as every result is."""
    kinds = {"bool": "bool", "fp16": "float32", "fp32": "float32"}
    if dtype not in kinds and dtype not in ("int8", "uint8", "int16", "uint16", "int32"):
        raise ValueError(f"there is no type {dtype}")
    return x.astype(kinds.get(dtype, dtype))


@op("clip")
def clip(x: Array, alpha: Array, beta: Array) -> Array:
    return np.clip(x, alpha, beta)


@op("inverse")
def inverse(x: Array, epsilon: float = 1e-4) -> Array:
    return 1 / (x + epsilon)


@op("log")
def log(x: Array, epsilon: float = 1e-45) -> Array:
    return np.log(x + epsilon)


@op("rsqrt")
def rsqrt(x: Array, epsilon: float = 1e-12) -> Array:
    return 1 / np.sqrt(x + epsilon)


@op("threshold")
def threshold(x: Array, alpha: Array) -> Array:
    return np.maximum(x, alpha)


@op("erf")
def erf(x: Array) -> Array:
    """Within 1.5e-7. Source: Abramowitz and Stegun, 7.1.26."""
    wide = np.abs(x.astype(np.float64))
    t = 1 / (1 + 0.3275911 * wide)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    return np.copysign(1 - series * np.exp(-wide * wide), x)


@op("select")
def select(cond: Array, a: Array, b: Array) -> Array:
    return np.where(cond, a, b)


# activations


@op("sigmoid")
def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


@op("silu")
def silu(x: Array) -> Array:
    return x * sigmoid(x)


@op("relu")
def relu(x: Array) -> Array:
    return np.maximum(x, 0)


@op("relu6")
def relu6(x: Array) -> Array:
    return np.clip(x, 0, 6)


@op("clamped_relu")
def clamped_relu(x: Array, alpha: Array, beta: Array) -> Array:
    return np.minimum(np.where(x >= 0, x, alpha * x), beta)


@op("leaky_relu")
def leaky_relu(x: Array, alpha: Array) -> Array:
    return np.where(x >= 0, x, alpha * x)


@op("prelu")
def prelu(x: Array, alpha: Array) -> Array:
    """alpha[c] belongs to the second axis."""
    return np.where(x >= 0, x, alpha.reshape(-1, *[1] * (x.ndim - 2)) * x)


@op("elu")
def elu(x: Array, alpha: Array) -> Array:
    return np.where(x >= 0, x, alpha * np.expm1(np.minimum(x, 0)))


@op("gelu")
def gelu(x: Array, mode: str = "EXACT") -> Array:
    if mode == "EXACT":
        return x * (1 + erf(x / math.sqrt(2))) / 2
    if mode == "TANH_APPROXIMATION":
        return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    if mode == "SIGMOID_APPROXIMATION":
        return x * sigmoid(1.702 * x)
    raise ValueError(f"there is no mode {mode}")


@op("softplus")
def softplus(x: Array) -> Array:
    return np.logaddexp(x, 0)


@op("softplus_parametric")
def softplus_parametric(x: Array, alpha: Array, beta: Array) -> Array:
    shape = (-1, *[1] * (x.ndim - 2))
    return alpha.reshape(shape) * np.logaddexp(beta.reshape(shape) * x, 0)


@op("softsign")
def softsign(x: Array) -> Array:
    return x / (1 + np.abs(x))


@op("scaled_tanh")
def scaled_tanh(x: Array, alpha: Array, beta: Array) -> Array:
    return alpha * np.tanh(beta * x)


@op("sigmoid_hard")
def sigmoid_hard(x: Array, alpha: Array, beta: Array) -> Array:
    return np.clip(alpha * x + beta, 0, 1)


@op("linear_activation")
def linear_activation(x: Array, alpha: Array, beta: Array) -> Array:
    return alpha * x + beta


@op("thresholded_relu")
def thresholded_relu(x: Array, alpha: Array) -> Array:
    return np.where(x >= alpha, x, 0)


@op("softmax")
def softmax(x: Array, axis: Any = -1) -> Array:
    shifted = np.exp(x - x.max(axis=int(axis), keepdims=True))
    return shifted / shifted.sum(axis=int(axis), keepdims=True)


# reductions


def _log_sum_exp(x: Array, axis: tuple[int, ...], keepdims: bool) -> Array:
    top = x.max(axis=axis, keepdims=True)
    found = np.log(np.exp(x - top).sum(axis=axis, keepdims=True)) + top
    return found if keepdims else found.squeeze(axis)


_REDUCTIONS: dict[str, Callable[..., Array]] = {
    "reduce_max": np.max,
    "reduce_min": np.min,
    "reduce_mean": np.mean,
    "reduce_sum": np.sum,
    "reduce_prod": np.prod,
    "reduce_sum_square": lambda x, axis, keepdims: np.sum(x * x, axis=axis, keepdims=keepdims),
    "reduce_l1_norm": lambda x, axis, keepdims: np.sum(np.abs(x), axis=axis, keepdims=keepdims),
    "reduce_l2_norm": lambda x, axis, keepdims: np.sqrt(np.sum(x * x, axis=axis, keepdims=keepdims)),
    "reduce_log_sum": lambda x, axis, keepdims: np.log(np.sum(x, axis=axis, keepdims=keepdims)),
    "reduce_log_sum_exp": _log_sum_exp,
}


def _reduce(x: Array, axes: Array | None, keep_dims: Array, how: Callable[..., Array]) -> Array:
    axis = tuple(range(x.ndim)) if axes is None else tuple(each % x.ndim for each in ints(axes))
    return how(x, axis=axis, keepdims=bool(keep_dims))


for _name, _how in _REDUCTIONS.items():
    op(_name)(lambda x, axes=None, keep_dims=False, _how=_how: _reduce(x, axes, keep_dims, _how))


def _arg(how: Callable[..., Array]) -> Op:
    def reduce(x: Array, axis: Any = -1, keep_dims: Any = False, output_dtype: str = "int32") -> Array:
        return how(x, axis=int(axis), keepdims=bool(keep_dims)).astype(output_dtype)

    return reduce


op("reduce_argmax")(_arg(np.argmax))
op("reduce_argmin")(_arg(np.argmin))


@op("cumsum")
def cumsum(x: Array, axis: Any = 0, exclusive: Any = False, reverse: Any = False) -> Array:
    at = int(axis)
    turned = np.flip(x, at) if reverse else x
    found = np.cumsum(turned, axis=at, dtype=x.dtype)
    if exclusive:
        found = found - turned
    return np.flip(found, at) if reverse else found


@op("argsort")
def argsort(x: Array, axis: Any = -1, ascending: Any = False) -> Array:
    return np.argsort(x if ascending else -x, axis=int(axis), kind="stable")


@op("topk")
def topk(
    x: Array, k: Any = 1, axis: Any = -1, ascending: Any = False, sort: Any = True, return_indices: Any = True,
    output_indices_dtype: str = "int32",
) -> Any:  # fmt: skip
    order = np.take(argsort(x, axis, ascending), np.arange(int(k)), axis=int(axis))
    best = np.take_along_axis(x, order, int(axis))
    return (best, order) if return_indices else best


# shapes


@op("reshape")
def reshape(x: Array, shape: Array) -> Array:
    """0 keeps a size, -1 takes what is left."""
    sizes = [x.shape[i] if size == 0 and x.size else size for i, size in enumerate(ints(shape))]
    return x.reshape(sizes)


@op("reshape_like")
def reshape_like(x: Array, ref_tensors: Sequence[Array], begins: Array, ends: Array, end_masks: Array) -> Array:
    sizes: list[int] = []
    for ref, begin, end, mask in zip(ref_tensors, begins, ends, end_masks, strict=True):
        sizes += ref.shape[int(begin) : None if mask else int(end)]
    return x.reshape(sizes)


@op("expand_dims")
def expand_dims(x: Array, axes: Array) -> Array:
    return np.expand_dims(x, tuple(ints(axes)))


@op("squeeze")
def squeeze(x: Array, axes: Array | None = None) -> Array:
    return np.squeeze(x, None if axes is None else tuple(ints(axes)))


@op("transpose")
def transpose(x: Array, perm: Array) -> Array:
    return x.transpose(ints(perm))


@op("flatten2d")
def flatten2d(x: Array, axis: Any = 1) -> Array:
    return x.reshape(int(np.prod(x.shape[: int(axis)], dtype=np.int64)), -1)


@op("shape")
def shape(x: Array) -> Array:
    return np.array(x.shape, np.int32)


@op("concat")
def concat(values: Sequence[Array], axis: Array, interleave: Any = False) -> Array:
    if interleave:
        stacked = np.stack(values, axis=int(axis) % values[0].ndim + 1)
        sizes = list(values[0].shape)
        sizes[int(axis)] *= len(values)
        return stacked.reshape(sizes)
    return np.concatenate(values, axis=int(axis))


@op("stack")
def stack(values: Sequence[Array], axis: Array) -> Array:
    return np.stack(values, axis=int(axis))


@op("split")
def split(
    x: Array, axis: Array, num_splits: Array | None = None, split_sizes: Array | None = None
) -> tuple[Array, ...]:
    if split_sizes is None:
        if num_splits is None:
            raise ValueError("neither a number of parts nor their sizes are given")
        return tuple(np.split(x, int(num_splits), axis=int(axis)))
    return tuple(np.split(x, np.cumsum(ints(split_sizes))[:-1], axis=int(axis)))


@op("tile")
def tile(x: Array, reps: Array) -> Array:
    return np.tile(x, ints(reps))


@op("reverse")
def reverse(x: Array, axes: Array | None = None) -> Array:
    return np.flip(x, None if axes is None else tuple(ints(axes)))


@op("pad")
def pad(x: Array, pad: Array, mode: str = "constant", constant_val: Any = 0.0) -> Array:
    """(before, after) of the last axes."""
    pairs = np.asarray(pad).reshape(-1, 2)
    widths = [(0, 0)] * (x.ndim - len(pairs)) + [(int(a), int(b)) for a, b in pairs]
    if mode == "constant":
        return np.pad(x, widths, constant_values=constant_val)
    return np.pad(x, widths, mode={"reflect": "reflect", "replicate": "edge"}[mode])  # type: ignore[call-overload]


@op("depth_to_space")
def depth_to_space(x: Array, block_size: Array) -> Array:
    n, c, h, w = x.shape
    b = int(block_size)
    return x.reshape(n, b, b, c // b**2, h, w).transpose(0, 3, 4, 1, 5, 2).reshape(n, c // b**2, h * b, w * b)


@op("space_to_depth")
def space_to_depth(x: Array, block_size: Array) -> Array:
    n, c, h, w = x.shape
    b = int(block_size)
    return x.reshape(n, c, h // b, b, w // b, b).transpose(0, 3, 5, 1, 2, 4).reshape(n, c * b**2, h // b, w // b)


@op("pixel_shuffle")
def pixel_shuffle(x: Array, upscale_factor: Array) -> Array:
    n, c, h, w = x.shape
    b = int(upscale_factor)
    return x.reshape(n, c // b**2, b, b, h, w).transpose(0, 1, 4, 2, 5, 3).reshape(n, c // b**2, h * b, w * b)


@op("upsample_nearest_neighbor")
def upsample_nearest_neighbor(x: Array, scale_factor_height: Any = 1, scale_factor_width: Any = 1) -> Array:
    factors = (float(scale_factor_height), float(scale_factor_width))
    if not all(factor.is_integer() for factor in factors):
        raise ValueError("factors that are not whole are not supported")
    return x.repeat(int(factors[0]), axis=-2).repeat(int(factors[1]), axis=-1)


# made of nothing


@op("fill")
def fill(shape: Array, value: Any = 0.0) -> Array:
    return np.full(ints(shape), value)


@op("fill_like")
def fill_like(ref_tensor: Array, value: Any = 0.0) -> Array:
    return np.full(ref_tensor.shape, value)


@op("range_1d")
def range_1d(end: Any, start: Any, step: Any) -> Array:
    return np.arange(start, end, step, dtype=np.asarray(start).dtype)


@op("one_hot")
def one_hot(
    indices: Array, one_hot_vector_size: Array, axis: Any = -1, on_value: Any = 1, off_value: Any = 0
) -> Array:  # fmt: skip
    hot = np.expand_dims(indices, -1) == np.arange(int(one_hot_vector_size))
    return np.moveaxis(np.where(hot, on_value, off_value), -1, int(axis))


@op("band_part")
def band_part(x: Array, lower: Any = -1, upper: Any = -1) -> Array:
    rows, columns = np.arange(x.shape[-2])[:, None], np.arange(x.shape[-1])[None]
    low, high = int(lower), int(upper)
    kept = ((low < 0) | (rows - columns <= low)) & ((high < 0) | (columns - rows <= high))
    return np.where(kept, x, 0)


@op("non_zero")
def non_zero(x: Array) -> Array:
    return np.argwhere(x)


# slices


def _slices(
    x: Array, begin: Array, end: Array, stride: Array | None, begin_mask: Array | None, end_mask: Array | None,
    squeeze_mask: Array | None,
) -> tuple[slice | int, ...]:  # fmt: skip
    found: list[slice | int] = []
    for i, (first, last) in enumerate(zip(ints(begin), ints(end), strict=True)):
        step = int(stride[i]) if stride is not None else 1
        if squeeze_mask is not None and squeeze_mask[i]:
            found.append(first)
            continue
        start = None if begin_mask is not None and begin_mask[i] else first
        stop = None if end_mask is not None and end_mask[i] else last
        found.append(slice(start, stop, step))
    return tuple(found)


@op("slice_by_index")
def slice_by_index(
    x: Array, begin: Array, end: Array, stride: Array | None = None, begin_mask: Array | None = None,
    end_mask: Array | None = None, squeeze_mask: Array | None = None,
) -> Array:  # fmt: skip
    return x[_slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)]


@op("slice_by_size")
def slice_by_size(x: Array, begin: Array, size: Array) -> Array:
    """A size of -1 goes to the end."""
    pairs = zip(ints(begin), ints(size), strict=True)
    return x[tuple(slice(first, None if count == -1 else first + count) for first, count in pairs)]


@op("slice_update")
def slice_update(
    x: Array, update: Array, begin: Array, end: Array, stride: Array | None = None, begin_mask: Array | None = None,
    end_mask: Array | None = None, squeeze_mask: Array | None = None,
) -> Array:  # fmt: skip
    place = _slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    if x[place].shape != update.shape:
        raise ValueError(f"the slice has the shape {x[place].shape}, what goes there {update.shape}")
    new = x.copy()
    new[place] = update
    return new


# indices


@op("gather")
def gather(
    x: Array, indices: Array, axis: Any = 0, batch_dims: Any = 0, validate_indices: Any = False
) -> Array:  # fmt: skip
    """x[..., indices, ...]; indices are not negative. The first `batch_dims` axes go together."""
    at, batch = int(axis) % x.ndim, int(batch_dims)
    _in_range(indices, x.shape[at])
    if batch == 0:
        return np.take(x, indices, axis=at)
    lead = x.shape[:batch]
    flat = x.reshape(-1, *x.shape[batch:])
    wanted = np.broadcast_to(indices, lead + indices.shape[batch:]).reshape(-1, *indices.shape[batch:])
    taken = np.stack([np.take(each, which, axis=at - batch) for each, which in zip(flat, wanted, strict=True)])
    return taken.reshape(lead + taken.shape[1:])


@op("gather_along_axis")
def gather_along_axis(x: Array, indices: Array, axis: Any = 0, validate_indices: Any = False) -> Array:
    _in_range(indices, x.shape[int(axis)])
    return np.take_along_axis(x, indices.astype(np.int64), int(axis))


@op("gather_nd")
def gather_nd(x: Array, indices: Array, batch_dims: Any = 0, validate_indices: Any = False) -> Array:
    if int(batch_dims):
        lead = x.shape[: int(batch_dims)]
        flat, wanted = x.reshape(-1, *x.shape[len(lead) :]), indices.reshape(-1, *indices.shape[len(lead) :])
        taken = np.stack([gather_nd(each, which) for each, which in zip(flat, wanted, strict=True)])
        return taken.reshape(lead + taken.shape[1:])
    for i in range(indices.shape[-1]):
        _in_range(indices[..., i], x.shape[i])
    return x[tuple(np.moveaxis(indices, -1, 0))]


_MODES: dict[str, Any] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.true_divide, "max": np.maximum, "min": np.minimum,
}  # fmt: skip


def _scattered(data: Array, place: tuple[Any, ...], updates: Array, mode: str) -> Array:
    new = data.copy()
    if mode == "update":
        new[place] = updates
    else:
        _MODES[mode].at(new, place, updates)
    return new


@op("scatter")
def scatter(
    data: Array, indices: Array, updates: Array, axis: Any = 0, mode: str = "add", validate_indices: Any = False
) -> Array:
    _in_range(indices, data.shape[int(axis)])
    place = (slice(None),) * (int(axis) % data.ndim) + (indices,)
    return _scattered(data, place, updates, mode)


@op("scatter_along_axis")
def scatter_along_axis(
    data: Array, indices: Array, updates: Array, axis: Any = 0, mode: str = "add", validate_indices: Any = False
) -> Array:
    _in_range(indices, data.shape[int(axis)])
    place: list[Array] = list(np.indices(indices.shape, sparse=True))
    place[int(axis)] = indices
    return _scattered(data, tuple(place), updates, mode)


@op("scatter_nd")
def scatter_nd(data: Array, indices: Array, updates: Array, mode: str = "add", validate_indices: Any = False) -> Array:
    for i in range(indices.shape[-1]):
        _in_range(indices[..., i], data.shape[i])
    return _scattered(data, tuple(np.moveaxis(indices, -1, 0)), updates, mode)


def _in_range(indices: Array, size: int) -> None:
    """Outside, Core ML gives anything; a program that asks for it is wrong."""
    if indices.size and (indices.min() < 0 or indices.max() >= size):
        raise ValueError(f"an index from {indices.min()} to {indices.max()} is outside an axis of {size}")
