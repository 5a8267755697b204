"""Control by the real loader: what the ladder measures against answers as `from_pretrained` of the same folder does.

Each oddity is one that public checkpoints have. Nothing of ours stands between a folder and the expected logits.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import with_tokenizer
from graphs import write_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from edgeexport import build, families, open_bundle
from edgeexport.checkpoint import WeightReader
from edgeexport.core import Array, Example
from edgeexport.families.autoglm_phone.config import MODEL_TYPE
from edgeexport.parity.reference import Reference

State = dict[str, torch.Tensor]
Oddity = Callable[[dict[str, Any], State, families.Family], State]

THEIRS = sorted(set(families.known()) - {MODEL_TYPE})
"""Families whose models are transformers' own."""


def other_head(state: State, family: families.Family) -> State:
    """A head of its own, beside the table."""
    generator = torch.Generator().manual_seed(5)
    return {**state, family.head: torch.randn(state[family.table].shape, generator=generator) * 0.05}


def tie(config: dict[str, Any], tied: bool) -> None:
    for values in (config, config.get("text_config")):
        if values is not None:
            values["tie_word_embeddings"] = tied


def tied_by_word_alone(config: dict[str, Any], state: State, family: families.Family) -> State:
    tie(config, True)
    return other_head(state, family)


def tied_and_both_stored(config: dict[str, Any], state: State, family: families.Family) -> State:
    tie(config, True)
    return {**state, family.head: state[family.table].clone()}


def tied_and_only_the_head_stored(config: dict[str, Any], state: State, family: families.Family) -> State:
    tie(config, True)
    return {name: value for name, value in other_head(state, family).items() if name != family.table}


def tied_and_only_the_table_stored(config: dict[str, Any], state: State, family: families.Family) -> State:
    tie(config, True)
    return {name: value for name, value in state.items() if name != family.head}


def not_tied(config: dict[str, Any], state: State, family: families.Family) -> State:
    tie(config, False)
    return other_head(state, family)


def not_tied_and_equal(config: dict[str, Any], state: State, family: families.Family) -> State:
    tie(config, False)
    return {**state, family.head: state[family.table].clone()}


def nothing_said_of_tying(config: dict[str, Any], state: State, family: families.Family) -> State:
    for values in (config, config.get("text_config", {})):
        values.pop("tie_word_embeddings", None)
    return other_head(state, family)


def tied_in_the_text_config_alone(config: dict[str, Any], state: State, family: families.Family) -> State:
    tie(config, False)
    config.get("text_config", {})["tie_word_embeddings"] = True
    return other_head(state, family)


def a_base_models_names(config: dict[str, Any], state: State, family: families.Family) -> State:
    tie(config, True)
    return {name.removeprefix(family.prefix): value for name, value in state.items() if name != family.head}


ODDITIES: tuple[Oddity, ...] = (
    tied_by_word_alone, tied_and_both_stored, tied_and_only_the_head_stored, tied_and_only_the_table_stored, not_tied,
    not_tied_and_equal, nothing_said_of_tying, tied_in_the_text_config_alone, a_base_models_names,
)  # fmt: skip


def written(folder: Path, model_type: str, oddity: Oddity) -> Path:
    """A tiny checkpoint with this oddity."""
    import json

    family = families.find(model_type)
    config: dict[str, Any] = copy.deepcopy(dict(family.tiny))
    made = write_checkpoint(folder / "made", config)
    state = load_file(made / "model.safetensors")
    state.setdefault(family.head, state[family.table].clone())
    kept = oddity(config, state, family)
    save_file({name: value.contiguous() for name, value in kept.items()}, made / "model.safetensors", {"format": "pt"})
    (made / "config.json").write_text(json.dumps(config))
    return made


def theirs(folder: Path, ids: Array) -> Array:
    """Logits [T, V] of what `from_pretrained` loads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = AutoConfig.from_pretrained(folder)
        auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
        model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return np.asarray(model(input_ids=torch.from_numpy(ids)[None]).logits[0].numpy())


@pytest.mark.parametrize("oddity", ODDITIES, ids=lambda oddity: oddity.__name__)
@pytest.mark.parametrize("model_type", THEIRS)
def test_the_oracle_answers_as_from_pretrained_does(model_type: str, oddity: Oddity, tmp_path: Path) -> None:
    folder = written(tmp_path, model_type, oddity)
    ids = np.random.default_rng(3).integers(3, 200, 12).astype(np.int64)
    checkpoint, family = families.open_model(folder)
    with WeightReader() as reader:
        tensors = checkpoint.tensors
        reference = Reference(
            family.oracle(checkpoint.config), lambda name, start, stop: reader.rows(tensors[name], start, stop)
        )
        [answer] = reference.answers([Example(ids)], [0])
    np.testing.assert_allclose(answer.logits, theirs(folder, ids), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("model_type", THEIRS)
def test_what_config_json_leaves_out_is_what_the_class_says(model_type: str) -> None:
    family = families.find(model_type)
    config: dict[str, Any] = copy.deepcopy(dict(family.tiny))
    inner = config.get("text_config", config)
    inner |= {"num_attention_heads": 64, "hidden_size": 4096}
    for left_out in ("head_dim", "num_key_value_heads", "tie_word_embeddings"):
        inner.pop(left_out, None)
        config.pop(left_out, None)
    values = {key: value for key, value in config.items() if key != "model_type"}
    text = AutoConfig.for_model(model_type, **copy.deepcopy(values)).get_text_config()
    found = family.geometry(family.completed(config))
    assert found.kv_heads == text.num_key_value_heads
    assert found.head_dim == (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    assert found.tied == bool(getattr(text, "tie_word_embeddings", False))


@pytest.mark.parametrize(
    "oddity", [tied_by_word_alone, tied_and_only_the_head_stored, a_base_models_names], ids=lambda each: each.__name__
)
def test_a_bundle_answers_as_from_pretrained_does(oddity: Oddity, tmp_path: Path) -> None:
    folder = with_tokenizer(written(tmp_path / "model", "llama", oddity))
    result = build(str(folder), "host-ort", tmp_path / "out", quant="fp32", context=64, parity="L5")
    codes = [finding.code for finding in result.findings]
    assert ("head-not-tied" in codes) == (oddity is tied_by_word_alone)
    ids = np.random.default_rng(3).integers(3, 200, 12).astype(np.int64)
    with open_bundle(result.bundle).session() as session:
        got = session.prefill(ids)
    np.testing.assert_allclose(got, theirs(folder, ids)[-1], rtol=1e-3, atol=1e-3)
