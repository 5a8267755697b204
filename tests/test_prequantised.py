"""Checkpoints that come quantised: what their rows are, what of them is carried over, and what is refused.

What the codes stand for is written in prequantised.py from the methods' descriptions, apart from the reader."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from prequantised import AWQ, HIDDEN, LAYERS, SHAPES, VARIANTS, Array, Parts, Variant, gptq, tensors_of, write

from edgeexport import backends, errors, pipeline, quant
from edgeexport.checkpoint import WeightReader, open_checkpoint, packed
from edgeexport.core import Checkpoint, QuantPlan, Verdict, worst
from edgeexport.packing import round_offsets
from edgeexport.plan import plan as plan_of
from edgeexport.quant.prequantised import carried_rows
from edgeexport.quant.smoothing import Fold, Smoothing
from edgeexport.quant.source import PlannedWeights
from edgeexport.quant.weights import dequantize_codes, stored_offsets

BACKENDS = ("onnxruntime", "litert", "mnn", "coreml", "tensorrt")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Parts]]:
    """The folder of a variant's checkpoint and what its matrices stand for, each written once."""
    home, made = tmp_path_factory.mktemp("prequantised"), {}

    def get(name: str) -> tuple[Path, Parts]:
        if name not in made:
            stored, wanted = tensors_of(VARIANTS[name])
            made[name] = write(home / f"variant{len(made)}", VARIANTS[name], stored), wanted
        return made[name]

    return get


Folders = Callable[[str], tuple[Path, Parts]]


def plan_for(checkpoint: Checkpoint, scheme: str, backend: str) -> QuantPlan:
    shapes = {name: ref.shape for name, ref in checkpoint.tensors.items()}
    encodings = {name: ref.encoding for name, ref in checkpoint.tensors.items()}
    return quant.plan_from_names(shapes, scheme, False, backends.load(backend).TRAITS, encodings)


def takes(variant: Variant, fmt_block: int, backend: str) -> bool:
    """Whether a runtime holds a variant's codes in its scheme."""
    traits = backends.load(backend).TRAITS
    if variant.scheme == "fp8":
        return "fp8" in traits.schemes
    if variant.bits == 8 and fmt_block:
        return traits.int8_blocks
    return bool(traits.shifts) if variant.zeros else True


@pytest.mark.parametrize("through", [0, packed.READ_THROUGH], ids=["line by line", "whole lines"])
@pytest.mark.parametrize("name", VARIANTS)
def test_rows_are_what_the_codes_stand_for(
    name: str, through: int, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "READ_THROUGH", through)
    monkeypatch.setattr(packed, "WINDOW", 1000)
    monkeypatch.setattr(packed, "STEP", 3000)
    folder, wanted = folders(name)
    tensors = open_checkpoint(folder).tensors
    with WeightReader() as reader:
        for tensor, matrix in wanted.items():
            assert tensors[tensor].shape == matrix.shape
            for start, stop in ((0, len(matrix)), (3, 50), (17, 18), (5, 5)):
                np.testing.assert_array_equal(reader.rows(tensors[tensor], start, stop), matrix[start:stop])


