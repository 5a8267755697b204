"""Names of a .tflite file's signatures, inputs and outputs, which are LiteRT-LM's, and the canonical ones behind them.

Source: LiteRT-LM 0.18, runtime/components/model_resources and the converters that write for it.
"""

from __future__ import annotations

from collections.abc import Mapping

from edgeexport.core import Dim, TensorSpec

DECODE = "decode"
"""One token, with its logits."""
PREFILL = "prefill_"
"""A piece of a prompt, its length behind the name: writes the cache, and gives no logits."""
WINDOW = "window"
"""`window_512_decode` is `decode` that attends to the first 512 slots alone. The names begin like no other, since
LiteRT-LM takes every signature that begins with `prefill`."""
STEP = "step"
"""Name of the signature of a component that has no variants."""

CANONICAL: Mapping[str, str] = {
    "tokens": "input_ids",
    "embeddings": "inputs_embeds",
    "input_pos": "position",
}
"""An input's name to the canonical one. A cache's, `kv_cache_k_0`, stands for `past_key.0` and `present_key.0`."""
GIVEN = {canonical: name for name, canonical in CANONICAL.items()}
CACHE = "kv_cache_"
SLICE = "kv_slice_"
"""`kv_slice_k_0` is what a call adds to `kv_cache_k_0`, where the loader and not the graph writes the cache."""
COUNT = "_count"
"""Behind the name of an input that is padded: how many of its rows count."""


def cache_name(canonical: str) -> str:
    """`kv_cache_k_0` for `past_key.0` and `present_key.0`."""
    kind, layer = canonical.rsplit(".", 1)
    return f"{CACHE}{'k' if kind.endswith('key') else 'v'}_{layer}"


def slice_name(name: str) -> str:
    """`kv_slice_k_0` for `kv_cache_k_0`; any other name as it is."""
    return SLICE + name.removeprefix(CACHE) if name.startswith(CACHE) else name


def given_name(canonical: str, state: Mapping[str, str]) -> str:
    """The file's name of a canonical input or output; `state` pairs the caches."""
    if canonical in state or canonical in state.values():
        return cache_name(canonical)
    return GIVEN.get(canonical, canonical)


def canonical_name(name: str, *, output: bool = False) -> str:
    """The inverse: what an input, or an `output`, stands for."""
    if name.startswith((CACHE, SLICE)):
        kind, layer = name.removeprefix(CACHE).removeprefix(SLICE).split("_", 1)
        return f"{'present' if output else 'past'}_{'key' if kind == 'k' else 'value'}.{layer}"
    return CANONICAL.get(name, name)


def length_of(signature: str) -> int:
    """Tokens that a signature of a component over tokens takes; 0 for another one."""
    name = signature.split("_", 2)[-1] if window_of(signature) else signature
    if name == DECODE:
        return 1
    digits = name.removeprefix(PREFILL)
    return int(digits) if name.startswith(PREFILL) and digits.isdecimal() else 0


def window_of(signature: str) -> int:
    """Slots of the cache that a signature attends to; 0 where it attends to all."""
    parts = signature.split("_", 2)
    return int(parts[1]) if len(parts) == 3 and parts[0] == WINDOW and parts[1].isdecimal() else 0


def canonical_spec(spec: TensorSpec, length: int, *, output: bool) -> TensorSpec:
    """What an input or output of a signature over `length` tokens stands for: int64 for indices, the number of tokens
    symbolic, and of the tokens' positions, one each, the first. What a call adds to a
    cache stands for the cache after it."""
    name = canonical_name(spec.name, output=output)
    dtype = "int64" if spec.dtype == "int32" else spec.dtype
    if name == "position":
        return TensorSpec(name, dtype, (1,))
    if not length or spec.name.startswith(CACHE) or name == "logits":
        return TensorSpec(name, dtype, spec.shape)
    axis = 2 if name == "rope_positions" or spec.name.startswith(SLICE) else 1
    over_tokens = len(spec.shape) > axis and spec.shape[axis] == length
    shape = tuple(Dim("T", 0, 0) if k == axis and over_tokens else size for k, size in enumerate(spec.shape))
    return TensorSpec(name, dtype, shape)
