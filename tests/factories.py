"""Writers of tiny checkpoints for the tests, by the other tools' own libraries: transformers, safetensors, gguf."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

BYTE_ALPHABET_SIZE = 256
MERGES = ["Ġ t", "h e", "Ġt he", "i n", "r e", "1 2", "Ġ Ġ"]
SPECIAL = ["<|begin|>", "<|end|>", "<|user|>"]

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"head_dim": 16},
    "qwen3": {"head_dim": 32},
    "glm4": {"head_dim": 16, "pad_token_id": 0, "eos_token_id": 1},
}
"""What differs between the tiny models of the families."""


def tiny_model(model_type: str, **changes: Any) -> Any:
    """A random model of transformers: 2 layers, hidden 64, 4 heads of which 2 have keys, vocabulary 288."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {
        "vocab_size": 288,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **settings | SHAPES[model_type] | changes)
    )
    with torch.no_grad():  # norms of ones and biases of zeros would hide a mix-up
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return model.eval()


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k: `LlamaModel.permute`."""
    half = weights.shape[0] // heads // 2
    return weights.reshape(heads, 2, half, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes in byte-level BPE."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return list(bytes_to_unicode().values())


def vocabulary(size: int) -> tuple[list[str], list[int]]:
    """A vocabulary of bytes, merges, special tokens and, up to `size`, fillers; and their types."""
    tokens = [*byte_alphabet(), *(merge.replace(" ", "") for merge in MERGES), *SPECIAL, "<think>"]
    types = [1] * (BYTE_ALPHABET_SIZE + len(MERGES)) + [3] * len(SPECIAL) + [4]
    fillers = [f"[PAD{index}]" for index in range(len(tokens), size)]
    return tokens + fillers, types + [5] * len(fillers)


def write_gguf(
    path: Path,
    model: Any,
    quantize: str = "F32",
    pre: str = "gpt-2",
    merges: list[str] | None = None,
    extra: dict[str, Any] | None = None,
) -> None:
    """A model as llama.cpp's converter would write it. Matrices are stored as `quantize`, vectors as F32."""
    import gguf
    from gguf.quants import quantize as encode

    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == config.model_type)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    tokens, types = vocabulary(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(MERGES if merges is None else merges)
    writer.add_bos_token_id(tokens.index("<|begin|>"))
    writer.add_eos_token_id(tokens.index("<|end|>"))
    writer.add_eot_token_id(tokens.index("<|user|>"))
    writer.add_chat_template("{{ messages[0].content }}")
    for key, value in (extra or {}).items():
        if isinstance(value, np.ndarray):
            writer.add_tensor(key, value)
        else:
            {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[
                type(value)
            ](key, value)
    kind = gguf.GGMLQuantizationType[quantize]
    for name, tensor in model.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        base, _, suffix = name.rpartition(".")
        data = tensor.float().numpy()
        if config.model_type == "llama" and base.endswith(("q_proj", "k_proj")):
            data = permute(data, config.num_attention_heads if base.endswith("q_proj") else config.num_key_value_heads)
        stored = f"{names.get_name(base)}.{suffix}"
        if data.ndim == 1 or quantize == "F32":
            writer.add_tensor(stored, np.ascontiguousarray(data, np.float32))
        else:
            writer.add_tensor(stored, encode(np.ascontiguousarray(data, np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_safetensors(path: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    """A file with this header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def with_tokenizer(folder: Path) -> Path:
    """A byte-level tokenizer whose ids 0-255 are bytes, beside the model in `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder
