"""A config.json that anyone may have written, on its way into transformers: refused by name, or without effect."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graphs import SHAPES, Zoo, oracle, reference_logits
from mutation import mutated_json

from edgeexport import errors, families, strict_json, targets
from edgeexport.core import Checkpoint, Example
from edgeexport.families import configured
from edgeexport.families.settled import settle
from edgeexport.plan import plan

FAMILIES = sorted(families.known())
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
LEFT_OUT: Any = object()


def changed(zoo: Zoo, name: str, **values: Any) -> Checkpoint:
    """A tiny checkpoint with other values in its config.json; `a__b` is b in the section a."""
    checkpoint = zoo.traced(name).checkpoint
    config: dict[str, Any] = copy.deepcopy(dict(checkpoint.config))
    for place, value in values.items():
        *sections, key = place.split("__")
        inner = config
        for section in sections:
            inner = inner[section]
        if value is LEFT_OUT:
            inner.pop(key, None)
        else:
            inner[key] = value
    return replace(checkpoint, config=config)


def walk(checkpoint: Checkpoint, shapes: Any = SHAPES) -> None:
    """Everything that a build makes of a configuration before it reads a weight."""
    family = families.find(checkpoint.model_type)
    checkpoint = settle(checkpoint, family)
    for component in family.components(checkpoint, 8, shapes):
        component.stages()
        component.constants()
    family.preprocess(checkpoint, shapes)
    family.oracle(checkpoint.config)


@pytest.mark.parametrize(
    ("name", "key", "values"),
    [
        ("llama", "pad_token_id", {"pad_token_id": 320}),
        ("llama", "hidden_act", {"hidden_act": "swiglu"}),
        ("llama", "hidden_act", {"hidden_act": ["silu"]}),
        ("llama", "rms_norm_eps", {"rms_norm_eps": "1e-05"}),
        ("llama", "max_position_embeddings", {"max_position_embeddings": 256.0}),
        ("llama", "tie_word_embeddings", {"tie_word_embeddings": "false"}),
        ("llama", "rope_parameters", {"rope_parameters": LLAMA3}),
        ("llama", "rope_theta", {"rope_theta": "10000.0"}),
        ("llama", "rope_type", {"rope_parameters": {"rope_type": ["default"]}}),
        ("llama", "rope_scaling", {"rope_scaling": ["linear", 2.0]}),
        ("llama", "num_attention_heads", {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": LEFT_OUT}),
        ("llama", "num_attention_heads", {"num_attention_heads": 128, "head_dim": LEFT_OUT}),
        ("llama", "attention_bias", {"attention_bias": 3}),
        ("llama", "eos_token_id", {"eos_token_id": "257"}),
        ("qwen2", "layer", {"layer_types": ["full_attention"]}),
        ("qwen3", "layer_types", {"layer_types": ["full_attention", "of a new kind"]}),
        ("glm4", "partial_rotary_factor", {"partial_rotary_factor": "half"}),
        ("glm4v", "partial_rotary_factor", {"text_config__rope_parameters__partial_rotary_factor": "half"}),
        ("glm4v", "vocab_size", {"text_config__vocab_size": "320"}),
        ("glm4v", "tie_word_embeddings", {"text_config__tie_word_embeddings": "yes"}),
        ("glm4v", "hidden_act", {"vision_config__hidden_act": "swiglu"}),
        ("glm4v", "depth", {"vision_config__depth": "2"}),
        ("autoglm_phone", "hidden_act", {"text_config__hidden_act": "swiglu"}),
        ("autoglm_phone", "model_type", {"text_config__model_type": "no model of this world"}),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_what_transformers_would_not_take_is_named(name: str, key: str, values: dict[str, Any], zoo: Zoo) -> None:
    with pytest.raises(errors.EdgeExportError) as caught:
        walk(changed(zoo, name, **values))
    finding = caught.value.findings[0]
    assert (finding.code, caught.value.exit_code) == ("bad-config", 3)
    assert key in finding.where


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("llama", {"num_hidden_layers": 10**9}),
        ("llama", {"num_hidden_layers": 1024}),
        ("llama", {"num_labels": 10**9, "num_hidden_layers": 10**9}),
        ("llama", {"head_dim": 10**9}),
        ("llama", {"hidden_size": 10**9, "num_attention_heads": 1, "head_dim": LEFT_OUT}),
        ("llama", {"num_attention_heads": 10**9, "num_key_value_heads": 10**9}),
        ("glm4v", {"vision_config__depth": 10**9}),
        ("glm4v", {"vision_config__image_size": 10**9}),
        ("glm4v", {"text_config__num_hidden_layers": 10**9}),
        ("autoglm_phone", {"text_config__num_hidden_layers": 10**9}),
    ],
    ids=lambda given: given if isinstance(given, str) else " ".join(given),
)
def test_a_model_that_is_too_large_to_be_one_costs_nothing(name: str, values: dict[str, Any], zoo: Zoo) -> None:
    began = time.process_time()
    with pytest.raises(errors.CheckpointError):
        walk(changed(zoo, name, **values))
    assert time.process_time() - began < 60


def test_layers_that_config_json_announces_are_bounded_before_torch(checkpoint: Path, tmp_path: Path) -> None:
    import json
    import shutil

    folder = shutil.copytree(checkpoint, tmp_path / "deep")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**9}))
    with pytest.raises(errors.CheckpointError) as caught:
        plan(str(folder), "host-ort")
    assert "num_hidden_layers" in caught.value.findings[0].where


NEUTRAL_VALUES: dict[str, Any] = {
    "attn_implementation": "flash_attention_2",
    "_attn_implementation": "flash_attention_2",
    "return_dict": False,
    "torchscript": True,
    "output_attentions": True,
    "output_hidden_states": True,
    "use_cache": False,
    "num_labels": 10**9,
    "id2label": {"zero": 1},
    "problem_type": "of a new kind",
    "dtype": "float3",
    "chunk_size_feed_forward": "none",
}


@pytest.mark.parametrize("name", ["llama", "glm4v"])
def test_what_means_nothing_to_arithmetic_changes_nothing(name: str, zoo: Zoo) -> None:
    """The logits are those of transformers for the folder without these keys."""
    found = zoo.traced(name)
    tokens = np.random.default_rng(7).integers(3, 200, 9).astype(np.int64)
    wanted = reference_logits(oracle(found.checkpoint.path), tokens)
    checkpoint = changed(zoo, name, **NEUTRAL_VALUES)
    walk(checkpoint)
    made = families.find(name).oracle(checkpoint.config)
    state = oracle(found.checkpoint.path).state_dict()
    made.model.load_state_dict(state, assign=True, strict=False)
    with torch.no_grad():
        [got] = made.logits([Example(tokens)], [0])
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_a_fault_of_ours_is_not_said_of_the_configuration(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeexport.families import stages

    def broken(*_: Any) -> Any:
        raise KeyError("hidden_act")

    monkeypatch.setattr(stages, "rope_tables", broken)
    with pytest.raises(KeyError):
        walk(zoo.traced("llama").checkpoint)


def test_every_class_of_transformers_has_the_keys_that_are_dropped_for_other_ends() -> None:
    """None of the dropped keys is a field by which a family's own class computes."""
    from transformers import AutoConfig, PreTrainedConfig

    for name in sorted(set(FAMILIES) - {"autoglm_phone"}):
        kind = type(AutoConfig.for_model(name))
        own = set(kind.__annotations__) - set(PreTrainedConfig.__annotations__)
        assert own & configured.NEUTRAL <= {"use_cache", "initializer_range"}


@pytest.mark.parametrize("name", FAMILIES)
def test_mutated_configurations_are_refused_or_built(name: str, zoo: Zoo) -> None:
    checkpoint = zoo.traced(name).checkpoint
    shapes = targets.load("android-ort").shapes
    refused = 0
    for seed in range(25):
        config = mutated_json(dict(checkpoint.config), seed)
        if not isinstance(config, dict) or not _writable(config):
            continue
        try:
            walk(replace(checkpoint, config={**config, "model_type": name}), shapes)
        except errors.EdgeExportError as problem:
            assert problem.exit_code != 1, seed
            refused += 1
        except Exception as problem:
            raise AssertionError(f"seed {seed}: {type(problem).__name__}: {problem}") from problem
    assert refused


def _writable(config: Any) -> bool:
    """Whether the reader of config.json lets it through."""
    import json

    encode: Callable[[Any], str] = json.dumps
    try:
        strict_json.parse(encode(config).encode(), unique=False)
    except (ValueError, RecursionError):
        return False
    return True
