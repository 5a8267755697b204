"""The directory that MNN-LLM loads: what its two configuration files say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from edgeexport.backends.mnn_file import scale_bytes
from edgeexport.backends.mnn_names import TOKENIZER
from edgeexport.core import CanonicalModel, StoredWeight

WEIGHT_BYTES = "edgeexport_weight_bytes"
"""Our own key: MNN reads a weight file that ends early as zeros, so that its size is written down."""


def llm_config(embedding: StoredWeight, layers: int, weight_bytes: int, *, turned: bool = False) -> dict[str, Any]:
    """llm_config.json: the model's facts. Embeddings are looked up in the plan's format, in the weight file itself or
    in a file of their own; MNN calls them tied, whether the head is the same tensor or not. `turned` by M-RoPE.

    Source: MNN transformers/llm/engine/src/llmconfig.hpp and diskembedding.cpp.
    """
    rows, width = embedding.shape
    fmt = embedding.format
    at = embedding.scales_offset if fmt.integer else embedding.offset
    return {
        "hidden_size": width,
        "layer_nums": layers,
        "attention_mask": "float",
        "attention_type": "full",
        "key_value_shape": [],
        "is_visual": False,
        "is_mrope": turned,
        "tie_embeddings": {
            "weight_offset": embedding.offset,
            "alpha_offset": at,
            "alpha_size": scale_bytes(fmt, (rows, width)),
            "quant_bit": fmt.bits,
            "quant_block": fmt.block,
            "alpha_dtype": "fp16",
        },
        WEIGHT_BYTES: weight_bytes,
    }


def run_config(graph: str, weights: str, embedding: str, context: int, threads: int) -> dict[str, Any]:
    """config.json: the files, and how to run them. An application may change the latter. MNN reads the file of the
    `embedding` where it begins at offset 0, and the weights else.

    `dynamic_option` 2 rounds activations to int8 with a scale per block of the weights instead of one per token. On
    SmolLM2-135M that takes the rounding's KL from 0.031 to 0.003 for int4-b32, from 0.025 to 0.003 for int8.
    """
    return {
        "llm_model": graph,
        "llm_weight": weights,
        "embedding_file": embedding,
        "tokenizer_file": TOKENIZER,
        "backend_type": "cpu",
        "thread_num": threads,
        "precision": "low",
        "memory": "low",
        "dynamic_option": 2,
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