@pytest.mark.parametrize("name", VARIANTS)
def test_the_index_is_that_of_the_plain_model(name: str, folders: Folders) -> None:
    checkpoint = open_checkpoint(folders(name)[0])
    layer = {f"{module}.weight": shape for module, shape in SHAPES.items()}
    layer |= {"input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,)}
    wanted = {f"model.layers.{i}.{part}": shape for i in range(LAYERS) for part, shape in layer.items()}
    outside = {"model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"}
    assert {part: ref.shape for part, ref in checkpoint.tensors.items() if part not in outside} == wanted
    assert checkpoint.tensors.keys() == wanted.keys() | outside
    assert "quantization_config" not in checkpoint.config
    for module in VARIANTS[name].plain:
        assert checkpoint.tensors[f"model.layers.0.{module}.weight"].encoding == "F16"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_carried_means_what_it_meant(name: str, backend: str, folders: Folders) -> None:
    variant, (folder, wanted) = VARIANTS[name], folders(name)
    if variant.scheme == "fp8" and backend != "tensorrt":
        return
    checkpoint = open_checkpoint(folder)
    plan = plan_for(checkpoint, variant.scheme, backend)
    positive = backends.load(backend).TRAITS.positive_scales
    with WeightReader() as reader:
        source = PlannedWeights(reader, checkpoint.tensors, plan)
        for tensor, matrix in wanted.items():
            held = packed.held_in(checkpoint.tensors[tensor].encoding)
            grouped = held is not None and held.group != matrix.shape[1]
            assert (tensor in plan.carried) == (variant.carried and takes(variant, int(grouped), backend)), tensor
            if tensor not in plan.carried:
                continue
            fmt = plan.formats[tensor]
            assert (fmt.bits, fmt.positive) == (variant.bits, positive)
            codes = source.quantized_rows(tensor, 3, 50)
            np.testing.assert_array_equal(codes.integers, reader.packed(checkpoint.tensors[tensor], 3, 50).codes)
            got = dequantize_codes(codes, fmt)
            # scales are rounded to float16, and so are offsets where the runtime has no zero points; int8 ones to
            # 1/254 of the row's largest
            slack = 2.0**-11 * np.abs(matrix[3:50])
            if fmt.shift and fmt.shift != "zero":
                offsets = np.abs(stored_offsets(codes, fmt)).max(axis=1, keepdims=True)
                slack = slack + offsets * (2.0**-11 if fmt.shift == "half" else 1 / 250)
            assert (np.abs(got - matrix[3:50]) <= 1.001 * slack + 1e-9).all()


@pytest.mark.parametrize("backend", ["onnxruntime", "coreml"])
def test_zero_points_and_float16_scales_are_carried_exactly(backend: str, folders: Folders) -> None:
    folder, wanted = folders("awq")
    checkpoint = open_checkpoint(folder)
    plan = plan_for(checkpoint, "int4-b32", backend)
    with WeightReader() as reader:
        for tensor, matrix in wanted.items():
            assert plan.formats[tensor].name == "int4-b64-zp"
            got = PlannedWeights(reader, checkpoint.tensors, plan).stored_rows(tensor, 0, len(matrix))
            np.testing.assert_array_equal(got, matrix)


@pytest.mark.parametrize("scheme", ["int4-b32", "int4-b64", "int4-b128", "int4-b32-t4", "int4", "int8", "fp16", "fp32"])
def test_a_scheme_keeps_its_own_number_of_bits_in_whatever_blocks(scheme: str, folders: Folders) -> None:
    checkpoint = open_checkpoint(folders("gptq symmetric")[0])
    plan = plan_for(checkpoint, scheme, "onnxruntime")
    assert len(plan.carried) == (len(SHAPES) * LAYERS if scheme.startswith("int4-b") else 0)
    assert {plan.formats[name].name for name in plan.carried} <= {"int4-b32"}
    whole = open_checkpoint(folders("gptq one group")[0])
    rows = plan_for(whole, "int4", "litert")
    assert {rows.formats[name].name for name in rows.carried} == {"int4-channel"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("encoding", "block"), [("int4-g16", 16), ("int4-g48", 16), ("int4-g8", 0), ("int4-g256", 128), ("int4-g512", 128)]
)
def test_a_group_is_held_in_the_largest_blocks_that_divide_it(encoding: str, block: int, backend: str) -> None:
    encodings = {"a.up_proj.weight": encoding}
    traits = backends.load(backend).TRAITS
    plan = quant.plan_from_names({"a.up_proj.weight": (64, 1536)}, "int4-b32", False, traits, encodings)
    held = block >= traits.least_block
    assert ("a.up_proj.weight" in plan.carried) == held
    assert plan.formats["a.up_proj.weight"].block == (block if held else 32)
    assert traits.least_block == (32 if backend == "tensorrt" else 16)


def test_lm_head_is_carried_where_it_is_what_the_scheme_asks_for(tmp_path: Path) -> None:
    variant = VARIANTS["int-quantized"]
    stored, _ = tensors_of(variant)
    parts, matrix = variant.make(np.random.default_rng(5), *stored["lm_head.weight"].shape)
    del stored["lm_head.weight"]
    folder = write(tmp_path, variant, stored | {f"lm_head.{part}": array for part, array in parts.items()})
    checkpoint = open_checkpoint(folder)
    assert "lm_head.weight" in plan_for(checkpoint, "int8", "litert").carried
    plan = plan_for(checkpoint, "int4-b32", "litert")
    assert "lm_head.weight" in plan.carried, "int8 per row is what int4 schemes ask of lm_head"
    with WeightReader() as reader:
        got = PlannedWeights(reader, checkpoint.tensors, plan).stored_rows("lm_head.weight", 0, len(matrix))
    np.testing.assert_allclose(got, matrix, rtol=2.0**-11)
    assert "lm_head.weight" not in plan_for(checkpoint, "int4-b32-t4", "litert").carried


REFUSED: dict[str, tuple[Any, str, str]] = {
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "unknown-quantisation", "bitsandbytes"),
    "hqq": ({"quant_method": "hqq"}, "unknown-quantisation", "hqq"),
    "eetq": ({"quant_method": "eetq"}, "unknown-quantisation", "eetq"),
    "quanto": ({"quant_method": "quanto"}, "unknown-quantisation", "quanto"),
    "aqlm": ({"quant_method": "aqlm"}, "unknown-quantisation", "aqlm"),
    "none named": ({"bits": 4}, "unknown-quantisation", "does not name"),
    "no object": ("gptq", "unknown-quantisation", "gptq"),
    "a number": ({"quant_method": 4}, "unknown-quantisation", "does not name"),
    "gptq of 3 bits": ({"quant_method": "gptq", "bits": 3}, "quantisation-option", "bits 3"),
    "gptq of no bits": ({"quant_method": "gptq"}, "quantisation-option", "bits"),
    "gptq of true bits": ({"quant_method": "gptq", "bits": True}, "quantisation-option", "bits True"),
    "gptq of groups of 0": ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "quantisation-option", "group_size"),
    "gptq for marlin": (
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "quantisation-option", "marlin",
    ),
    "gptq by modules": (
        {"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*up_proj": {"bits": 8}}}, "quantisation-option", "dynamic",
    ),
    "awq gemv": ({**AWQ, "version": "gemv"}, "quantisation-option", "gemv"),
    "awq of 8 bits": ({**AWQ, "bits": 8}, "quantisation-option", "bits 8"),
    "awq without zero points": ({**AWQ, "zero_point": False}, "quantisation-option", "zero_point"),
    "compressed-tensors nvfp4": (
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {}},
        "quantisation-option", "nvfp4",
    ),
    "compressed-tensors of 3 bits": (
        {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 3, "type": "int"}}}},
        "quantisation-option", "3 bits",
    ),
    "compressed-tensors sparse": (
        {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
        "quantisation-option", "sparse-24",
    ),
    "compressed-tensors of unknown bits": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized"}, "quantisation-option", "config_groups",
    ),
    "fp8 of odd blocks": ({"quant_method": "fp8", "weight_block_size": [128]}, "quantisation-option", "[128]"),
}  # fmt: skip
"""Settings that are refused, the code, and what the finding names."""


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_one_finding_that_names_it(name: str, tmp_path: Path) -> None:
    given_settings, code, named = REFUSED[name]
    packed_as = "pack-quantized" if named == "config_groups" else "gptq symmetric"
    stored, _ = tensors_of(VARIANTS[packed_as])
    write(tmp_path, replace(VARIANTS[packed_as], settings=given_settings), stored)
    with pytest.raises(errors.CheckpointError) as caught:
        open_checkpoint(tmp_path)
    (finding,) = caught.value.findings
    assert finding.code == code
    assert named in finding.what


