"""The directory that MNN-LLM loads: what its two configuration files say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from edgeexport.backends.mnn_names import TOKENIZER
from edgeexport.core import CanonicalModel, StoredWeight

WEIGHT_BYTES = "edgeexport_weight_bytes"
"""Our own key: MNN reads a weight file that ends early as zeros, so that its size is written down."""


def llm_config(model: CanonicalModel, embedding: StoredWeight, weight_bytes: int) -> dict[str, Any]:
    """llm_config.json: the model's facts. Embeddings are looked up in the weight file itself, in the plan's format; MNN
    calls them tied, whether the head is the same tensor or not.

    Source: MNN transformers/llm/engine/src/llmconfig.hpp and diskembedding.cpp.
    """
    rows, width = embedding.shape
    fmt = embedding.format
    scales = 2 * rows * (width // fmt.block if fmt.block else 1) if fmt.integer else 0
    at = embedding.scales_offset if fmt.integer else embedding.offset
    return {
        "hidden_size": width,
        "layer_nums": len(model.state) // 2,
        "attention_mask": "float",
        "attention_type": "full",
        "key_value_shape": [],
        "is_visual": False,
        "is_mrope": False,
        "tie_embeddings": {
            "weight_offset": embedding.offset,
            "alpha_offset": at,
            "alpha_size": scales,
            "quant_bit": fmt.bits,
            "quant_block": fmt.block,
            "alpha_dtype": "fp16",
        },
        WEIGHT_BYTES: weight_bytes,
    }


def run_config(graph: str, weights: str, context: int, threads: int) -> dict[str, Any]:
    """config.json: the files, and how to run them. An application may change the latter."""
    return {
        "llm_model": graph,
        "llm_weight": weights,
        "tokenizer_file": TOKENIZER,
        "backend_type": "cpu",
        "thread_num": threads,
        "precision": "low",
        "memory": "low",
        "sampler_type": "greedy",
        "max_all_tokens": context,
        "reuse_kv": True,
    }


def context_of(model: CanonicalModel) -> int:
    """Tokens that fit: what the canonical cache has room for, which is what the rotary tables cover."""
    caches = {past for past, _ in model.state}
    size = next(spec.shape[2] for spec in model.inputs if spec.name in caches)
    assert isinstance(size, int), "a cache has a fixed size"
    return size


def as_json(values: Mapping[str, Any]) -> bytes:
    """The file's bytes, the same for the same values."""
    return (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode()
