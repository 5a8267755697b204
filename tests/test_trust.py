"""What is kept or promised is what is used: checkpoints that change, caches and bundles that were damaged."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import tree
from safetensors.numpy import load_file, save_file

from edgeexport import backends, build, errors
from edgeexport.bundle.cache import Cache
from edgeexport.bundle.verify import verify
from edgeexport.checkpoint import content_digest, open_checkpoint
from edgeexport.checkpoint import digest as digests
from edgeexport.families.autoglm_phone import assemble

CONTEXT = 64


def flip(path: Path, bit: int) -> None:
    """Change one bit of a file, that may be one file with another place's."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.unlink()
    path.write_bytes(data)


def test_a_checkpoint_that_changes_while_it_is_compiled_is_neither_shipped_nor_kept(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEEXPORT_CACHE_DIR", str(tmp_path / "cache"))
    model = shutil.copytree(checkpoint, tmp_path / "model")
    weights = model / "model.safetensors"
    genuine, status = weights.read_bytes(), weights.stat()
    module = backends.load("onnxruntime")
    compiled = module.compile

    def disturbed(*given: Any) -> Any:
        other = bytearray(genuine)
        other[-4096:] = bytes(4096)
        weights.write_bytes(other)
        os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
        return compiled(*given)

    monkeypatch.setattr(module, "compile", disturbed)
    with pytest.raises(errors.CheckpointError, match="changed while it was read"):
        build(str(model), "host-ort", tmp_path / "out", quant="int8", context=CONTEXT, parity="L1")
    assert not list((tmp_path / "out").glob("*"))
    monkeypatch.setattr(module, "compile", compiled)
    weights.write_bytes(genuine)
    again = build(str(model), "host-ort", tmp_path / "out", quant="int8", context=CONTEXT, parity="L1")
    monkeypatch.setenv("EDGEEXPORT_CACHE_DIR", str(tmp_path / "clean"))
    clean = build(str(model), "host-ort", tmp_path / "clean-out", quant="int8", context=CONTEXT, parity="L1")
    assert tree(again.bundle) == tree(clean.bundle)


def test_no_bit_of_a_remembered_digest_can_turn_unnoticed(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEEXPORT_CACHE_DIR", str(tmp_path / "cache"))
    opened = open_checkpoint(checkpoint)
    right = content_digest(opened)
    (memo,) = (tmp_path / "cache" / "digests").iterdir()
    whole = memo.read_bytes()
    for bit in range(8 * len(whole)):
        flip(memo, bit)
        assert digests._recall(memo) is None
        memo.write_bytes(whole)
    flip(memo, 3)
    assert content_digest(opened) == right


def test_a_damaged_bundle_is_not_up_to_date(checkpoint: Path, tmp_path: Path) -> None:
    def made(**options: Any) -> Any:
        return build(str(checkpoint), "host-ort", tmp_path, quant="int8", context=CONTEXT, parity="L1", **options)

    bundle = made().bundle
    whole = tree(bundle)
    assert made().up_to_date
    for name in sorted(whole):
        flip(bundle / name, 8 * (len(whole[name]) // 2))
        with pytest.raises(errors.EdgeExportError) as caught:
            made()
        assert caught.value.findings[0].code == "output-exists", name
        assert not made(force=True).up_to_date
        assert tree(bundle) == whole and verify(bundle, golden=False).ok


def test_assembled_weights_that_were_damaged_are_assembled_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEEXPORT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(assemble, "tower_weights", lambda: {"vision.w": np.arange(8, dtype=np.float32)})
    monkeypatch.setattr(assemble, "adaptor_weights", lambda: {"align.w": np.ones(3, np.float16)})
    path = assemble._cached_weights()
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 7):
        flip(path, bit)
        assert assemble._cached_weights().read_bytes() == whole
    for bit in range(0, 8 * 64, 5):
        flip(assemble._digest_of(path), bit)
        assert assemble._cached_weights().read_bytes() == whole


def test_what_headers_tell_is_said_before_any_weight_is_read(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def odd(name: str, change: Any) -> tuple[str, int]:
        folder = shutil.copytree(checkpoint, tmp_path / name)
        change(folder)
        with pytest.raises(errors.EdgeExportError) as caught:
            build(str(folder), "host-ort", tmp_path / "out", quant="int8", context=CONTEXT, parity="L1")
        return caught.value.findings[0].code, caught.value.exit_code

    def another(folder: Path, name: str) -> None:
        tensors = load_file(folder / "model.safetensors")
        save_file(tensors | {name: np.ones((4, 4), np.float32)}, folder / "model.safetensors", {"format": "pt"})

    def without(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    def stops_at(token: Any) -> Any:
        return lambda folder: (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": token}))

    def asks_by(template: bytes) -> Any:
        return lambda folder: (folder / "chat_template.jinja").write_bytes(template)

    compiled: list[str] = []
    monkeypatch.setattr(backends.load("onnxruntime"), "compile", lambda *given: compiled.append("compiled"))
    lora = "model.layers.0.self_attn.q_proj.lora_A.weight"
    assert odd("left over", lambda folder: another(folder, lora)) == ("unread-tensors", 3)
    assert odd("missing", without) == ("missing-tensor", 3)
    assert odd("adapter", lambda folder: (folder / "adapter_config.json").write_text("{}")) == ("adapter-not-merged", 3)
    assert odd("eos", stops_at(320)) == ("token-beyond-model", 3)
    assert odd("eos of 2^64", stops_at(2**64))[1] == 3
    assert odd("eos below 0", stops_at(-1))[1] == 3
    assert odd("eos as text", stops_at("257"))[1] == 3
    unusable = ("chat-template-unusable", 3)
    assert odd("template that draws", asks_by(b"{% if tools %}{{ tools | random }}{% endif %}")) == unusable
    assert odd("template of no language", asks_by(b"{% for %}")) == unusable
    assert odd("template that is no text", asks_by(b"{{ messages }}\xff")) == ("file-unreadable", 3)
    assert odd("template that never ends", asks_by(b"{{1}}" * 800_000)) == unusable
    assert not compiled and not (tmp_path / "out").exists()


def test_an_entry_of_the_cache_that_was_damaged_is_made_anew(tmp_path: Path) -> None:
    cache = Cache(tmp_path)

    def fill(folder: Path) -> None:
        (folder / "a").write_bytes(b"what was made")
        (folder / "sub").mkdir()
        (folder / "sub" / "b").write_bytes(b"and more")

    place, _ = cache.folder("step", "key", fill)
    whole = tree(place)
    for name, data in whole.items():
        for bit in range(0, 8 * len(data), 3):
            flip(place / name, bit)
            again, known = cache.folder("step", "key", fill)
            assert not known and tree(again) == whole, (name, bit)