def test_packed_tensors_without_settings_are_one_finding(tmp_path: Path) -> None:
    stored, _ = tensors_of(VARIANTS["awq"])
    write(tmp_path, replace(VARIANTS["awq"], settings={}), stored)
    with pytest.raises(errors.CheckpointError, match="unknown-quantisation") as caught:
        open_checkpoint(tmp_path)
    assert len(caught.value.findings) == 1


AT = "model.layers.1.mlp.up_proj"


def _cut(part: str, axis: int) -> Callable[[Parts], None]:
    def change(stored: Parts) -> None:
        stored[f"{AT}.{part}"] = np.delete(stored[f"{AT}.{part}"], 0, axis)

    return change


def _drop(part: str) -> Callable[[Parts], None]:
    def change(stored: Parts) -> None:
        del stored[f"{AT}.{part}"]

    return change


def _as(part: str, dtype: Any) -> Callable[[Parts], None]:
    def change(stored: Parts) -> None:
        stored[f"{AT}.{part}"] = stored[f"{AT}.{part}"].astype(dtype)

    return change


def _set(part: str, value: Any) -> Callable[[Parts], None]:
    def change(stored: Parts) -> None:
        stored[f"{AT}.{part}"] = np.array(value, stored[f"{AT}.{part}"].dtype)

    return change


