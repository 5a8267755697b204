"""What MNN-LLM calls its files, and the inputs and outputs of a decoder."""

from __future__ import annotations

EMBEDS, MASK, POSITIONS, LAST, LOGITS = "input_ids", "attention_mask", "position_ids", "logits_index", "logits"
"""float32 [T,1,hidden], in truth embeddings; float32 [1,1,T,T]; int32 [1,T] or [3,T]; int32 [1], where logits begin;
float32 [1,n,V]."""
CONFIG, LLM_CONFIG, TOKENIZER = "config.json", "llm_config.json", "tokenizer.txt"
STEP = "step"
"""Name of the one signature."""
EMBED = "embed"
"""The component whose table a decoder's embeddings come from, where that is one of its own."""


def graph_file(component: str, variant: str = "") -> str:
    """The file of a component's graph."""
    return f"{component}.{variant}.mnn" if variant else f"{component}.mnn"


def weight_file(component: str) -> str:
    """The file of a component's weights, which its variants share."""
    return f"{component}.mnn.weight"


def lookup_config(component: str) -> str:
    """The configuration of a component that is a table of embeddings, and MNN-LLM's to look up."""
    return f"{component}.json"
