"""A checkpoint's own integers carried over: what they mean is what the gguf package decodes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from edgeexport import errors, quant
from edgeexport.checkpoint import WeightReader
from edgeexport.core import Array, RopeUnpermute, TensorRef, Traits
from edgeexport.quant import FORMATS, SCHEMES
from edgeexport.quant.repack import ENCODINGS, carried_rows, to_codes
from edgeexport.quant.weights import dequantize_codes

HALVES = {"Q4_0": [0], "Q4_1": [0, 2], "Q4_K": [0, 2], "Q5_0": [0], "Q6_K": [208], "Q8_0": [0]}
"""Where a block's float16 numbers are, by ggml-common.h."""

TAKING = {
    "everything": Traits(shifts=("half", "zero"), int8_blocks=True),
    "int8 offsets": Traits(shifts=("int8",), int8_blocks=True),
    "zero points in float16": Traits(shifts=("zero16", "zero"), int8_blocks=True),
    "int8 offsets, positive scales": Traits(shifts=("int8",), positive_scales=True),
    "nothing but scales": Traits(),
}


def blocks(encoding: str, rows: int = 12, width: int = 512, seed: int = 0) -> Array:
    """Random blocks of an encoding, uint8 [rows, bytes], their float16 numbers small and of either sign."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[encoding]]
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows, width // block, size), dtype=np.uint8)
    for at in HALVES[encoding]:
        raw[..., at : at + 2] = (0.1 * rng.standard_normal(raw.shape[:2])).astype("<f2")[..., None].view(np.uint8)
    if encoding == "Q8_0":
        raw[..., 2:][raw[..., 2:] == 128] = 129  # ggml writes no -128
    return raw.reshape(rows, -1)


def test_there_are_cases_for_all_encodings() -> None:
    assert HALVES.keys() == ENCODINGS.keys()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_lattice_is_what_ggml_decodes(encoding: str) -> None:
    raw = blocks(encoding)
    lattice = ENCODINGS[encoding].unpack(raw)
    got = lattice.integers.reshape(*lattice.scales.shape, -1) * lattice.scales[..., None]
    if lattice.offsets is not None:
        got = got + lattice.offsets[..., None]
    wanted = dequantize(raw, GGMLQuantizationType[encoding])
    np.testing.assert_allclose(got.reshape(wanted.shape), wanted, rtol=1e-6, atol=1e-6 * np.abs(wanted).max())
    assert (lattice.offsets is not None) == ENCODINGS[encoding].shifted
    assert np.abs(lattice.integers).max() <= 2 ** (ENCODINGS[encoding].bits - 1)


@pytest.mark.parametrize("taking", TAKING)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_a_plan_carries_is_stored_as_it_was(encoding: str, taking: str) -> None:
    traits = TAKING[taking]
    plan = quant.plan({"w": (12, 512)}, {"w": "linear"}, "int4-b32", traits, {"w": encoding})
    holds = {"Q4_0": bool(traits.shifts) or not traits.positive_scales, "Q8_0": False, "Q5_0": traits.int8_blocks}
    holds |= {"Q6_K": traits.int8_blocks, "Q4_1": bool(traits.shifts), "Q4_K": bool(traits.shifts)}
    assert ("w" in plan.carried) == holds[encoding]
    if "w" not in plan.carried:
        return
    raw, fmt = blocks(encoding), plan.formats["w"]
    wanted = dequantize(raw, GGMLQuantizationType[encoding])
    codes = to_codes(ENCODINGS[encoding].unpack(raw), fmt)
    if fmt.positive:
        assert codes.scales.min() > 0
    step = np.abs(np.repeat(codes.scales.astype(np.float32), fmt.block, axis=1))
    got = dequantize_codes(codes, fmt)
    off = np.abs(got - wanted)
    if not ENCODINGS[encoding].shifted and encoding != "Q6_K" and not fmt.shift:
        assert off.max() == 0
    assert off.max() <= np.abs(wanted).max() * (1 / 127 if fmt.shift == "int8" else 1 / 1024)
    # an offset of int8 is half of 1/127 of the row's largest off: far less than what rounding to 4 bits would be
    assert np.sqrt((off**2).mean()) < 0.1 * np.sqrt((step**2).mean())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_that_asks_for_fewer_bits_or_other_blocks_carries_nothing(scheme: str) -> None:
    plan = quant.plan({"w": (12, 512)}, {"w": "linear"}, scheme, TAKING["everything"], {"w": "Q8_0"})
    assert ("w" in plan.carried) == (scheme == "int8")
    plan = quant.plan({"w": (12, 512)}, {"w": "linear"}, scheme, TAKING["everything"], {"w": "Q4_1"})
    assert ("w" in plan.carried) == (SCHEMES[scheme].linear == FORMATS["int4-b32"])


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_rows_come_in_the_order_of_the_transform(encoding: str, tmp_path: Path) -> None:
    raw = blocks(encoding, rows=16)
    (tmp_path / "w.bin").write_bytes(b"head" + raw.tobytes())
    plain = TensorRef("w", tmp_path / "w.bin", 4, raw.nbytes, encoding, (16, 512))
    turned = replace(plain, transform=RopeUnpermute(2))
    width = ENCODINGS[encoding]
    shift = "half" if width.shifted else ""
    fmt = replace(FORMATS[f"int{width.bits}-b{width.block}"], shift=shift)
    with WeightReader() as reader:
        wanted = reader.rows(turned, 0, 16)
        for start, stop in ((0, 16), (3, 9), (15, 16)):
            got = dequantize_codes(carried_rows(reader, turned, fmt, start, stop), fmt)
            np.testing.assert_allclose(got, wanted[start:stop], atol=2e-3 * np.abs(wanted).max())
        assert not np.array_equal(reader.rows(plain, 0, 16), wanted)


@pytest.mark.parametrize(("number", "code"), [(np.nan, "nonfinite-weight"), (np.inf, "nonfinite-weight")])
def test_a_damaged_scale_is_an_error(number: float, code: str) -> None:
    raw = blocks("Q4_1")
    raw[5, 20:22] = np.array([number], "<f2").view(np.uint8)
    with pytest.raises(errors.CheckpointError, match=code), np.errstate(all="ignore"):
        to_codes(ENCODINGS["Q4_1"].unpack(raw), FORMATS["int4-b32-o16"], name="w")


@pytest.mark.parametrize("scale", [0.0, 6e-8, 1e-7])
def test_a_block_of_nearly_one_number(scale: float) -> None:
    raw = blocks("Q4_1")
    raw[:, :2] = np.array([scale], "<f2").view(np.uint8)
    lattice = ENCODINGS["Q4_1"].unpack(raw)
    wanted = dequantize(raw, GGMLQuantizationType["Q4_1"])
    for name in ("int4-b32-o16", "int4-b32-zp16"):
        fmt = replace(FORMATS[name], positive=True)
        codes = to_codes(lattice, fmt)
        assert codes.scales.min() > 0
        np.testing.assert_allclose(dequantize_codes(codes, fmt), wanted, atol=1e-3 * np.abs(wanted).max())
