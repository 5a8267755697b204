"""Write a checkpoint of random weights as transformers would: config, tokenizer, bf16 safetensors in shards.

    python benchmarks/random_checkpoint.py --preset llama-1.1b OUT

For measuring memory and time at sizes nobody wants to download. Streams: 200 MB of memory whatever the
model's size. The same seed gives the same bytes. Needs numpy only.
"""

from __future__ import annotations

import argparse
import json
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from random_presets import PRESETS, Preset

__all__ = ["PRESETS", "bfloat16", "write_checkpoint"]

CHUNK = 1 << 22  # elements made at once: 16 MB of float32
POOL = 33_554_393
"""Random numbers that all weights are cut from, 67 MB: the largest prime below 2^25. No row's width divides a prime, so
that the rows of a matrix larger than the pool all begin elsewhere in it and differ."""
SHARD_BYTES = 5_000_000_000

UInt16 = npt.NDArray[np.uint16]


def write_checkpoint(preset: Preset, out: Path, seed: int = 0, shard_bytes: int = SHARD_BYTES) -> int:
    """Write the checkpoint to the folder `out`, which must not exist. Returns the weights' bytes."""
    out.mkdir(parents=True)
    shards = _split(preset, shard_bytes)
    pool = np.concatenate(list(_normal(POOL, np.random.default_rng(seed))))
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(out / name, tensors, pool)
        weight_map |= dict.fromkeys(tensors, name)
    total = sum(2 * _elements(shape) for _, shape in preset.tensors())
    _write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    for file, document in preset.files.items():
        _write_json(out / file, document)
    _write_json(out / "config.json", preset.config)
    _write_json(out / "generation_config.json", preset.generation)
    _write_json(out / "tokenizer.json", _tokenizer(preset.special))
    _write_json(out / "tokenizer_config.json", preset.tokenizer_config)
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


def _write_shard(path: Path, tensors: Mapping[str, tuple[int, ...]], pool: UInt16) -> None:
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
            for part in _weight(name, shape, pool):
                file.write(part.data)


def _weight(name: str, shape: tuple[int, ...], pool: UInt16) -> Iterator[UInt16]:
    """The tensor in pieces of the pool, from a place that its name decides; a norm's scale is around 1 instead of 0."""
    start, left = zlib.crc32(name.encode()) % pool.size, _elements(shape)
    if "norm" in name and name.endswith(".weight"):
        yield from _normal(left, np.random.default_rng(start), center=1)
        return
    while left:
        piece = pool[start : start + left]
        yield piece
        left -= piece.size
        start = 0


def _normal(count: int, random: np.random.Generator, center: float = 0) -> Iterator[UInt16]:
    """Normal bfloat16 numbers with a deviation of 0.02, in pieces."""
    for begin in range(0, count, CHUNK):
        part = random.standard_normal(min(count - begin, CHUNK), dtype=np.float32)
        np.multiply(part, np.float32(0.02), out=part)
        np.add(part, np.float32(center), out=part)
        yield bfloat16(part)


def bfloat16(values: npt.NDArray[np.float32]) -> UInt16:
    """The bits of finite float32 numbers rounded to bfloat16, half to even."""
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _elements(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _tokenizer(special: Mapping[str, int]) -> dict[str, Any]:
    """A byte-level tokenizer without merges: ids 0-255 are bytes, then come the special tokens."""
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
        "added_tokens": [{"id": number, "content": content, **flags} for content, number in special.items()],
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
            "vocab": {alphabet[byte]: byte for byte in range(256)} | dict(special),
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
    start = time.perf_counter()
    total = write_checkpoint(PRESETS[options.preset], options.out, options.seed, options.shard_bytes)
    speed = total / (time.perf_counter() - start)
    print(f"{options.out}: {total / 1e9:.2f} GB of weights, {speed / 1e9:.2f} GB/s")


if __name__ == "__main__":
    main()
