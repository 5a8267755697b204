"""The weight file: what is written through a layout is what `read_rows` gives back, in every format."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeexport import errors
from edgeexport.backends import storage
from edgeexport.backends.storage import ALIGNMENT, Layout, read_rows, write
from edgeexport.core import Array, Codes, Format, no_progress
from edgeexport.quant import FORMATS

FLOATS = [fmt for fmt in FORMATS.values() if not fmt.integer]


class Arrays:
    """A `WeightSource` of random values, and what they mean as float32."""

    def __init__(self, shapes: dict[str, tuple[tuple[int, ...], Format]], seed: int = 0) -> None:
        self.meaning: dict[str, Array] = {}
        self._values: dict[str, Array] = {}
        self._scales: dict[str, Array] = {}
        self._offsets: dict[str, Array] = {}
        rng = np.random.default_rng(seed)
        for name, (shape, fmt) in shapes.items():
            if not fmt.integer:
                self._values[name] = rng.standard_normal(shape).astype(np.float32 if fmt.bits == 32 else np.float16)
                self.meaning[name] = self._values[name].astype(np.float32)
                continue
            rows, width = shape
            top = 2 ** (fmt.bits - 1) - 1
            values = rng.integers(-top, top + 1, shape).astype(np.int8)
            scales = rng.uniform(0.001, 3, (rows, width // (fmt.block or width))).astype(np.float16)
            self._values[name], self._scales[name] = values, scales
            self.meaning[name] = values * np.repeat(scales.astype(np.float32), fmt.block or width, axis=1)
            if fmt.shift:
                self._offsets[name], moved = self.shift(fmt, scales, rng)
                self.meaning[name] = self.meaning[name] + np.repeat(moved, fmt.block, axis=1)

    @staticmethod
    def shift(fmt: Format, scales: Array, rng: np.random.Generator) -> tuple[Array, Array]:
        """Offsets as a source gives them, and what is added to a block."""
        wide = scales.astype(np.float32)
        zeros = rng.integers(-8, 8, scales.shape).astype(np.int8)
        if fmt.shift == "zero":
            return zeros, -zeros.astype(np.float32) * wide
        if fmt.shift == "zero16":  # whole zero points, which float16 holds
            return -zeros.astype(np.float32) * wide, -zeros.astype(np.float32) * wide
        if fmt.shift == "half":
            offsets = rng.standard_normal(scales.shape).astype(np.float16).astype(np.float32)
            return offsets, offsets
        shared = rng.uniform(0.01, 1, (len(scales), 1)).astype(np.float16).astype(np.float32)
        integers = rng.integers(-127, 128, scales.shape).astype(np.float32)
        integers[:, 0] = 127  # the largest, by which the row's scale is found again
        return integers * shared, integers * shared

    def float_rows(self, name: str, start: int, stop: int) -> Array:
        rows: Array = (
            self._values[name].reshape(-1)[start:stop]
            if self._values[name].ndim < 2
            else (self._values[name][start:stop])
        )
        return rows

    def quantized_rows(self, name: str, start: int, stop: int) -> Codes:
        offsets = self._offsets.get(name)
        part = offsets[start:stop] if offsets is not None else None
        return Codes(self._values[name][start:stop], self._scales[name][start:stop], part)


@st.composite
def runs(draw: st.DrawFn) -> list[tuple[Format, list[tuple[int, ...]]]]:
    """Runs of matrices of one width and format, as a layout takes them, and vectors between."""
    found: list[tuple[Format, list[tuple[int, ...]]]] = []
    for fmt in draw(st.lists(st.sampled_from(list(FORMATS.values())), min_size=1, max_size=4)):
        width = draw(st.integers(1, 3)) * fmt.block if fmt.block else draw(st.integers(1, 40))
        width += width % 2 if fmt.bits == 4 else 0  # two of them share a byte
        heights = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
        found.append((fmt, [(rows, width) for rows in heights]))
    vectors = draw(st.lists(st.tuples(st.sampled_from(FLOATS), st.integers(1, 50)), max_size=2))
    return found + [(fmt, [(size,)]) for fmt, size in vectors]


@settings(max_examples=60, deadline=None)
@given(runs(), st.integers(8, 200))
def test_every_layout_reads_back_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, parts: list[tuple[Format, list[tuple[int, ...]]]], block: int
) -> None:
    folder = tmp_path_factory.mktemp("layout")
    layout = Layout("w.data")
    shapes: dict[str, tuple[tuple[int, ...], Format]] = {}
    for fmt, run in parts:
        names = [f"w{len(shapes) + k}" for k in range(len(run))]
        layout.add(names, run, fmt)
        shapes |= {name: (shape, fmt) for name, shape in zip(names, run, strict=True)}
    table = np.arange(5, dtype=np.float32)
    at = layout.add_constant("table", table)
    source = Arrays(shapes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "BLOCK_ELEMENTS", block)  # so that matrices this small pass in several blocks
        write(folder, layout, source, no_progress)

    data = (folder / "w.data").read_bytes()
    assert len(data) == layout.size
    assert data[at : at + table.nbytes] == table.tobytes()
    for name, (shape, _) in shapes.items():
        rows = shape[0]  # of a vector: elements
        expected = source.meaning[name].reshape(rows, -1)
        np.testing.assert_array_equal(read_rows(folder, layout.weights[name], 0, rows), expected)
        np.testing.assert_array_equal(read_rows(folder, layout.weights[name], rows // 2, rows), expected[rows // 2 :])


def test_runs_start_at_cache_lines_and_their_weights_follow_each_other() -> None:
    layout = Layout("w.data")
    layout.add(["norm"], [(3,)], FORMATS["fp32"])
    data, scales = layout.add(["q", "k"], [(4, 64), (2, 64)], FORMATS["int4-b32"])
    assert data % ALIGNMENT == scales % ALIGNMENT == 0
    q, k = layout.weights["q"], layout.weights["k"]
    assert (q.offset, k.offset) == (data, data + 4 * 32)
    assert (q.scales_offset, k.scales_offset) == (scales, scales + 4 * 2 * 2)
    assert layout.weights["norm"].scales_offset == -1
    assert layout.size == scales + 6 * 2 * 2


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
def test_a_matrix_takes_the_bytes_that_its_format_says(fmt: Format) -> None:
    layout = Layout("w.data")
    layout.add(["w"], [(64, 256)], fmt)
    assert layout.size == fmt.nbytes((64, 256))


def test_a_scalar_is_a_weight_too(tmp_path: Path) -> None:
    layout = Layout("w.data")
    layout.add(["w"], [()], FORMATS["fp32"])
    source = Arrays({"w": ((), FORMATS["fp32"])})
    write(tmp_path, layout, source, no_progress)
    assert read_rows(tmp_path, layout.weights["w"], 0, 1) == source.meaning["w"]


def test_progress_ends_with_all_elements(tmp_path: Path) -> None:
    shapes = {"a": ((5, 64), FORMATS["int4-b32"]), "b": ((7,), FORMATS["fp32"])}
    layout = Layout("w.data")
    for name, (shape, fmt) in shapes.items():
        layout.add([name], [shape], fmt)
    seen: list[tuple[int, int]] = []
    write(tmp_path, layout, Arrays(shapes), lambda done, total: seen.append((done, total)))
    assert seen[-1] == (5 * 64 + 7, 5 * 64 + 7)
    assert seen == sorted(seen)


@pytest.mark.parametrize("name", ["fp16", "int8-channel", "int4-b32"])
def test_a_file_that_ends_early_is_an_error(name: str, tmp_path: Path) -> None:
    shapes = {"w": ((4, 64), FORMATS[name])}
    layout = Layout("w.data")
    layout.add(["w"], [(4, 64)], FORMATS[name])
    write(tmp_path, layout, Arrays(shapes), no_progress)
    os.truncate(tmp_path / "w.data", layout.size - 1)
    with pytest.raises(errors.BundleError) as caught:
        read_rows(tmp_path, layout.weights["w"], 0, 4)
    assert caught.value.findings[0].code == "artifact-truncated"
    read_rows(tmp_path, layout.weights["w"], 0, 3)  # what is there can be read


def test_a_full_disk_shows_before_anything_is_quantised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    layout = Layout("w.data")
    layout.add(["w"], [(4, 64)], FORMATS["fp32"])
    seen: list[int] = []
    with pytest.raises(errors.UsageError, match="output-not-writable") as caught:
        write(tmp_path, layout, Arrays({"w": ((4, 64), FORMATS["fp32"])}), lambda done, _: seen.append(done))
    assert "No space left" in caught.value.findings[0].why
    assert not seen


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(errors.UsageError, match="output-not-writable"):
        write(tmp_path / "gone", Layout("w.data"), Arrays({}), no_progress)


def test_a_weight_that_cannot_be_stored_stops_the_writing(tmp_path: Path) -> None:
    class Bad(Arrays):
        def float_rows(self, name: str, start: int, stop: int) -> Array:
            raise errors.nonfinite_weight(name, (start, 0), float("nan"))

    layout = Layout("w.data")
    layout.add(["w"], [(4, 64)], FORMATS["fp32"])
    with pytest.raises(errors.CheckpointError, match="nonfinite-weight"):
        write(tmp_path, layout, Bad({}), no_progress)
