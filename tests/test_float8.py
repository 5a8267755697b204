"""Float8: the nearest e4m3 to each weight by torch's own cast; and back from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgeexport import errors
from edgeexport.backends import storage
from edgeexport.core import Array, Codes, no_progress
from edgeexport.quant import plan
from edgeexport.quant.schemes import FLOAT8_CHANNEL
from edgeexport.quant.weights import CHUNK, dequantize_rows, quantize_rows


def by_torch(rows: Array) -> Array:
    """What float32 rows [R, K] are in float8 with a float16 scale each, as float32."""
    given = torch.from_numpy(rows)
    scales = (given.abs().amax(1, keepdim=True) / 448).half().float()
    inverse = torch.where(scales == 0, 0, 1 / scales)
    return ((given * inverse).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scales).numpy()


@settings(max_examples=60, deadline=None)
@given(arrays(np.float32, (3, 16), elements=st.floats(-60000, 60000, width=32)))
def test_each_weight_becomes_the_nearest_float8(rows: Array) -> None:
    values, scales = quantize_rows(rows, FLOAT8_CHANNEL)
    assert (values.shape, scales.shape) == ((3, 16), (3, 1))
    np.testing.assert_array_equal(dequantize_rows(values, scales, FLOAT8_CHANNEL), by_torch(rows))


def test_rows_of_all_sizes_keep_three_bits_of_each_weight() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((1600, 768), np.float32) * rng.uniform(1e-3, 9, (1600, 1)).astype(np.float32)
    assert rows.size > 2 * CHUNK
    back = dequantize_rows(*quantize_rows(rows, FLOAT8_CHANNEL), FLOAT8_CHANNEL)
    np.testing.assert_array_equal(back, by_torch(rows))
    large = np.abs(rows) > np.abs(rows).max(1, keepdims=True) / 1e4  # of a normal float8: four digits, one implied
    assert (np.abs(back - rows)[large] <= np.abs(rows)[large] / 16 * 1.001).all()


def test_numbers_that_cannot_be_stored_are_named() -> None:
    rows = np.ones((30, 16), np.float32)
    rows[20, 3] = np.nan
    with pytest.raises(errors.CheckpointError, match="nonfinite-weight") as caught:
        quantize_rows(rows, FLOAT8_CHANNEL, name="w", first_row=100)
    assert caught.value.findings[0].where == "w[120, 3]"
    rows[20, 3] = 65504 * 450
    with pytest.raises(errors.CheckpointError, match="weight-too-large"):
        quantize_rows(rows, FLOAT8_CHANNEL, name="w")


@pytest.mark.parametrize("signed", [False, True])
def test_a_file_gives_back_what_was_written(signed: bool, tmp_path: Path) -> None:
    rows = np.random.default_rng(1).standard_normal((20, 48), np.float32)

    class Source:
        def float_rows(self, name: str, start: int, stop: int) -> Any:
            raise AssertionError("no tensor is float")

        def quantized_rows(self, name: str, start: int, stop: int) -> Any:
            return Codes(*quantize_rows(rows[start:stop], FLOAT8_CHANNEL))

    layout = storage.Layout("weights.bin", signed=signed)
    layout.add(["w"], [rows.shape], FLOAT8_CHANNEL)
    storage.write(tmp_path, layout, Source(), no_progress)
    held = np.fromfile(tmp_path / "weights.bin", np.uint8, rows.size).reshape(rows.shape)
    scales = (np.abs(rows).max(1, keepdims=True) / 448).astype(np.float16).astype(np.float32)
    meant = torch.from_numpy(held).view(torch.float8_e4m3fn).float().numpy() * scales
    np.testing.assert_array_equal(meant, by_torch(rows))
    for start, stop in ((0, 20), (5, 6), (19, 20)):
        got = storage.read_rows(tmp_path, layout.weights["w"], start, stop)
        np.testing.assert_array_equal(got, meant[start:stop])


def test_what_is_read_by_row_stays_in_int8_and_odd_widths_in_float16() -> None:
    shapes = {"a": (64, 48), "b": (64, 50), "c": (64, 48), "d": (64, 48), "e": (64,)}
    kinds: Any = {"a": "linear", "b": "linear", "c": "embedding", "d": "encoder", "e": "other"}
    made = plan(shapes, kinds, "fp8")
    assert {name: fmt.name for name, fmt in made.formats.items()} == {
        "a": "float8-channel", "b": "fp16", "c": "int8-channel", "d": "int8-channel", "e": "fp32",
    }  # fmt: skip
    assert made.ideal_bytes(shapes) == 3 * 64 * (48 + 2) + 64 * 50 * 2 + 64 * 4
