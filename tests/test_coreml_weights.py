"""Large constants of ML programs, read some rows at a time: the same numbers as all at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edgeexport.backends.coreml_interpreter import Weight
from edgeexport.backends.coreml_interpreter_nn import OPS, conv, is_product
from edgeexport.backends.coreml_mil import BY_NAME, Type
from edgeexport.core import Array

RNG = np.random.default_rng(7)
PALETTE = RNG.standard_normal((4, 1, 16, 1)).astype(np.float32)
PLACES = RNG.integers(0, 16, (64, 24)).astype(np.uint8)
SCALES = RNG.uniform(1, 2, (64, 1)).astype(np.float32)


def weight(kind: str, **inputs: Any) -> Weight:
    shape = OPS[kind](**{name: each.whole() if isinstance(each, Weight) else each for name, each in inputs.items()})
    return Weight(kind, inputs, Type(BY_NAME["float32"], shape.shape), rounded=False)


def palettes() -> Weight:
    return weight("constexpr_lut_to_dense", indices=PLACES, lut=PALETTE)


CASES: dict[str, Callable[[], Weight]] = {
    "one palette for 16 rows": palettes,
    "and a scale": lambda: weight("constexpr_blockwise_shift_scale", data=palettes(), scale=SCALES),
    "zero points": lambda: weight(
        "constexpr_blockwise_shift_scale",
        data=PLACES,
        scale=RNG.uniform(1, 2, (64, 3)).astype(np.float32),
        offset=RNG.integers(-8, 8, (64, 3)).astype(np.int8),
    ),
    "one palette": lambda: weight("constexpr_lut_to_dense", indices=PLACES, lut=PALETTE[:1]),
    "pairs of rows": lambda: weight(
        "constexpr_lut_to_dense",
        indices=PLACES,
        lut=RNG.standard_normal((2, 1, 16, 2)).astype(np.float32),
        vector_axis=np.array(0, np.int32),
    ),
    "scales of columns, as many as rows": lambda: weight(
        "constexpr_affine_dequantize",
        quantized_data=RNG.integers(-9, 9, (24, 24)).astype(np.int8),
        scale=SCALES[:24, 0],
        zero_point=np.array(0, np.int8),
        axis=np.array(1, np.int32),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_are_those_of_the_whole(name: str) -> None:
    large = CASES[name]()
    whole = large.whole()
    assert whole.std() > 0
    for start, stop in ((0, len(whole)), (0, 1), (5, 6), (15, 17), (len(whole) - 1, len(whole))):
        np.testing.assert_array_equal(large.rows(start, stop), whole[start:stop])


def test_palettes_are_what_they_say() -> None:
    wanted = np.stack([PALETTE[row // 16, 0, PLACES[row], 0] for row in range(64)])
    np.testing.assert_array_equal(palettes().whole(), wanted)


def normal(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(2, 6, 1, 5), (1, 6, 3, 4), (2, 6, 7)])
def test_a_kernel_of_one_point_is_a_product(shape: tuple[int, ...]) -> None:
    import torch

    rank = len(shape) - 2
    x, kernel, bias = normal(*shape), normal(4, 6, *[1] * rank), normal(4)
    assert is_product(kernel.shape)
    convolve = {1: torch.nn.functional.conv1d, 2: torch.nn.functional.conv2d}[rank]
    wanted = convolve(*(torch.from_numpy(each) for each in (x, kernel, bias)))
    np.testing.assert_allclose(conv(x, kernel, bias), wanted.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    "given",
    [{"strides": np.array([2, 1])}, {"groups": np.array(2)}, {"pad_type": "custom", "pad": np.array([0, 0, 1, 0])}],
    ids=["strides", "groups", "padding"],
)
def test_others_are_none(given: dict[str, Any]) -> None:
    assert not is_product((4, 6, 1, 1), **given)
    assert not is_product((4, 6, 1, 3))
