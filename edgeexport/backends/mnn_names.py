"""What MNN-LLM calls its files, and the inputs and outputs of a decoder."""

from __future__ import annotations

EMBEDS, MASK, POSITIONS, LAST, LOGITS = "input_ids", "attention_mask", "position_ids", "logits_index", "logits"
"""float32 [T,1,hidden], in truth embeddings; float32 [1,1,T,T]; int32 [1,T] or [3,T]; int32 [1], where logits begin;
float32 [1,n,V]."""
CONFIG, LLM_CONFIG, TOKENIZER = "config.json", "llm_config.json", "tokenizer.txt"
STEP = "step"
"""Name of the one signature."""
