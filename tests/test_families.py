"""Families: what is read from a config, what is refused, and how others add to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import CONTEXT, FAMILIES, Zoo, oracle, write_checkpoint

from edgeexport import errors, families
from edgeexport.canonical.dialect import OPS
from edgeexport.canonical.trace import trace
from edgeexport.checkpoint import open_checkpoint
from edgeexport.core import Checkpoint

LLAMA = families.find("llama")


def codes(call: Callable[[], object], kind: type[errors.EdgeExportError]) -> list[str]:
    """The codes of the findings that `call` fails with."""
    with pytest.raises(kind) as caught:
        call()
    return [finding.code for finding in caught.value.findings]


def with_config(checkpoint: Checkpoint, **changes: Any) -> Checkpoint:
    return replace(checkpoint, config={**checkpoint.config, **changes})


@pytest.mark.parametrize("name", FAMILIES)
def test_geometry_is_that_of_transformers_model(name: str, zoo: Zoo) -> None:
    family = families.find(name)
    found = family.geometry(family.tiny)
    model = getattr(zoo.oracle(name), "decoder", zoo.oracle(name))
    body = getattr(model.model, "language_model", model.model)
    attention = body.layers[0].self_attn
    assert found.layers == len(body.layers)
    assert (found.vocab, found.hidden) == tuple(model.lm_head.weight.shape)
    assert found.head_dim == attention.head_dim
    assert found.heads * found.head_dim == attention.q_proj.weight.shape[0]
    assert found.kv_heads * found.head_dim == attention.k_proj.weight.shape[0]
    assert found.tied == (model.lm_head.weight is body.embed_tokens.weight)
    assert found.max_context == body.config.max_position_embeddings


def test_a_model_without_grouped_keys_has_as_many_as_heads() -> None:
    config = {key: value for key, value in LLAMA.tiny.items() if key not in ("num_key_value_heads", "head_dim")}
    found = LLAMA.geometry(config)
    assert (found.kv_heads, found.head_dim, found.kv_bytes_per_token(2)) == (4, 16, 2 * 3 * 4 * 16 * 2)


@pytest.mark.parametrize(
    "key",
    [
        "hidden_size",
        "num_attention_heads",
        "num_hidden_layers",
        "vocab_size",
        "max_position_embeddings",
        "num_key_value_heads",
        "head_dim",
    ],
)
@pytest.mark.parametrize("value", [0, -1, "64", 2.0, True, [4], 1 << 60], ids=repr)
def test_a_number_that_is_none_is_named(key: str, value: object) -> None:
    with pytest.raises(errors.CheckpointError) as caught:
        LLAMA.geometry({**LLAMA.tiny, key: value})
    (finding,) = caught.value.findings
    assert finding.code == "bad-config"
    assert key in finding.what + finding.where + finding.why


@pytest.mark.parametrize("key", ["hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"])
def test_a_number_that_is_missing_is_named(key: str) -> None:
    config = {name: value for name, value in LLAMA.tiny.items() if name != key}
    assert codes(lambda: LLAMA.geometry(config), errors.CheckpointError) == ["bad-config"]


def test_key_heads_must_divide_heads() -> None:
    changed = {**LLAMA.tiny, "num_key_value_heads": 3}
    assert codes(lambda: LLAMA.geometry(changed), errors.CheckpointError) == ["bad-config"]


def test_a_context_beyond_the_models_is_refused(zoo: Zoo) -> None:
    checkpoint = zoo.traced("llama").checkpoint
    assert LLAMA.components(checkpoint, 256, {})
    assert codes(lambda: LLAMA.components(checkpoint, 257, {}), errors.UsageError) == ["context-too-long"]


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("name", ["type", "rope_type"])
@pytest.mark.parametrize("kind", ["dynamic", "longrope", "su", "new"])
def test_rotary_tables_that_depend_on_the_length_are_refused(key: str, name: str, kind: str, zoo: Zoo) -> None:
    checkpoint = with_config(zoo.traced("llama").checkpoint, **{key: {name: kind, "factor": 2.0}})
    assert codes(lambda: LLAMA.components(checkpoint, 8, {}), errors.ExportError) == ["rope-not-static"]


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rotary_tables_are_the_models_own(rope: dict[str, Any], tmp_path: Path) -> None:
    import torch

    config = {**LLAMA.tiny, "num_hidden_layers": 1, "rope_scaling": rope}
    folder = write_checkpoint(tmp_path / "model", config)
    (component,) = LLAMA.components(open_checkpoint(folder), 200, {})
    tables = component.constants()
    cos, sin = oracle(folder).model.rotary_emb(torch.zeros(1), torch.arange(200)[None])
    half = cos.shape[-1] // 2
    np.testing.assert_allclose(tables["rope.cos"], cos[0, :, :half].numpy(), atol=1e-6)
    np.testing.assert_allclose(tables["rope.sin"], sin[0, :, :half].numpy(), atol=1e-6)
    plain = LLAMA.components(with_config(open_checkpoint(folder), rope_scaling=None), 200, {})[0].constants()
    assert np.abs(plain["rope.cos"] - tables["rope.cos"]).max() > 0.1


def test_a_window_shorter_than_the_context_is_refused(zoo: Zoo) -> None:
    windowed = {"use_sliding_window": True, "sliding_window": CONTEXT - 1, "max_window_layers": 0}
    checkpoint = with_config(zoo.traced("qwen2").checkpoint, **windowed)
    (component,) = families.find("qwen2").components(checkpoint, CONTEXT, {})
    assert codes(lambda: trace(component, checkpoint.tensors), errors.ExportError) == ["attention-not-plain"]


def test_missing_tensors_and_wrong_shapes_are_reported_together(zoo: Zoo) -> None:
    checkpoint = zoo.traced("llama").checkpoint
    tensors = dict(checkpoint.tensors)
    del tensors["model.norm.weight"], tensors["model.layers.2.mlp.up_proj.weight"]
    narrow = tensors["model.layers.1.self_attn.k_proj.weight"]
    tensors[narrow.name] = replace(narrow, shape=(8, 64))
    (component,) = LLAMA.components(replace(checkpoint, tensors=tensors), 8, {})
    with pytest.raises(errors.CheckpointError) as caught:
        component.stages()
    found = {(finding.code, finding.where) for finding in caught.value.findings}
    assert {code for code, _ in found} == {"missing-tensor", "shape-mismatch"}
    text = " ".join(finding.what + finding.where + finding.why for finding in caught.value.findings)
    assert len(caught.value.findings) == 3
    assert all(name in text for name in ("model.norm.weight", "layers.2.mlp.up_proj", "layers.1.self_attn.k_proj"))


def test_unused_are_a_tied_head_and_recomputed_buffers(zoo: Zoo) -> None:
    checkpoint = zoo.traced("llama").checkpoint
    table = checkpoint.tensors["model.embed_tokens.weight"]
    extra = {"lm_head.weight": table, "model.layers.0.self_attn.rotary_emb.inv_freq": table, "model.new": table}
    checkpoint = replace(checkpoint, tensors={**checkpoint.tensors, **extra})
    assert LLAMA.unused(checkpoint) == extra.keys() - {"model.new"}
    untied = with_config(checkpoint, tie_word_embeddings=False)
    assert LLAMA.unused(untied) == {"model.layers.0.self_attn.rotary_emb.inv_freq"}


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_family_uses_and_leaves_is_its_whole_checkpoint(name: str, zoo: Zoo) -> None:
    found = zoo.traced(name)
    used = {ref.name for model in found.parts.values() for ref in model.weights.values()}
    assert used | families.find(name).unused(found.checkpoint) == found.checkpoint.tensors.keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_named_after_its_file_and_stays_in_the_dialect(name: str) -> None:
    family = families.find(name)
    assert family.model_type == family.tiny["model_type"] == name
    assert family.ops <= OPS.keys()


def test_an_unknown_model_type_names_the_known_ones() -> None:
    with pytest.raises(errors.CheckpointError) as caught:
        families.find("lama")
    (finding,) = caught.value.findings
    assert finding.code == "unknown-model-type"
    assert all(name in finding.why + finding.fix for name in FAMILIES)


def offer(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Pretend that an installed package offers a family of this name."""
    point = EntryPoint(name, "edgeexport.families.llama", "edgeexport.families")
    monkeypatch.setattr(families, "entry_points", lambda group: [point] if group == point.group else [])


def test_a_package_adds_a_family(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, "smollm")
    assert families.find("smollm") is LLAMA


def test_a_package_cannot_replace_a_family(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, "llama")
    assert codes(families.known, errors.ToolError) == ["duplicate-plugin"]
