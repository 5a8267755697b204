"""Weights read by rows equal what torch and the gguf package make of the same bytes."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import permute
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeexport.checkpoint.gguf import SUPPORTED
from edgeexport.checkpoint.weights import PLAIN, WeightReader
from edgeexport.core import RopeUnpermute, TensorRef
from edgeexport.errors import CheckpointError

TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
OFFSET = 5  # odd on purpose: nothing aligns a safetensors file's data


def stored(folder: Path, data: bytes, encoding: str, shape: tuple[int, ...], heads: int | None = None) -> TensorRef:
    """A file with these bytes at OFFSET, and the reference to them."""
    path = folder / "data"
    path.write_bytes(b"\xff" * OFFSET + data + b"\xff" * 7)
    transform = RopeUnpermute(heads) if heads else None
    return TensorRef("w", path, OFFSET, len(data), encoding, shape, transform)


@pytest.mark.parametrize("encoding", sorted(PLAIN))
@pytest.mark.parametrize("shape", [(7, 5), (9,), (), (4, 3, 2), (0, 5), (3, 0), (700, 400)])
def test_plain_encodings_equal_torch(tmp_path: Path, encoding: str, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(TORCH[encoding])
    flat = tensor.reshape(-1)
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    ref = stored(tmp_path, data, encoding, shape)
    with WeightReader() as reader:
        got = reader.read(ref)
        assert got.dtype == np.float32 and got.shape == shape
        np.testing.assert_array_equal(got, tensor.float().numpy())
        if len(shape) > 0 and shape[0] > 3:
            np.testing.assert_array_equal(reader.rows(ref, 1, 3), tensor[1:3].float().numpy())
            raw = reader.raw(ref, 1, 3)
            assert raw.tobytes() == tensor[1:3].contiguous().view(torch.uint8).numpy().tobytes()
            assert raw.shape == (2, *shape[1:])
            assert reader.rows(ref, 2, 2).shape == (0, *shape[1:])


def test_bfloat16_keeps_infinities_and_nan(tmp_path: Path) -> None:
    ref = stored(tmp_path, np.array([0x7F80, 0xFF80, 0x7FC0, 0x8000], "<u2").tobytes(), "BF16", (4,))
    with WeightReader() as reader:
        got = reader.read(ref)
    assert got[0] == np.inf and got[1] == -np.inf and np.isnan(got[2])
    assert got[3] == 0 and np.signbit(got[3])


@pytest.mark.parametrize("encoding", sorted(SUPPORTED - PLAIN.keys()))
def test_block_encodings_equal_the_gguf_package(tmp_path: Path, encoding: str) -> None:
    kind = GGMLQuantizationType[encoding]
    block, block_bytes = GGML_QUANT_SIZES[kind]
    width, count = 2 * block, 300
    # Random bytes are all codes and all scales, NaN among them.
    data = np.random.default_rng(0).integers(0, 256, (count, 2 * block_bytes), np.uint8)
    with np.errstate(all="ignore"):
        expected = dequantize(data, kind).reshape(count, width)
    ref = stored(tmp_path, data.tobytes(), encoding, (count, width))
    vector = stored(tmp_path, data.tobytes(), encoding, (count * width,))
    with WeightReader() as reader:
        np.testing.assert_array_equal(reader.read(ref), expected)
        np.testing.assert_array_equal(reader.rows(ref, 17, 219), expected[17:219])
        np.testing.assert_array_equal(reader.rows(vector, 5, 40 * width + 3), expected.reshape(-1)[5 : 40 * width + 3])


@pytest.mark.parametrize("encoding", ["F32", "BF16", "Q8_0"])
@settings(max_examples=40, deadline=None)
@given(bounds=st.tuples(st.integers(0, 48), st.integers(0, 48)))
def test_any_rows_of_a_permuted_tensor(
    tmp_path_factory: pytest.TempPathFactory, encoding: str, bounds: tuple[int, int]
) -> None:
    heads, width = 3, 32
    start, stop = sorted(bounds)
    original = np.random.default_rng(2).standard_normal((48, width)).astype(np.float32)
    if encoding == "Q8_0":
        kind = GGMLQuantizationType.Q8_0
        from gguf.quants import quantize

        data = quantize(permute(original, heads), kind)
        expected = dequantize(quantize(original, kind), kind).reshape(48, width)
    else:
        tensor = torch.from_numpy(permute(original, heads).copy()).to(TORCH[encoding])
        data = tensor.view(torch.uint8).numpy()
        expected = torch.from_numpy(original).to(TORCH[encoding]).float().numpy()
    ref = stored(tmp_path_factory.mktemp("permuted"), data.tobytes(), encoding, (48, width), heads)
    with WeightReader() as reader:
        np.testing.assert_array_equal(reader.rows(ref, start, stop), expected[start:stop])
        if encoding == "F32":
            np.testing.assert_array_equal(reader.raw(ref, start, stop), expected[start:stop])


def test_a_permuted_bias(tmp_path: Path) -> None:
    original = np.arange(24, dtype=np.float32)
    ref = stored(tmp_path, permute(original, 3).tobytes(), "F32", (24,), heads=3)
    with WeightReader() as reader:
        np.testing.assert_array_equal(reader.read(ref), original)


def test_misuse_is_refused(tmp_path: Path) -> None:
    ref = stored(tmp_path, bytes(48), "F32", (3, 4))
    with WeightReader() as reader:
        for start, stop in ((-1, 2), (2, 1), (0, 4)):
            with pytest.raises(ValueError, match="rows"):
                reader.rows(ref, start, stop)
        with pytest.raises(ValueError, match="contiguous"):
            reader.float32_into(ref, 0, 3, np.empty((4, 3), np.float32).T)
    with pytest.raises(ValueError, match="closed"):
        reader.rows(ref, 0, 1)


@pytest.mark.parametrize("encoding", ["F32", "BF16", "Q8_0"])
def test_a_file_cut_short_after_opening(tmp_path: Path, encoding: str) -> None:
    ref = stored(tmp_path, bytes(4 * 64 * 4), encoding, (4, 64))
    os.truncate(ref.file, OFFSET + 100)
    with WeightReader() as reader, pytest.raises(CheckpointError) as caught:
        reader.read(ref)
    assert caught.value.findings[0].code == "weights-truncated"


def test_a_file_that_went_away(tmp_path: Path) -> None:
    ref = stored(tmp_path, bytes(16), "F32", (4,))
    ref.file.unlink()
    with WeightReader() as reader, pytest.raises(CheckpointError) as caught:
        reader.read(ref)
    assert caught.value.findings[0].code == "file-unreadable"


@pytest.mark.parametrize("encoding", ["I64", "F8_E4M3", "Q9_9", "IQ2_XXS"])
def test_integers_and_unknown_encodings_are_no_weights(tmp_path: Path, encoding: str) -> None:
    ref = stored(tmp_path, bytes(32), encoding, (4,))
    with WeightReader() as reader, pytest.raises(CheckpointError) as caught:
        reader.read(ref)
    assert caught.value.findings[0].code == "unsupported-encoding"


def test_threads_share_a_reader(tmp_path: Path) -> None:
    data = np.arange(64 * 1000, dtype=np.float32).reshape(64, 1000)
    ref = stored(tmp_path, data.tobytes(), "F32", (64, 1000))
    wrong: list[int] = []

    def work(reader: WeightReader, first: int) -> None:
        for row in range(first, 64, 4):
            if not np.array_equal(reader.rows(ref, row, row + 1)[0], data[row]):
                wrong.append(row)

    before = len(list(Path("/proc/self/fd").iterdir()))
    with WeightReader() as reader:
        threads = [threading.Thread(target=work, args=(reader, first)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert len(list(Path("/proc/self/fd").iterdir())) == before