def _first(part: str, value: float) -> Callable[[Parts], None]:
    def change(stored: Parts) -> None:
        array = np.array(stored[f"{AT}.{part}"])
        array.flat[0] = value
        stored[f"{AT}.{part}"] = array

    return change


DAMAGED: dict[str, tuple[str, Callable[[Parts], None]]] = {
    "no scales": ("gptq symmetric", _drop("scales")),
    "no zeros": ("gptq symmetric", _drop("qzeros")),
    "a group too few": ("gptq symmetric", _cut("scales", 0)),
    "a column too few": ("gptq symmetric", _cut("scales", 1)),
    "zeros too short": ("gptq symmetric", _cut("qzeros", 1)),
    "g_idx too short": ("gptq symmetric", _cut("g_idx", 0)),
    "codes too short": ("gptq symmetric", _cut("qweight", 0)),
    "codes of floats": ("gptq symmetric", _as("qweight", np.float32)),
    "g_idx of floats": ("gptq symmetric", _as("g_idx", np.float32)),
    "scales of integers": ("gptq symmetric", _as("scales", np.int32)),
    "a group below 0": ("gptq act-order", _first("g_idx", -1)),
    "a group too high": ("gptq act-order", _first("g_idx", 4)),
    "no codes at all": ("gptq symmetric", _set("qweight", np.zeros((0, 256)))),
    "one dimension": ("gptq symmetric", _set("qweight", np.zeros(256))),
    "a plain one, too": (
        "gptq symmetric",
        lambda stored: stored.update({f"{AT}.weight": np.zeros((8, 8), np.float16)}),
    ),
    "awq without scales": ("awq", _drop("scales")),
    "awq codes too few": ("awq", _cut("qweight", 0)),
    "awq zeros too many": ("awq", _set("qzeros", np.zeros((2, 33)))),
    "no shape": ("pack-quantized", _drop("weight_shape")),
    "a wrong shape": ("pack-quantized", _set("weight_shape", [256, 64])),
    "a negative shape": ("pack-quantized", _set("weight_shape", [256, -128])),
    "a shape of nothing": ("pack-quantized", _set("weight_shape", [0, 0])),
    "a shape without end": ("pack-quantized", _set("weight_shape", [256, 2**62])),
    "no such group size": ("pack-quantized", _cut("weight_scale", 1)),
    "zero points too few": ("pack-quantized with zero points", _cut("weight_zero_point", 0)),
    "group numbers too high": ("pack-quantized act-order", _first("weight_g_idx", 99)),
    "int8 without scales": ("int-quantized", _drop("weight_scale")),
    "float8 without scales": ("fp8 blocks", _drop("weight_scale_inv")),
    "float8 of other blocks": ("fp8 blocks", _cut("weight_scale_inv", 0)),
}
"""A variant and what is done to one module's parts."""


@pytest.mark.parametrize("name", DAMAGED)
def test_parts_that_do_not_fit_are_an_error_that_names_the_matrix(name: str, tmp_path: Path) -> None:
    variant, change = DAMAGED[name]
    stored, _ = tensors_of(VARIANTS[variant])
    change(stored)
    write(tmp_path, VARIANTS[variant], stored)
    with pytest.raises(errors.CheckpointError, match="bad-quantised-weight") as caught:
        open_checkpoint(tmp_path)
    assert f"{AT}.weight" in caught.value.findings[0].what


