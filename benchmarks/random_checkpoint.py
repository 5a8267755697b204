"""Write a checkpoint of random weights as transformers would: config, tokenizer, bf16 safetensors in shards.

    python benchmarks/random_checkpoint.py --preset llama-1.1b OUT

For measuring memory and time at sizes nobody wants to download. Streams: a few tens of megabytes of memory whatever
the model's size. The same seed gives the same bytes. Needs numpy only.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

CHUNK = 1 << 22  # elements made at once: 16 MB of float32
SHARD_BYTES = 2 << 30


@dataclass(frozen=True)
class Group:
    """Tensors with a common prefix, repeated `count` times; `{}` in the prefix is the repetition's number."""

    prefix: str
    count: int
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Preset:
    """A model: its config.json and its tensors in file order."""

    config: Mapping[str, Any]
    groups: tuple[Group, ...]

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor's name and shape."""
        for group in self.groups:
            for index in range(group.count):
                for name, shape in group.shapes.items():
                    yield group.prefix.format(index) + name, shape


def llama(hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, vocab: int, context: int) -> Preset:
    """A Llama of these sizes with an lm_head of its own."""
    head_dim = hidden // heads
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "dtype": "bfloat16",
    }
    layer = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (kv_heads * head_dim, hidden),
        "self_attn.v_proj.weight": (kv_heads * head_dim, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
    }
    return Preset(
        config,
        (
            Group("model.", 1, {"embed_tokens.weight": (vocab, hidden)}),
            Group("model.layers.{}.", layers, layer),
            Group("", 1, {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}),
        ),
    )


PRESETS = {
    "llama-1.1b": llama(2048, 22, 32, 4, 5632, 32000, 2048),
    "llama-tiny": llama(64, 2, 4, 2, 128, 320, 128),
}


def write_checkpoint(preset: Preset, out: Path, seed: int = 0, shard_bytes: int = SHARD_BYTES) -> int:
    """Write the checkpoint to the folder `out`, which must not exist. Returns the weights' bytes."""
    out.mkdir(parents=True)
    shards = _split(preset, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(out / name, tensors, seed)
        weight_map |= dict.fromkeys(tensors, name)
    total = sum(2 * _elements(shape) for _, shape in preset.tensors())
    _write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    _write_json(out / "config.json", preset.config)
    _write_json(out / "generation_config.json", {"bos_token_id": 256, "eos_token_id": 257, "do_sample": False})
    _write_json(out / "tokenizer.json", _tokenizer())
    _write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "chat_template": "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}",
        },
    )
    return total


def _split(preset: Preset, shard_bytes: int) -> list[dict[str, tuple[int, ...]]]:
    """Tensors in order, cut into shards of at most `shard_bytes` (a larger tensor gets a shard of its own)."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in preset.tensors():
        nbytes = 2 * _elements(shape)
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += nbytes
    return shards


def _write_shard(path: Path, tensors: Mapping[str, tuple[int, ...]], seed: int) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors.items():
        end = offset + 2 * _elements(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in tensors.items():
            for part in _weight(name, shape, seed):
                file.write(part.data)


def _weight(name: str, shape: tuple[int, ...], seed: int) -> Iterator[npt.NDArray[np.uint16]]:
    """The tensor in pieces: normal with deviation 0.02, around 1 for norms and around 0 for everything else."""
    random = np.random.default_rng([seed, zlib.crc32(name.encode())])
    center = np.float32(1 if "norm" in name else 0)
    left = _elements(shape)
    while left:
        part = random.standard_normal(min(left, CHUNK), dtype=np.float32)
        np.multiply(part, np.float32(0.02), out=part)
        np.add(part, center, out=part)
        yield bfloat16(part)
        left -= part.size


def bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The bits of finite float32 numbers rounded to bfloat16, half to even."""
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _elements(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _tokenizer() -> dict[str, Any]:
    """A byte-level tokenizer without merges: ids 0-255 are bytes, then <s> and </s>."""
    # GPT-2's alphabet: printable bytes stand for themselves, the others for characters from U+0100 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 256 + i, "content": content, **flags} for i, content in enumerate(("<s>", "</s>"))],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {alphabet[byte]: byte for byte in range(256)} | {"<s>": 256, "</s>": 257},
            "merges": [],
        },
    }


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="llama-1.1b")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-bytes", type=int, default=SHARD_BYTES)
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists")
    total = write_checkpoint(PRESETS[options.preset], options.out, options.seed, options.shard_bytes)
    print(f"{options.out}: {total / 1e9:.2f} GB of weights")


if __name__ == "__main__":
    main()
