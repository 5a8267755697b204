"""Palettes: near the least error there is, by scikit-learn's k-means where it is installed; and back from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgeexport import errors
from edgeexport.backends import storage
from edgeexport.core import PALETTE, Array, Codes, no_progress
from edgeexport.quant import plan
from edgeexport.quant.palettes import BINS, depalettize, palettize
from edgeexport.quant.schemes import PALETTE4
from edgeexport.quant.weights import dequantize_rows, quantize_rows


def weights(rows: int = 64, width: int = 96, seed: int = 0) -> Array:
    """Normal numbers, rows of different sizes, a few far out."""
    rng = np.random.default_rng(seed)
    made = rng.standard_normal((rows, width), np.float32) * rng.uniform(0.01, 2, (rows, 1)).astype(np.float32)
    made[rng.integers(rows, size=3), rng.integers(width, size=3)] *= 6
    return made


def parts(numbers: Array) -> tuple[Array, Array]:
    """Scales [R, 1] and palettes [R / 16, 16]."""
    return numbers[:, :1].astype(np.float32), numbers[:, 1].astype(np.float32).reshape(-1, PALETTE)


def test_each_weight_takes_the_nearest_number() -> None:
    rows = weights()
    values, numbers = palettize(rows)
    scales, palettes = parts(numbers)
    np.testing.assert_array_equal(scales[:, 0], np.abs(rows).max(axis=1).astype(np.float16))
    for group, palette in enumerate(palettes):
        own = slice(group * PALETTE, (group + 1) * PALETTE)
        distance = np.abs(rows[own, :, None] / scales[own, :, None] - palette)
        taken = np.take_along_axis(distance, values[own, :, None].astype(int) + 8, axis=2)[..., 0]
        np.testing.assert_allclose(taken, distance.min(axis=2), atol=1e-6)
        assert (np.diff(palette) >= 0).all() and 0 in palette
        assert palette[0] == pytest.approx((rows[own] / scales[own]).min(), abs=1e-3)
        assert palette[-1] == pytest.approx((rows[own] / scales[own]).max(), abs=1e-3)


def test_the_numbers_are_near_those_of_least_error() -> None:
    """k-means finds 16 free numbers; three of ours are not free, so that its 13 have at least our error's order."""
    cluster = pytest.importorskip("sklearn.cluster")
    rows = np.random.default_rng(5).standard_normal((16, 256), np.float32)
    values, numbers = palettize(rows)
    scaled = (rows / parts(numbers)[0]).reshape(-1, 1)
    ours = float((((depalettize(values, numbers) - rows) / parts(numbers)[0]) ** 2).sum())
    few, many = (float(cluster.KMeans(count, n_init=4, random_state=0).fit(scaled).inertia_) for count in (13, PALETTE))
    assert many * 0.999 < ours < few * 1.05


def test_a_single_weight_far_from_all_others_keeps_its_number() -> None:
    rows = np.full((16, 24), -8670, np.float32)
    rows[0, 0] = 8677  # as a share of its row nearer to 0 than the others are
    np.testing.assert_allclose(depalettize(*palettize(rows)), rows, rtol=2e-3)


@settings(max_examples=60, deadline=None)
@given(arrays(np.float32, (32, 24), elements=st.floats(-60000, 60000, width=32)))
def test_no_weight_is_further_off_than_the_palette_is_wide(rows: Array) -> None:
    values, numbers = palettize(rows)
    back = depalettize(values, numbers)
    scales, palettes = parts(numbers)
    gaps = np.repeat(np.diff(palettes, axis=1).max(axis=1), PALETTE)[:, None]
    slack = 2 / BINS + 2e-3  # of a bin, and of float16
    assert (np.abs(back - rows) <= scales * (gaps / 2 + slack) + 1e-7).all()
    assert (back[scales[:, 0] == 0] == 0).all()


def test_rows_do_not_depend_on_how_they_are_cut() -> None:
    rows = weights()
    values, numbers = palettize(rows)
    again, same = palettize(rows[16:48])
    np.testing.assert_array_equal(again, values[16:48])
    np.testing.assert_array_equal(same, numbers[16:48])


def test_numbers_that_cannot_be_stored_are_named() -> None:
    rows = weights()
    rows[20, 3] = np.nan
    with pytest.raises(errors.CheckpointError, match="nonfinite-weight") as caught:
        quantize_rows(rows, PALETTE4, name="w", first_row=100)
    assert "120" in str(caught.value.findings[0])
    rows[20, 3] = 70000
    with pytest.raises(errors.CheckpointError, match="weight-too-large"):
        quantize_rows(rows, PALETTE4, name="w")


def test_a_file_gives_back_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = weights(80, 48)
    monkeypatch.setattr(storage, "BLOCK_ELEMENTS", 48 * 20)  # 20 rows are no whole groups

    class Source:
        def float_rows(self, name: str, start: int, stop: int) -> Any:
            raise AssertionError("no tensor is float")

        def quantized_rows(self, name: str, start: int, stop: int) -> Any:
            assert start % PALETTE == stop % PALETTE == 0
            return Codes(*quantize_rows(rows[start:stop], PALETTE4))

    layout = storage.Layout("weights.bin", signed=True)
    layout.add(["w"], [rows.shape], PALETTE4)
    assert PALETTE4.nbytes(rows.shape) == 80 * 24 + 80 * 4 <= layout.size
    storage.write(tmp_path, layout, Source(), no_progress)
    wanted = dequantize_rows(*quantize_rows(rows, PALETTE4), PALETTE4)
    for start, stop in ((0, 80), (5, 6), (15, 40), (79, 80)):
        got = storage.read_rows(tmp_path, layout.weights["w"], start, stop)
        np.testing.assert_array_equal(got, wanted[start:stop])


def test_rows_that_make_no_whole_groups_take_a_scale_each() -> None:
    shapes = {"a": (64, 48), "b": (40, 48), "c": (64,)}
    made = plan(shapes, {"a": "linear", "b": "linear", "c": "other"}, "palette4")
    assert {name: fmt.name for name, fmt in made.formats.items()} == {
        "a": "palette4", "b": "int8-channel", "c": "fp32",
    }  # fmt: skip
