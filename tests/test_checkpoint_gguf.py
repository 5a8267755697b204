"""GGUF files: our index, names, config and tokenizer against llama.cpp's own library and transformers."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from factories import SHAPES, tiny_model, write_gguf
from gguf.constants import GGML_QUANT_SIZES
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer, get_gguf_tokenizer
from transformers.modeling_gguf_pytorch_utils import (
    LlamaTensorProcessor,
    load_gguf_checkpoint,
)

from edgeexport.checkpoint import WeightReader, content_digest, open_checkpoint
from edgeexport.checkpoint.gguf import SUPPORTED, read_header
from edgeexport.checkpoint.gguf_architectures import ARCHITECTURES, HEAD, OUTER, llama3_factors
from edgeexport.checkpoint.gguf_tokenizer import PRE_TOKENIZERS
from edgeexport.core import Checkpoint
from edgeexport.errors import CheckpointError

TEXTS = [
    "the thin theatre 1212 in 2 re",
    "  two  spaces\n\nlines\r\n\ttab  ",
    "It's WE'LL don't-stop!!! (a,b) ½ ٣٤ x²",
    "Cafe\u0301 café 你好 мир 🙂",
    "<|begin|>the<think>in<|user|>[PAD267]",
    "",
]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEEXPORT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


def code_of(action: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        action()
    assert all(finding.fix for finding in caught.value.findings)
    return caught.value.findings[0].code


def weights_of(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    with WeightReader() as reader:
        return {name: torch.from_numpy(reader.read(ref)) for name, ref in checkpoint.tensors.items()}


def rebuilt(checkpoint: Checkpoint) -> Any:
    """transformers' model of our config and our weights; every weight in its place."""
    config = dict(checkpoint.config)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    missing = model.load_state_dict(weights_of(checkpoint), strict=False)
    assert missing.unexpected_keys == []
    assert missing.missing_keys == (["lm_head.weight"] if checkpoint.config["tie_word_embeddings"] else [])
    model.tie_weights()
    return model.eval()


VARIANTS = [(model_type, {}) for model_type in SHAPES] + [
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"attention_bias": True}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("glm4", {"attention_bias": False}),
]


