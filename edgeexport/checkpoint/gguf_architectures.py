"""What each GGUF architecture is called, configured and named in transformers.

Sources: llama.cpp's converters (`conversion/{llama,qwen,glm}.py`) and gguf's `TensorNameMap`, which the tests compare
with. A file that says something this table does not understand is refused: a model that is almost right talks well
enough to be shipped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edgeexport import errors
from edgeexport.checkpoint.gguf import GgufHeader
from edgeexport.checkpoint.weights import WeightReader
from edgeexport.core import Array, RopeUnpermute, TensorRef


@dataclass(frozen=True)
class Architecture:
    """One row of the table. `layers` maps the tensors of a layer; `fixed` is configuration that a GGUF leaves unsaid.

    `interleaved_rope`: the converter reordered the rows of q and k. `partial_rope`: rope.dimension_count may be less
    than a head. `bias_key`: the config key that says whether q has a bias, for architectures that come in both kinds.
    """

    model_type: str
    model_class: str
    layers: Mapping[str, str]
    fixed: Mapping[str, Any]
    interleaved_rope: bool = False
    partial_rope: bool = False
    bias_key: str | None = None


_ATTENTION_AND_NORMS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_down": "mlp.down_proj",
}
_GATED = _ATTENTION_AND_NORMS | {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj"}
_NO_WINDOW = {"use_sliding_window": False, "sliding_window": None}

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        "llama", "LlamaForCausalLM", _GATED, {"mlp_bias": False}, interleaved_rope=True, bias_key="attention_bias"
    ),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _GATED, _NO_WINDOW),
    "qwen3": Architecture(
        "qwen3",
        "Qwen3ForCausalLM",
        _GATED | {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"},
        _NO_WINDOW,
        bias_key="attention_bias",
    ),
    # transformers rotates glm4's neighbouring pairs itself, so no rows are reordered; gate and up are one in both.
    "glm4": Architecture(
        "glm4",
        "Glm4ForCausalLM",
        _ATTENTION_AND_NORMS
        | {
            "ffn_up": "mlp.gate_up_proj",
            "post_attention_norm": "post_self_attn_layernorm",
            "post_ffw_norm": "post_mlp_layernorm",
        },
        {},
        partial_rope=True,
        bias_key="attention_bias",
    ),
}

OUTER = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
HEAD = "output.weight"
ROPE_FACTORS = "rope_freqs.weight"
BIASED = frozenset({"attn_q", "attn_k", "attn_v", "attn_output"})
LAYER_TENSOR = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.([a-z0-9_]+)\.(weight|bias)")

READ_KEYS = frozenset(
    {
        "context_length",
        "embedding_length",
        "block_count",
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "vocab_size",
        "rope.freq_base",
        "rope.dimension_count",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.finetuned",
    }
)
NEUTRAL_KEYS: Mapping[str, Any] = {
    "expert_count": 0,
    "expert_used_count": 0,
    "nextn_predict_layers": 0,
    "attention.causal": True,
    "rope.scale_linear": 1.0,
    "tensor_data_layout": "Meta AI original pth",
}
"""Keys that change nothing as long as they have this value."""


class _Metadata:
    """Typed access to the keys of the file's architecture; raises `gguf-unsupported` for what is missing or odd."""

    def __init__(self, header: GgufHeader, architecture: str) -> None:
        self.header = header
        self.architecture = architecture

    def refuse(self, problem: str) -> errors.CheckpointError:
        return errors.gguf_unsupported(self.header.path, problem)

    def get(self, key: str) -> Any:
        return self.header.metadata.get(f"{self.architecture}.{key}")

    def count(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise self.refuse(f"{self.architecture}.{key} is {value!a:.80}; a positive number is needed")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A positive float. The file has float32; its shortest decimal is what the original config.json said."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, float) or not 0 < value <= float(np.finfo(np.float32).max):
            raise self.refuse(f"{self.architecture}.{key} is {value!a:.80}; a positive number is needed")
        return float(str(np.float32(value)))

    def word(self, key: str) -> str | None:
        """A text; None where the file is silent."""
        value = self.get(key)
        if value is not None and not isinstance(value, str):
            raise self.refuse(f"{self.architecture}.{key} is {value!a:.80}; a text is needed")
        return value

    def token(self, key: str, vocabulary: int) -> int | None:
        value = self.header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < vocabulary:
            raise self.refuse(f"tokenizer.ggml.{key}_token_id is {value!a:.80}; the vocabulary has {vocabulary} tokens")
        return value


def read_model(header: GgufHeader) -> tuple[dict[str, Any], dict[str, Any], dict[str, TensorRef]]:
    """config.json, generation_config.json and the tensors (by transformers' names) of a GGUF file.

    Raises `gguf-architecture`, and `gguf-unsupported` for whatever cannot be reconstructed with certainty. Reads no
    weight, except for the few numbers of Llama 3's rotary factors.
    """
    name = header.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise errors.gguf_architecture(header.path, str(name)[:80], ARCHITECTURES)
    architecture, metadata = ARCHITECTURES[name], _Metadata(header, name)
    _refuse_unknown(metadata)
    layers = metadata.count("block_count")
    names = _transformers_names(metadata, architecture, layers)
    config = _config(metadata, architecture, layers)
    tensors = {names[key]: _reference(metadata, architecture, config, key, names[key]) for key in names}
    generation: dict[str, Any] = {
        key: config[key] for key in ("bos_token_id", "pad_token_id") if config[key] is not None
    }
    ends = [metadata.token(key, config["vocab_size"]) for key in ("eos", "eot", "eom")]
    distinct = list(dict.fromkeys(end for end in ends if end is not None))
    if distinct:
        generation["eos_token_id"] = distinct[0] if len(distinct) == 1 else distinct
    return config, generation, tensors


def _refuse_unknown(metadata: _Metadata) -> None:
    everything = metadata.header.metadata
    parts = everything.get("split.count", 1)
    if not isinstance(parts, int) or parts != 1:
        raise metadata.refuse(f"it is one of {parts!a:.80} parts; join them with llama-gguf-split --merge")
    prefix = metadata.architecture + "."
    for key, value in everything.items():
        rest = key.removeprefix(prefix)
        if not key.startswith(prefix) or rest in READ_KEYS:
            continue
        if rest not in NEUTRAL_KEYS:
            raise metadata.refuse(
                f"it has the key {key!a:.80}, whose effect on {metadata.architecture} is not known here"
            )
        if not isinstance(value, type(NEUTRAL_KEYS[rest])) or value != NEUTRAL_KEYS[rest]:
            raise metadata.refuse(f"{key} is {value!a:.80}; only {NEUTRAL_KEYS[rest]!r} is supported")


def _transformers_names(metadata: _Metadata, architecture: Architecture, layers: int) -> dict[str, str]:
    """GGUF name to transformers name of every tensor; all that a model needs are there, and nothing else is."""
    found = metadata.header.tensors
    names = {key: name for key, name in (OUTER | {HEAD: "lm_head.weight"}).items() if key in found}
    for key in found.keys() - names.keys() - {ROPE_FACTORS}:
        match = LAYER_TENSOR.fullmatch(key)
        known = match is not None and match[2] in architecture.layers and int(match[1]) < layers
        if match is None or not known or (match[3] == "bias" and match[2] not in BIASED):
            raise metadata.refuse(f"the tensor {key!a:.80} is none of {metadata.architecture} with {layers} layers")
        names[key] = f"model.layers.{match[1]}.{architecture.layers[match[2]]}.{match[3]}"
    if layers > len(found):
        raise metadata.refuse(f"{layers} layers are announced, but there are {len(found)} tensors")
    required = [*OUTER, *(f"blk.{layer}.{part}.weight" for layer in range(layers) for part in architecture.layers)]
    missing = [key for key in required if key not in names]
    if missing:
        raise metadata.refuse(f"{len(missing)} tensors are missing: {', '.join(missing[:3])}")
    # The order of the file is the order of its data.
    return {key: names[key] for key in found if key in names}


def _config(metadata: _Metadata, architecture: Architecture, layers: int) -> dict[str, Any]:
    found = metadata.header.tensors
    hidden, heads = metadata.count("embedding_length"), metadata.count("attention.head_count")
    head_dim = metadata.count("attention.key_length", default=max(hidden // heads, 1))
    if metadata.count("attention.value_length", default=head_dim) != head_dim:
        raise metadata.refuse("attention.key_length and attention.value_length differ")
    vocabulary = found["token_embd.weight"].shape[0]
    if metadata.count("vocab_size", default=vocabulary) != vocabulary:
        raise metadata.refuse(
            f"vocab_size is {metadata.get('vocab_size')}, but token_embd.weight has {vocabulary} rows"
        )
    config = {
        "architectures": [architecture.model_class],
        "model_type": architecture.model_type,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": metadata.count("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.count("attention.head_count_kv", default=heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": metadata.count("context_length"),
        "rms_norm_eps": metadata.real("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope_parameters(metadata, architecture, head_dim),
        "tie_word_embeddings": HEAD not in found,
        "dtype": "float32",
        **architecture.fixed,
    }
    if architecture.bias_key is not None:
        config[architecture.bias_key] = "blk.0.attn_q.bias" in found
    for key, name in (("bos", "bos_token_id"), ("eos", "eos_token_id"), ("padding", "pad_token_id")):
        # None where the file is silent: left out, it would become the id of some other model of the family.
        config[name] = metadata.token(key, vocabulary)
    return config


def _rope_parameters(metadata: _Metadata, architecture: Architecture, head_dim: int) -> dict[str, Any]:
    base = metadata.real("rope.freq_base", default=10000.0)  # llama.cpp's own default
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
    rotated = metadata.count("rope.dimension_count", default=head_dim)
    if architecture.partial_rope:
        if rotated > head_dim:
            raise metadata.refuse(f"rope.dimension_count is {rotated}, but a head has {head_dim}")
        parameters["partial_rotary_factor"] = rotated / head_dim
    elif rotated != head_dim:
        raise metadata.refuse(f"rope.dimension_count is {rotated}; {head_dim}, a whole head, is needed")
    scaling = metadata.word("rope.scaling.type")
    if ROPE_FACTORS in metadata.header.tensors:
        if scaling not in {None, "none"}:
            raise metadata.refuse(f"it has both {ROPE_FACTORS} and rope.scaling.type {scaling!a:.80}")
        return parameters | _llama3_scaling(metadata, base, head_dim)
    if scaling in {None, "none"}:
        return parameters
    if scaling == "linear":
        return parameters | {"rope_type": "linear", "factor": metadata.real("rope.scaling.factor")}
    if scaling == "yarn":
        return parameters | {
            "rope_type": "yarn",
            "factor": metadata.real("rope.scaling.factor"),
            "original_max_position_embeddings": metadata.count("rope.scaling.original_context_length"),
        }
    raise metadata.refuse(f"rope.scaling.type is {scaling!a:.80}; none, linear and yarn are supported")


def _llama3_scaling(metadata: _Metadata, base: float, head_dim: int) -> dict[str, Any]:
    """Llama 3's rope scaling, from the factors that the converter computed from it.

    All published models have the same three constants; they are put to the test by computing the factors again.
    """
    tensor = metadata.header.tensors[ROPE_FACTORS]
    if tensor.shape != (head_dim // 2,):
        raise metadata.refuse(f"{ROPE_FACTORS} has the shape {tensor.shape}; ({head_dim // 2},) is needed")
    ref = TensorRef(ROPE_FACTORS, metadata.header.path, tensor.offset, tensor.nbytes, tensor.encoding, tensor.shape)
    with WeightReader() as reader:
        factors = reader.read(ref)
    scaling = {
        "rope_type": "llama3",
        "factor": float(f"{factors.max():.6g}"),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    if not np.allclose(factors, llama3_factors(base, head_dim, scaling), rtol=1e-4, atol=0):
        raise metadata.refuse(f"{ROPE_FACTORS} does not follow from Llama 3's rope scaling, the only one known by it")
    return scaling


def llama3_factors(base: float, head_dim: int, scaling: Mapping[str, Any]) -> Array:
    """What each rotary frequency is divided by: float64 [head_dim / 2]. Source: transformers, rope type llama3."""
    frequencies = base ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - smooth) / scaling["factor"] + smooth))


def _reference(
    metadata: _Metadata, architecture: Architecture, config: Mapping[str, Any], key: str, name: str
) -> TensorRef:
    tensor = metadata.header.tensors[key]
    ref = TensorRef(name, metadata.header.path, tensor.offset, tensor.nbytes, tensor.encoding, tensor.shape)
    part = key.split(".")[-2]
    if not architecture.interleaved_rope or part not in {"attn_q", "attn_k"}:
        return ref
    heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
    if ref.shape[0] != heads * config["head_dim"] or config["head_dim"] % 2:
        raise metadata.refuse(f"{key} has {ref.shape[0]} rows; {heads} heads of {config['head_dim']} are announced")
    return replace(ref, transform=RopeUnpermute(heads))