@settings(max_examples=60)
@given(data=st.data())
def test_any_shape_dtype_and_numbers_end_in_rows_or_in_a_finding(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    name = data.draw(st.sampled_from(sorted(VARIANTS)))
    variant = VARIANTS[name]
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    parts, _ = variant.make(rng, 64, 128)
    for part in data.draw(st.lists(st.sampled_from(sorted(parts)), max_size=2, unique=True)):
        shape = tuple(data.draw(st.lists(st.sampled_from([0, 1, 2, 4, 8, 16, 64, 128]), max_size=3)))
        dtype = data.draw(st.sampled_from(["<i4", "<i8", "i1", "<f2", "<f4", "u1"]))
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        parts[part] = np.frombuffer(rng.bytes(size), dtype).reshape(shape)
    changed = dict(variant.settings)
    for key in data.draw(st.lists(st.sampled_from(sorted(changed)), max_size=1)):
        changed[key] = data.draw(st.sampled_from([None, -1, 0, 1, 2**70, "x", [], {}, [0, 0], {"a": {"weights": 1}}]))
    folder = tmp_path_factory.mktemp("fuzz")
    write(folder, replace(variant, settings=changed), {f"m.{part}": array for part, array in parts.items()})
    try:
        checkpoint = open_checkpoint(folder)
        plan = plan_for(checkpoint, variant.scheme, "onnxruntime")
        with WeightReader() as reader:
            for tensor, ref in checkpoint.tensors.items():
                rows = reader.rows(ref, 0, ref.shape[0] if ref.shape else 1)
                assert rows.dtype == np.float32
                if tensor in plan.carried:
                    carried_rows(reader, ref, plan.formats[tensor], 0, ref.shape[0])
    except errors.EdgeExportError as error:
        assert error.exit_code == 3


def test_parts_may_lie_in_several_files(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    variant = VARIANTS["gptq with zero points"]
    stored, wanted = tensors_of(variant)
    write(tmp_path, variant, stored)
    (tmp_path / "model.safetensors").unlink()
    shards = {name: f"model-{1 + name.endswith(('scales', 'g_idx'))}.safetensors" for name in stored}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    for shard in set(shards.values()):
        part = {name: np.ascontiguousarray(stored[name]) for name in stored if shards[name] == shard}
        save_file(part, tmp_path / shard)
    checkpoint = open_checkpoint(tmp_path)
    assert len(checkpoint.files) == 2
    with WeightReader() as reader:
        for name, matrix in wanted.items():
            np.testing.assert_array_equal(reader.read(checkpoint.tensors[name]), matrix)


def test_zero_points_that_a_symmetric_checkpoint_promised_not_to_have(tmp_path: Path) -> None:
    variant = VARIANTS["gptq with zero points"]
    stored, _ = tensors_of(variant)
    write(tmp_path, replace(variant, settings={**variant.settings, "sym": True}), stored)
    ref = open_checkpoint(tmp_path).tensors[f"{AT}.weight"]
    with WeightReader() as reader, pytest.raises(errors.CheckpointError, match="bad-quantised-weight") as caught:
        reader.rows(ref, 0, 8)
    assert "symmetric" in caught.value.findings[0].why


def test_the_two_formats_of_gptq_are_two_checkpoints(tmp_path: Path) -> None:
    stored, _ = tensors_of(VARIANTS["gptq with zero points"])
    first, second = (VARIANTS[name] for name in ("gptq with zero points", "gptq v2 with zero points"))
    digests = [
        open_checkpoint(write(tmp_path / str(i), each, stored)).header_digest for i, each in enumerate((first, second))
    ]
    assert digests[0] != digests[1]


@pytest.mark.parametrize(("scale", "code"), [(np.nan, "nonfinite-weight"), (np.inf, "nonfinite-weight")])
def test_a_damaged_scale_is_an_error(scale: float, code: str, tmp_path: Path) -> None:
    stored, _ = tensors_of(VARIANTS["gptq symmetric"])
    _first("scales", scale)(stored)
    checkpoint = open_checkpoint(write(tmp_path, VARIANTS["gptq symmetric"], stored))
    plan = plan_for(checkpoint, "int4-b32", "onnxruntime")
    with WeightReader() as reader, pytest.raises(errors.CheckpointError, match=code):
        PlannedWeights(reader, checkpoint.tensors, plan).quantized_rows(f"{AT}.weight", 0, 8)


def test_negative_scales_are_turned_about_where_they_can_be(tmp_path: Path) -> None:
    variant = VARIANTS["awq"]
    stored, wanted = tensors_of(variant)
    stored[f"{AT}.scales"] = -stored[f"{AT}.scales"]
    checkpoint = open_checkpoint(write(tmp_path / "awq", variant, stored))
    plan = plan_for(checkpoint, "int4-b32", "litert")  # zero points become offsets, which take either sign
    with WeightReader() as reader:
        got = PlannedWeights(reader, checkpoint.tensors, plan).stored_rows(f"{AT}.weight", 0, 256)
        np.testing.assert_allclose(got, -wanted[f"{AT}.weight"], atol=np.abs(got).max() / 100)
    stored, wanted = tensors_of(VARIANTS["gptq symmetric"])
    stored[f"{AT}.scales"] = -stored[f"{AT}.scales"]
    checkpoint = open_checkpoint(write(tmp_path / "gptq", VARIANTS["gptq symmetric"], stored))
    with WeightReader() as reader:
        plan = plan_for(checkpoint, "int4-b32", "onnxruntime")
        got = PlannedWeights(reader, checkpoint.tensors, plan).stored_rows(f"{AT}.weight", 0, 256)
        np.testing.assert_array_equal(got, -wanted[f"{AT}.weight"])
        plan = plan_for(checkpoint, "int4-b32", "litert")
        with pytest.raises(errors.CheckpointError, match="bad-quantised-weight"):
            PlannedWeights(reader, checkpoint.tensors, plan).quantized_rows(f"{AT}.weight", 0, 256)


def test_float8_that_is_not_a_number_is_an_error(tmp_path: Path) -> None:
    stored, _ = tensors_of(VARIANTS["float-quantized"])
    _first("weight", float("nan"))(stored)
    checkpoint = open_checkpoint(write(tmp_path, VARIANTS["float-quantized"], stored))
    for scheme in ("fp8", "int8"):
        plan = plan_for(checkpoint, scheme, "tensorrt")
        with WeightReader() as reader, pytest.raises(errors.CheckpointError, match="nonfinite-weight"):
            PlannedWeights(reader, checkpoint.tensors, plan).quantized_rows(f"{AT}.weight", 0, 8)


def test_float8_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    stored, _ = tensors_of(VARIANTS["fp8 blocks"])
    ref = open_checkpoint(write(tmp_path, VARIANTS["fp8 blocks"], stored)).tensors[f"{AT}.weight"]
    numbers = torch.from_numpy(stored[f"{AT}.weight"].view(np.uint8)).view(torch.float8_e4m3fn)
    scales = torch.from_numpy(stored[f"{AT}.weight_scale_inv"])
    wanted = _dequantize_fp8_weight(numbers, scales, [64, 96], torch.float32)
    with WeightReader() as reader:
        np.testing.assert_array_equal(reader.read(ref), wanted.numpy())


def test_no_more_than_the_rows_asked_for_is_in_memory(tmp_path: Path) -> None:
    rows = width = 4096
    rng = np.random.default_rng(0)
    parts: dict[str, Array] = {
        "m.qweight": rng.integers(0, 2**31, (width // 8, rows)).astype(np.int32),
        "m.qzeros": np.full((width // 128, rows // 8), 0x77777777, np.int32),
        "m.scales": np.ones((width // 128, rows), np.float16),
    }
    settings_of = {**VARIANTS["gptq symmetric"].settings, "group_size": 128}
    ref = open_checkpoint(write(tmp_path, Variant(settings_of, gptq()), parts)).tensors["m.weight"]
    with WeightReader() as reader:
        reader.packed(ref, 0, 1)
        tracemalloc.start()
        reader.packed(ref, 1000, 1064)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2 << 20, "64 rows are 256 KiB of codes; the matrix has 16 MiB"


def test_a_plan_says_what_is_carried(folders: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    from edgeexport.cli_show import plans
    from edgeexport.console import Console

    found = plan_of(str(folders("awq")[0]), "host-ort")
    # seven matrices a layer, of two layers; the embedding and lm_head are plain. 4 bits, and for 64 weights a float16
    # scale and 4 bits of zero point
    assert found["carried"] == {"matrices": 14, "of": 16, "bits_per_weight": pytest.approx(4 + 20 / 64, abs=0.1)}
    assert [finding["code"] for finding in found["findings"]] == []
    with pytest.raises(typer.Exit):
        plans(Console(), ["host-ort"], lambda target: found)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("carried over")]
    assert line.split() == ["carried", "over", "14", "of", "16", "matrices,", "4.31", "bits", "a", "weight"]


ANEW = {
    "gptq act-order": ("host-ort", None, "act-order"),
    "gptq int8 with zero points": ("host-ort", "int8", "zero points"),
    "fp8 blocks": ("host-ort", "int8", "float8"),
    "gptq symmetric": ("host-ort", "int8", "int8"),
    "gptq int8": ("android-tflite", "int8", "one scale per row"),
}
"""What is rounded a second time: target, scheme, and what the reason names."""


@pytest.mark.parametrize("name", ANEW)
def test_what_is_not_carried_is_one_warning(name: str, folders: Folders) -> None:
    target, scheme, named = ANEW[name]
    found = plan_of(str(folders(name)[0]), target, scheme)
    (finding,) = [each for each in found["findings"] if each["code"] == "quantised-anew"]
    assert finding["severity"] == "warning"
    assert named in finding["why"]
    assert finding["what"].startswith("14 of 14 ")
    assert found["carried"]["matrices"] == 0
    assert found["exit_code"] == 0


def test_offsets_of_zero_have_a_scale_above_zero() -> None:
    integers, scales = round_offsets(np.float32([[0, 0], [1e-9, 0], [-3, 1]]))
    assert scales.min() > 0, "LiteRT refuses a row whose scale is zero, as where all zero points are the middle"
    np.testing.assert_array_equal(integers, [[0, 0], [0, 0], [-127, 42]])


@pytest.mark.parametrize("name", ["gptq symmetric", "awq"])
def test_a_build_climbs_the_whole_ladder(name: str, tmp_path: Path) -> None:
    from factories import with_tokenizer

    stored, _ = tensors_of(VARIANTS[name])
    if name == "gptq symmetric":  # AutoGPTQ's biases, which a Llama does not have
        modules = [part.removesuffix(".qweight") for part in stored if part.endswith(".qweight")]
        stored |= {f"{module}.bias": np.zeros(SHAPES[module.split(".", 3)[3]][0], np.float16) for module in modules}
    folder = with_tokenizer(write(tmp_path / "model", VARIANTS[name], stored))
    result = pipeline.build(str(folder), "host-ort", tmp_path, context=64, parity="L5")
    assert worst(result.results) is Verdict.PASS
    assert result.plan["carried"]["matrices"] == 14
    (row,) = [row for row in result.results if row.level == "L3" and row.output.startswith("linear int4")]
    assert row.metrics["min_snr_db"] == np.inf, "rounded to 4 bits, it would be some 20"
    (row,) = [row for row in result.results if row.output == "coverage"]
    assert row.metrics["not_read"] == (14 if name == "gptq symmetric" else 0)


@pytest.mark.parametrize("name", ["gptq symmetric", "awq", "int-quantized"])
def test_what_is_moved_into_carried_codes_is_what_they_stand_for(name: str, folders: Folders) -> None:
    """Outliers of activations go into the scales and offsets of carried codes as into any other weight (LiteRT)."""
    checkpoint = open_checkpoint(folders(name)[0])
    plan = plan_for(checkpoint, "int4-b32" if VARIANTS[name].bits == 4 else "int8", "litert")
    weight = f"{AT}.weight"
    assert weight in plan.carried
    rows, width = checkpoint.tensors[weight].shape
    rng, block = np.random.default_rng(3), plan.formats[weight].block or width
    columns = np.repeat(rng.integers(-2, 3, width // block), block).astype(np.int8)
    folds = [
        Fold("norm.weight", (weight,), columns),
        Fold(weight, (), rng.integers(-2, 3, rows).astype(np.int8)),
    ]
    with WeightReader() as reader:
        source = PlannedWeights(reader, checkpoint.tensors, plan, smoothing=Smoothing(folds))
        stored = source.stored_rows(weight, 0, rows)
        assert source.compare(weight, 0, rows, stored).snr_db > 40, "not moved, it would be some 0"


def test_rows_of_one_scale_can_be_built_where_activations_are_smoothed(tmp_path: Path) -> None:
    from factories import with_tokenizer

    stored, _ = tensors_of(VARIANTS["int-quantized"])
    folder = with_tokenizer(write(tmp_path / "model", VARIANTS["int-quantized"], stored))
    result = pipeline.build(str(folder), "android-tflite", tmp_path, quant="int8", context=64, parity="L3")
    assert result.plan["carried"]["matrices"] > 0
    assert worst(row for row in result.results if row.level == "L3") is Verdict.PASS


def test_a_bias_that_is_not_zero_must_be_read(tmp_path: Path) -> None:
    from factories import with_tokenizer

    stored, _ = tensors_of(VARIANTS["gptq symmetric"])
    folder = with_tokenizer(
        write(tmp_path / "model", VARIANTS["gptq symmetric"], stored | {f"{AT}.bias": np.ones(256, np.float16)})
    )
    with pytest.raises(errors.CheckpointError, match="unread-tensors"):
        pipeline.build(str(folder), "host-ort", tmp_path, context=64, parity="L1")