@pytest.mark.parametrize(("model_type", "changes"), VARIANTS)
def test_the_same_logits_as_the_original(tmp_path: Path, model_type: str, changes: dict[str, Any]) -> None:
    original = tiny_model(model_type, **changes)
    write_gguf(tmp_path / "Tiny.gguf", original)
    checkpoint = open_checkpoint(tmp_path / "Tiny.gguf")
    assert (checkpoint.name, checkpoint.format, checkpoint.model_type) == ("tiny", "gguf", model_type)
    ids = torch.arange(12).reshape(1, 12) * 7 % 288
    with torch.no_grad():
        torch.testing.assert_close(rebuilt(checkpoint)(ids).logits, original(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("quantize", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_the_same_weights_and_config_as_transformers(tmp_path: Path, model_type: str, quantize: str) -> None:
    path = tmp_path / "tiny.gguf"
    original = tiny_model(model_type)
    write_gguf(path, original, quantize)
    theirs = load_gguf_checkpoint(path, return_tensors=True, model_to_load=original)
    checkpoint = open_checkpoint(path)
    ours = weights_of(checkpoint)
    assert ours.keys() == theirs["tensors"].keys()
    for name, tensor in theirs["tensors"].items():
        torch.testing.assert_close(ours[name], tensor.float(), rtol=0, atol=0)
    for key in theirs["config"].keys() & checkpoint.config.keys():
        expected = theirs["config"][key]
        if isinstance(expected, float):
            expected = pytest.approx(expected, rel=1e-6)  # theirs is the float32 nearest to the decimal
        assert checkpoint.config[key] == expected, key
    assert {checkpoint.tensors[name].encoding for name in ours} == {quantize, "F32"}


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_the_names_are_those_of_the_gguf_package(architecture: str) -> None:
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(arch, 3)
    for part, name in ARCHITECTURES[architecture].layers.items():
        assert names.get_name(f"model.layers.2.{name}") == f"blk.2.{part}"
    for theirs, ours in (OUTER | {HEAD: "lm_head.weight"}).items():
        assert names.get_name(ours.removesuffix(".weight")) == theirs.removesuffix(".weight")


def test_supported_types_are_known_to_the_gguf_package() -> None:
    for name in SUPPORTED:
        assert gguf.GGMLQuantizationType[name] in GGML_QUANT_SIZES


def test_generation_and_special_tokens(tmp_path: Path) -> None:
    write_gguf(tmp_path / "t.gguf", tiny_model("llama"))
    checkpoint = open_checkpoint(tmp_path / "t.gguf")
    assert checkpoint.generation == {"bos_token_id": 263, "eos_token_id": [264, 265]}
    assert json.loads(checkpoint.read_tokenizer()["generation_config.json"]) == checkpoint.generation
    assert checkpoint.config["eos_token_id"] == 264


def test_digest_ignores_the_files_name(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", tiny_model("qwen2"))
    (tmp_path / "b.gguf").write_bytes((tmp_path / "a.gguf").read_bytes())
    assert content_digest(open_checkpoint(tmp_path / "a.gguf")) == content_digest(open_checkpoint(tmp_path / "b.gguf"))


# rope scaling


def rope_of(path: Path, extra: dict[str, Any], model_type: str = "llama") -> dict[str, Any]:
    write_gguf(path, tiny_model(model_type), extra=extra)
    return dict(open_checkpoint(path).config["rope_parameters"])


def test_linear_and_yarn(tmp_path: Path) -> None:
    base = {"rope_theta": 50000.0}
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert rope_of(tmp_path / "a.gguf", linear) == base | {"rope_type": "linear", "factor": 4.0}
    yarn = {
        "qwen2.rope.scaling.type": "yarn",
        "qwen2.rope.scaling.factor": 4.0,
        "qwen2.rope.scaling.original_context_length": 32,
    }
    expected = base | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    assert rope_of(tmp_path / "b.gguf", yarn, "qwen2") == expected


def test_llama3_factors(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    original = tiny_model("llama", rope_parameters=dict(scaling), max_position_embeddings=131072, head_dim=64)
    plain = 500000.0 ** -(torch.arange(0, 64, 2).float() / 64)
    factors = (plain / original.model.rotary_emb.inv_freq).numpy()
    np.testing.assert_allclose(llama3_factors(500000.0, 64, scaling), factors, rtol=1e-5)
    write_gguf(tmp_path / "l.gguf", original, extra={"rope_freqs.weight": factors})
    checkpoint = open_checkpoint(tmp_path / "l.gguf")
    assert checkpoint.config["rope_parameters"] == scaling
    torch.testing.assert_close(rebuilt(checkpoint).model.rotary_emb.inv_freq, original.model.rotary_emb.inv_freq)
    write_gguf(tmp_path / "m.gguf", original, extra={"rope_freqs.weight": factors[::-1].copy()})
    assert code_of(lambda: open_checkpoint(tmp_path / "m.gguf")) == "gguf-unsupported"


@pytest.mark.parametrize(
    "extra",
    [
        {"llama.rope.scaling.type": "longrope"},
        {"llama.rope.scaling.type": "linear"},
        {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0},
        {"llama.rope.scaling.yarn_attn_factor": 2.0},
        {"llama.expert_count": 8},
        {"llama.attention.sliding_window": 4096},
        {"llama.logit_scale": 0.5},
        {"split.count": 3},
        {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)},
        {"blk.2.attn_q.weight": np.zeros((64, 64), np.float32)},
        {"blk.0.attn_norm.bias": np.zeros(64, np.float32)},
        {"llama.vocab_size": 300},
        {"rope_freqs.weight": np.ones(5, np.float32)},
        {"tokenizer.ggml.padding_token_id": 1000},
    ],
    ids=str,
)
def test_what_cannot_be_reconstructed_is_refused(tmp_path: Path, extra: dict[str, Any]) -> None:
    write_gguf(tmp_path / "x.gguf", tiny_model("llama"), extra=extra)
    assert code_of(lambda: open_checkpoint(tmp_path / "x.gguf")) == "gguf-unsupported"


def test_what_changes_nothing_is_accepted(tmp_path: Path) -> None:
    extra = {"llama.expert_count": 0, "llama.attention.causal": True, "split.count": 1, "other.key": "x"}
    write_gguf(tmp_path / "x.gguf", tiny_model("llama"), extra=extra)
    open_checkpoint(tmp_path / "x.gguf")


# tokenizer


@pytest.mark.parametrize("pre", ["gpt-2", "qwen2", "llama-bpe"])
def test_the_same_tokens_as_transformers(tmp_path: Path, pre: str) -> None:
    path = tmp_path / "t.gguf"
    write_gguf(path, tiny_model("qwen2" if pre == "qwen2" else "llama"), pre=pre)
    ours = Tokenizer.from_str(open_checkpoint(path).read_tokenizer()["tokenizer.json"].decode())
    architecture, described, _ = get_gguf_tokenizer(str(path))
    theirs, _ = convert_gguf_tokenizer(architecture, described)
    for text in TEXTS:
        if pre == "qwen2":  # transformers builds a GPT2Tokenizer without the NFC of Qwen's own tokenizer.json
            theirs.normalizer = ours.normalizer
        if "[PAD" in text:  # theirs keeps fillers as tokens that merges could make; there are none here
            continue
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text, add_special_tokens=False).ids, (
            text
        )


def test_splits_are_those_of_the_originals() -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    assert PRE_TOKENIZERS["qwen2"].split == PRETOKENIZE_REGEX
    for name in ("llama-bpe", "llama3", "llama-v3", "deepseek-r1-qwen"):
        assert PRE_TOKENIZERS[name].split == GGUF_PRE_TOKENIZER_SPLITS[name]


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_tokenizer_files_load_and_round_trip(tmp_path: Path, pre: str) -> None:
    write_gguf(tmp_path / "t.gguf", tiny_model("llama"), pre=pre)
    files = open_checkpoint(tmp_path / "t.gguf").read_tokenizer()
    assert set(files) == {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|begin|>", "<|end|>")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False) == "the"
    for text in TEXTS[:3]:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    first = tokenizer("the").input_ids[0]
    assert (first == 263) == (pre in {"llama-bpe", "llama3", "llama-v3"})
    assert tokenizer("a<think>b", add_special_tokens=False).input_ids[1] == 266
    assert 267 not in tokenizer("[PAD267]").input_ids


def test_digits_of_smollm_stay_apart(tmp_path: Path) -> None:
    for pre, expected in (("smollm", 2), ("gpt-2", 1)):  # "1 2" is a merge of the tiny vocabulary
        write_gguf(tmp_path / "t.gguf", tiny_model("llama"), pre=pre)
        tokenizer = Tokenizer.from_str(open_checkpoint(tmp_path / "t.gguf").read_tokenizer()["tokenizer.json"].decode())
        assert len(tokenizer.encode("12").ids) == expected


def test_bos_and_eos_as_the_file_says(tmp_path: Path) -> None:
    flags = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    write_gguf(tmp_path / "t.gguf", tiny_model("llama"), extra=flags)
    tokenizer = Tokenizer.from_str(open_checkpoint(tmp_path / "t.gguf").read_tokenizer()["tokenizer.json"].decode())
    assert tokenizer.encode("re").ids == [263, 260, 264]


def test_fillers_are_no_tokens(tmp_path: Path) -> None:
    write_gguf(tmp_path / "t.gguf", tiny_model("llama"))
    tokenizer = Tokenizer.from_str(open_checkpoint(tmp_path / "t.gguf").read_tokenizer()["tokenizer.json"].decode())
    assert tokenizer.id_to_token(266) == "<think>"
    assert tokenizer.id_to_token(267) is None


def test_qwen_composes_characters(tmp_path: Path) -> None:
    write_gguf(tmp_path / "t.gguf", tiny_model("qwen2"), pre="qwen2")
    tokenizer = Tokenizer.from_str(open_checkpoint(tmp_path / "t.gguf").read_tokenizer()["tokenizer.json"].decode())
    assert tokenizer.encode("e\u0301").ids == tokenizer.encode("\u00e9").ids


@pytest.mark.parametrize("merge", ["t h", "nospace", " x", "the Q", ""])
def test_merges_of_unknown_tokens_are_refused(tmp_path: Path, merge: str) -> None:
    write_gguf(tmp_path / "t.gguf", tiny_model("llama"), merges=["h e", merge])
    assert code_of(open_checkpoint(tmp_path / "t.gguf").read_tokenizer) == "gguf-tokenizer"


@pytest.mark.parametrize("pre", ["default", "tekken", ""])
def test_unknown_pre_tokenizers_are_refused(tmp_path: Path, pre: str) -> None:
    write_gguf(tmp_path / "t.gguf", tiny_model("llama"), pre=pre)
    assert code_of(open_checkpoint(tmp_path / "t.gguf").read_tokenizer) == "gguf-tokenizer"


# the header


@pytest.fixture(scope="module")
def header_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small file of two tensors and every kind of metadata."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("u8", 1)
    writer.add_int64("i64", -5)
    writer.add_float64("f64", 0.5)
    writer.add_bool("yes", True)
    writer.add_string("text", "grüße")
    writer.add_array("numbers", [1, 2, 3])
    writer.add_array("words", ["a", "bc"])
    writer.add_tensor("first", np.arange(10, dtype=np.float32).reshape(2, 5))
    writer.add_tensor("second", np.zeros((4, 34), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_header_equals_the_gguf_packages(tmp_path: Path, header_bytes: bytes) -> None:
    path = tmp_path / "s.gguf"
    path.write_bytes(header_bytes)
    ours, theirs = read_header(path), gguf.GGUFReader(path)
    expected = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    found = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in ours.metadata.items()}
    assert found == expected
    assert list(ours.tensors) == ["first", "second"]
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert (mine.offset, mine.nbytes, mine.encoding) == (
            tensor.data_offset,
            tensor.n_bytes,
            tensor.tensor_type.name,
        )
        assert mine.shape == tuple(int(extent) for extent in reversed(tensor.shape))


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def file_of(tensors: list[bytes] | int = 0, keys: list[bytes] | int = 0, version: int = 3, data: bytes = b"") -> bytes:
    """A GGUF file put together by hand; numbers in place of lists are counts with nothing behind them."""
    tensor_count = tensors if isinstance(tensors, int) else len(tensors)
    key_count = keys if isinstance(keys, int) else len(keys)
    body = b"".join([] if isinstance(keys, int) else keys) + b"".join([] if isinstance(tensors, int) else tensors)
    head = b"GGUF" + struct.pack("<IQQ", version, tensor_count, key_count) + body
    return head + bytes(-len(head) % 32) + data


def tensor(name: str, shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def key(name: str, kind: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GGU",
        b"GGML" + bytes(60),
        file_of(version=1),
        file_of(version=4),
        file_of(version=3 << 24),
        file_of(tensors=2**63),
        file_of(tensors=2**20),
        file_of(keys=2**63),
        file_of(keys=2**20),
        file_of(keys=[struct.pack("<Q", 2**62) + b"abc"]),
        file_of(keys=[struct.pack("<Q", 10**6) + b"abc"]),
        file_of(keys=[key("a", 13, bytes(8))]),
        file_of(keys=[key("a", 8, struct.pack("<Q", 2**63))]),
        file_of(keys=[key("a", 8, struct.pack("<Q", 2) + b"\xff\xfe")]),
        file_of(keys=[key("a", 9, struct.pack("<IQ", 0, 2**63))]),
        file_of(keys=[key("a", 9, struct.pack("<IQ", 0, 10**6))]),
        file_of(keys=[key("a", 9, struct.pack("<IQ", 8, 10**6))]),
        file_of(keys=[key("a", 9, struct.pack("<IQ", 9, 1) + struct.pack("<IQ", 0, 0))]),
        file_of(keys=[key("a", 0, b"\1"), key("a", 0, b"\1")]),
        file_of(keys=[key("general.alignment", 4, struct.pack("<I", 0))]),
        file_of(keys=[key("general.alignment", 4, struct.pack("<I", 24))]),
        file_of(keys=[key("general.alignment", 4, struct.pack("<I", 2**31))]),
        file_of(keys=[key("general.alignment", 8, string("32"))]),
        file_of(tensors=[tensor("a", [4])]),
        file_of(tensors=[tensor("a", [])], data=bytes(64)),
        file_of(tensors=[tensor("a", [1] * 5)], data=bytes(64)),
        file_of(tensors=[tensor("a", [0])], data=bytes(64)),
        file_of(tensors=[tensor("a", [2**63, 2**63])], data=bytes(64)),
        file_of(tensors=[tensor("a", [4], kind=4)], data=bytes(64)),
        file_of(tensors=[tensor("a", [33], kind=8)], data=bytes(640)),
        file_of(tensors=[tensor("a", [4], offset=32)], data=bytes(64)),
        file_of(tensors=[tensor("a", [4], offset=2**64 - 32)], data=bytes(64)),
        file_of(tensors=[tensor("a", [4]), tensor("b", [4])], data=bytes(64)),
        file_of(tensors=[tensor("a", [4]), tensor("b", [4], offset=64)], data=bytes(128)),
        file_of(tensors=[tensor("a", [4]), tensor("a", [4], offset=32)], data=bytes(64)),
    ],
    ids=range(36),
)
def test_bad_headers(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    assert code_of(lambda: open_checkpoint(path)) == "bad-gguf"


def test_the_limit_of_arrays(tmp_path: Path, header_bytes: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s.gguf"
    path.write_bytes(header_bytes)
    monkeypatch.setattr("edgeexport.checkpoint.gguf.ARRAY_LIMIT", 2)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert caught.value.findings[0].why == "the value of 'numbers' announces 3 elements; at most 2 are allowed"


def test_arrays_of_arrays_are_named(tmp_path: Path) -> None:
    path = tmp_path / "n.gguf"
    path.write_bytes(file_of(keys=[key("a", 9, struct.pack("<IQ", 9, 0))]))
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert "array of arrays" in caught.value.findings[0].why


def test_undecodable_types_are_named(tmp_path: Path) -> None:
    path = tmp_path / "iq.gguf"
    entries = [
        tensor("a", [256], kind=16),
        tensor("b", [256], kind=16, offset=96),
        tensor("c", [4], kind=26, offset=192),
    ]
    path.write_bytes(file_of(tensors=entries, data=bytes(256)))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    whats = [(finding.code, finding.what, finding.where) for finding in caught.value.findings]
    assert whats == [
        ("gguf-tensor-type", "1 tensors are stored as I32, which is not supported", f"{path}: c"),
        ("gguf-tensor-type", "2 tensors are stored as IQ2_XXS, which is not supported", f"{path}: a"),
    ]


def test_unknown_architecture(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(file_of(keys=[key("general.architecture", 8, string("qwen"))]))
    assert code_of(lambda: open_checkpoint(path)) == "gguf-architecture"
    path.write_bytes(file_of())
    assert code_of(lambda: open_checkpoint(path)) == "gguf-architecture"


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "t.gguf"
    write_gguf(path, tiny_model("qwen3"), "Q8_0", pre="qwen2")
    return path.read_bytes()


def open_all(path: Path) -> None:
    """Everything that reads a GGUF file; a CheckpointError is the only way to fail."""
    try:
        checkpoint = open_checkpoint(path)
        checkpoint.read_tokenizer()
        weights_of(checkpoint)
    except CheckpointError:
        return


@settings(max_examples=150, deadline=None)
@given(flips=st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1, max_size=6))
def test_fuzz_changed_bytes(
    tmp_path_factory: pytest.TempPathFactory, whole_file: bytes, flips: list[tuple[int, int]]
) -> None:
    data = bytearray(whole_file)
    header = whole_file.index(b"token_embd.weight") + 2000
    for position, value in flips:
        data[position % header] = value
    path = tmp_path_factory.getbasetemp() / "f.gguf"
    path.write_bytes(data)
    open_all(path)


@settings(max_examples=60, deadline=None)
@given(cut=st.floats(0, 1))
def test_fuzz_cut_short(tmp_path_factory: pytest.TempPathFactory, whole_file: bytes, cut: float) -> None:
    path = tmp_path_factory.getbasetemp() / "c.gguf"
    path.write_bytes(whole_file[: int(cut * (len(whole_file) - 1))])
    assert code_of(lambda: open_checkpoint(path)) == "bad-gguf"


NUMBER = st.one_of(st.integers(0, 40), st.sampled_from([2**31, 2**32, 2**53, 2**63, 2**64 - 1]))


@settings(max_examples=150, deadline=None)
@given(
    shapes=st.lists(st.lists(NUMBER, max_size=5), max_size=3),
    kinds=st.lists(st.integers(0, 45), min_size=3, max_size=3),
    offsets=st.lists(NUMBER, min_size=3, max_size=3),
    values=st.lists(st.tuples(st.integers(0, 14), st.integers(0, 14), NUMBER), max_size=3),
    tail=st.binary(max_size=80),
)
def test_fuzz_lying_numbers(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: list[list[int]],
    kinds: list[int],
    offsets: list[int],
    values: list[tuple[int, int, int]],
    tail: bytes,
) -> None:
    tensors = [tensor(f"t{i}", shape, kinds[i], offsets[i]) for i, shape in enumerate(shapes)]
    keys = [key(f"k{i}", kind, struct.pack("<IQ", inner, count)) for i, (kind, inner, count) in enumerate(values)]
    path = tmp_path_factory.getbasetemp() / "l.gguf"
    path.write_bytes(file_of(tensors, keys, data=tail))
    try:
        for entry in read_header(path).tensors.values():
            assert entry.offset + entry.nbytes <= path.stat().st_size
    except CheckpointError:
        return


# the real model


@pytest.mark.real
def test_smollm2() -> None:
    checkpoint = open_checkpoint("smollm2-135m")
    assert (checkpoint.name, checkpoint.model_type, len(checkpoint.tensors)) == ("smollm2-135m", "llama", 272)
    assert checkpoint.config["rms_norm_eps"] == 1e-5
    name_map = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 30)
    names = {f"{name_map.get_name(name[:-7])}.weight": name for name in checkpoint.tensors}
    processor = LlamaTensorProcessor(checkpoint.config)
    tensors = gguf.GGUFReader(checkpoint.files[0]).tensors
    assert {names[tensor.name] for tensor in tensors} == checkpoint.tensors.keys()
    with WeightReader() as reader:
        for tensor in tensors[:20] + tensors[-10:]:
            expected = processor.process(gguf.dequantize(tensor.data, tensor.tensor_type), tensor.name).weights
            np.testing.assert_array_equal(reader.read(checkpoint.tensors[names[tensor.name]]), expected)


@pytest.mark.real
def test_smollm2_tokenizer() -> None:
    files = open_checkpoint("smollm2-135m").read_tokenizer()
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    # As llama.cpp tokenizes them.
    for text, ids in {
        "Hello, we can use": [19556, 28, 392, 416, 722],
        "The capital of France is": [504, 3575, 282, 4649, 314],
        "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
        "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
        "  multiple   spaces": [216, 2701, 256, 5600],
    }.items():
        assert tokenizer.encode(text).ids == ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("<|im_start|>").ids == [1]
    assert b"SmolLM" in files["chat_template.jinja"]
