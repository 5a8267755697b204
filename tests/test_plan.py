"""The plan: sizes by hand, refusals all at once, headers only."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgeexport import backends, errors, families, plan, quant, targets
from edgeexport.backends.optable import OpTable
from edgeexport.core import Geometry, Traits
from edgeexport.errors import CheckpointError, UsageError

SMALL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
NINE_BILLION = {
    **SMALL,
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "num_hidden_layers": 45,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 151552,
    "max_position_embeddings": 32768,
}


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Llama's weights, by transformers' names."""
    hidden, wide, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    narrow = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    for index in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def product(shape: tuple[int, ...]) -> int:
    return shape[0] * shape[1] if len(shape) == 2 else shape[0]


def checkpoint(folder: Path, config: dict[str, Any]) -> Path:
    """A checkpoint whose weights are a hole in the file: headers of any size at no cost in disk."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes_of(config).items():
        start, end = end, end + 2 * product(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return folder


def test_sizes_are_those_of_the_arithmetic(tmp_path: Path) -> None:
    document = plan.plan(str(checkpoint(tmp_path / "small", SMALL)), "android-ort", "fp16", 512)
    shapes = shapes_of(SMALL)
    matrices = 2 * sum(product(shape) for shape in shapes.values() if len(shape) == 2)
    vectors = 4 * sum(product(shape) for shape in shapes.values() if len(shape) == 1)
    cache = 2 * 3 * 2 * 16 * 4 * 512  # K and V, layers, KV heads, head size, float32, tokens
    sizes = document["bytes"]
    assert sizes["artifact"] == matrices + vectors
    assert sizes["kv_cache"] == cache
    assert sizes["weights_read_per_token"] == matrices + vectors - 2 * 320 * 64
    assert document["context"] == 512
    assert document["components"] == ["decoder"]
    assert document["model"]["parameters"] == sum(map(product, shapes.values()))
    assert (document["exit_code"], document["findings"]) == (0, [])
    read = sizes["weights_read_per_token"]
    rates = {device["name"]: device for device in document["devices"]}
    assert rates["galaxy-s23"]["tokens_per_second_empty"] == pytest.approx(67.2e9 / read, rel=1e-3)
    assert rates["galaxy-s23"]["tokens_per_second_full"] == pytest.approx(67.2e9 / (read + cache), rel=1e-3)


def test_int4_blocks_carry_a_scale_each(tmp_path: Path) -> None:
    document = plan.plan(str(checkpoint(tmp_path / "small", SMALL)), "android-tflite", "int4-b32")
    expected = 0
    for name, shape in shapes_of(SMALL).items():
        if len(shape) == 1:
            expected += 4 * product(shape)
        elif any(part in name for part in ("v_proj", "embed", "lm_head")):
            expected += product(shape) + 2 * shape[0]
        else:
            expected += product(shape) // 2 + product(shape) // 32 * 2
    assert document["bytes"]["artifact"] == expected


def test_a_tied_embedding_is_stored_once_and_read_whole(tmp_path: Path) -> None:
    config = {**SMALL, "tie_word_embeddings": True}
    tied = plan.plan(str(checkpoint(tmp_path / "tied", config)), "host-ort", "fp16")["bytes"]
    untied = plan.plan(str(checkpoint(tmp_path / "untied", SMALL)), "host-ort", "fp16")["bytes"]
    assert untied["artifact"] - tied["artifact"] == 2 * 320 * 64
    assert tied["weights_read_per_token"] == tied["artifact"] == untied["weights_read_per_token"]


def test_the_context_is_the_targets_as_far_as_the_model_goes(tmp_path: Path) -> None:
    folder = str(checkpoint(tmp_path / "small", SMALL))
    assert targets.load("host-ort").context == 2048
    assert plan.plan(folder, "host-ort")["context"] == 1024
    document = plan.plan(folder, "host-ort", context=1025)
    assert document["exit_code"] == UsageError.exit_code
    assert [finding["code"] for finding in document["findings"]] == ["context-too-long"]


def test_unknown_things_are_reported_together(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        plan.plan(str(tmp_path / "nothing"), "host-orb", "int3")
    codes = [finding.code for finding in caught.value.findings]
    assert codes[1:] == ["unknown-target", "unknown-scheme"]
    config = {**SMALL, "model_type": "lama"}
    with pytest.raises(UsageError) as caught_first:
        plan.plan(str(checkpoint(tmp_path / "odd", config)), "host-orb")
    assert [finding.code for finding in caught_first.value.findings] == ["unknown-target", "unknown-model-type"]


def test_refused_and_unknown_ops_are_all_named(monkeypatch: pytest.MonkeyPatch) -> None:
    table = OpTable("fake")
    table.native("Add")
    table.reject("NonZero", why="depends on data", fix="pass a mask")

    class Fake:
        OPS = table

    monkeypatch.setattr(backends, "load", lambda name: Fake)
    refused = plan.refused_ops("fake", "llama", frozenset({"Add", "NonZero", "Loop"}))
    assert [(finding.code, finding.where) for finding in refused] == [("op-not-lowered", "family llama")] * 2
    assert ["Loop" in refused[0].what, refused[1].why, refused[1].fix] == [True, "depends on data", "pass a mask"]


def test_a_refused_op_ends_the_plan_with_the_lowering_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = backends.load("onnxruntime")

    class Fake:
        OPS = OpTable("onnxruntime")
        OPTIONS = real.OPTIONS
        TRAITS = real.TRAITS

    monkeypatch.setattr(backends, "load", lambda name: Fake)
    document = plan.plan(str(checkpoint(tmp_path / "small", SMALL)), "host-ort")
    assert document["exit_code"] == errors.LoweringError.exit_code
    assert len(document["findings"]) == len(families.find("llama").ops)


def test_a_model_that_fits_no_phone_is_a_warning(tmp_path: Path) -> None:
    folder = str(checkpoint(tmp_path / "large", NINE_BILLION))
    document = plan.plan(folder, "android-ort", "fp16")
    assert not any(device["fits"] for device in document["devices"])
    assert [(finding["severity"], finding["code"]) for finding in document["findings"]] == [
        ("warning", "no-device-fits")
    ]
    assert document["exit_code"] == 0
    small = plan.plan(folder, "android-ort", "int4-b32")
    assert {device["name"]: device["fits"] for device in small["devices"]}["oneplus-13-16gb"]
    assert not small["findings"]


def test_a_file_limit_of_the_target_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    source = targets.load("host-ort").source
    folder = str(checkpoint(tmp_path / "small", SMALL))
    size = plan.plan(folder, "host-ort")["bytes"]["artifact"]
    for limit, codes in ((size, []), (size - 1, ["artifact-too-large"])):
        file.write_text(f"{source}\n[limits]\nmax_file_bytes = {limit}\n")
        assert [finding["code"] for finding in plan.plan(folder, str(file))["findings"]] == codes


def test_a_backend_that_splits_a_decoder_is_not_held_to_one_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    source = targets.load("ios-coreml").source
    file.write_text(re.sub(r"max_file_bytes = \d+", "max_file_bytes = 1", source))
    made = plan.plan(str(checkpoint(tmp_path / "small", SMALL)), str(file))
    assert "artifact-too-large" not in {finding["code"] for finding in made["findings"]}


def test_build_cost_counts_layers_and_not_the_vocabulary() -> None:
    geometry = Geometry(2, 8, 2, 2, 4, vocab=100, max_context=16, tied=False)
    shapes = {"embed": (100, 8), "a": (10, 10), "b": (10, 10)}
    cost = plan.build_cost(shapes, geometry, {"artifact": 1000, "kv_cache": 10})
    layers = 2 * (4 * 200 // 2)
    assert cost["memory_to_l3"] - cost["memory"] == layers
    assert cost["memory_with_ladder"] - cost["memory"] == max(layers, 2 * (1000 + 10))
    for room, held in ((1000, 1000), (1 << 40, 4 * 1000)):
        wide = plan.build_cost(shapes, geometry, {"artifact": 1000, "kv_cache": 10}, Traits(widens=room))
        assert wide["memory_with_ladder"] - cost["memory"] == 2 * (1000 + 10) + held
    apart = plan.build_cost(shapes, geometry, {"artifact": 1000, "kv_cache": 10}, Traits(compiler=3.0))
    assert {apart[each] - cost["memory"] for each in ("memory", "memory_to_l3", "memory_with_ladder")} == {3000}


def test_a_calibration_costs_what_its_method_does() -> None:
    def cost(config: dict[str, Any], scheme: str, encoding: str = "BF16") -> dict[str, Any]:
        shapes, geometry = shapes_of(config), families.find("llama").geometry(config)
        encodings = dict.fromkeys(shapes, encoding)
        traits = Traits(shifts=("int8",))
        return plan.calibration_cost(quant.plan_from_names(shapes, scheme, False, traits, encodings), shapes, geometry)

    large = cost(NINE_BILLION, "int4-b32")
    assert large["default"] == "search"
    assert large["search"]["seconds"] < 0.5 * large["gptq"]["seconds"]
    assert large["search"]["memory"] < large["gptq"]["memory"]
    assert cost(SMALL, "int4-b32")["default"] == "gptq"
    assert cost(NINE_BILLION, "int4-b128")["gptq"] == large["gptq"], "blocks change no work"
    assert cost(NINE_BILLION, "int8") == {"default": None}
    assert cost(NINE_BILLION, "int4-b32", "Q4_1") == {"default": None}, "integers of the checkpoint need none"


def test_headers_of_twenty_gigabytes_take_neither_torch_nor_memory(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "large", NINE_BILLION)
    assert (folder / "model.safetensors").stat().st_size > 18e9
    script = f"""
import sys
from edgeexport.bench import peak_rss  # not getrusage's: that is never below what the parent held
from edgeexport.plan import plan
assert plan({str(folder)!r}, "android-ort")["bytes"]["artifact"] > 4e9
assert not {{"torch", "transformers", "onnxruntime"}} & set(sys.modules)
print(peak_rss() >> 20)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 300
