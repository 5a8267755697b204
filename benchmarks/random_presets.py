"""The models that random_checkpoint.py can write: config, tensors in file order, special tokens, chat template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Group:
    """Tensors with a common prefix, repeated `count` times; `{}` in the prefix is the repetition's number."""

    prefix: str
    count: int
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Preset:
    """A model: its config.json, its tensors, and what its tokenizer knows beyond the 256 bytes."""

    config: Mapping[str, Any]
    groups: tuple[Group, ...]
    special: Mapping[str, int]
    """Special tokens' text to their ids, from 256 on."""
    tokenizer_config: Mapping[str, Any]
    generation: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Further JSON files by name."""

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
        special={"<s>": 256, "</s>": 257},
        tokenizer_config={
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "chat_template": "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}",
        },
        generation={"bos_token_id": 256, "eos_token_id": 257, "do_sample": False},
    )


GLM_SPECIAL = {
    "<|endoftext|>": 0, "[MASK]": 1, "[gMASK]": 2, "[sMASK]": 3, "<sop>": 4, "<eop>": 5,
    "<|system|>": 6, "<|user|>": 7, "<|assistant|>": 8, "<|observation|>": 9,
    "<|begin_of_image|>": 10, "<|end_of_image|>": 11, "<|begin_of_video|>": 12, "<|end_of_video|>": 13,
    "<think>": 16, "</think>": 17, "<answer>": 18, "</answer>": 19, "<|image|>": 34, "<|video|>": 35,
}  # fmt: skip
"""GLM-4's special tokens to their distance from the first, <|endoftext|>: 151329 in the published checkpoints."""

GLM_TEMPLATE = """[gMASK]<sop>
{%- for message in messages -%}
<|{{ message.role }}|>
{% if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
<|begin_of_image|><|image|><|end_of_image|>
{%- elif part.type == 'video' -%}
<|begin_of_video|><|video|><|end_of_video|>
{%- elif part.type == 'text' -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|assistant|>
{% endif -%}
"""


@dataclass(frozen=True)
class GlmText:
    """The sizes of a Glm4v text model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    context: int
    mrope: tuple[int, int, int]
    first_special: int


@dataclass(frozen=True)
class GlmVision:
    """The sizes of a Glm4v vision tower; it ends in the text model's width."""

    hidden: int
    depth: int
    heads: int
    image: int
    ffn: int
    """Of the merger. The blocks' own is the text model's width."""


def glm4v(text: GlmText, vision: GlmVision) -> Preset:
    """A GLM-4.1V of these sizes: tensor names and shapes of transformers' Glm4vForConditionalGeneration."""
    token = {name: text.first_special + distance for name, distance in GLM_SPECIAL.items()}
    stops = [token[name] for name in ("<|endoftext|>", "<|user|>", "<|observation|>", "</answer>")]
    return Preset(
        _glm4v_config(text, vision, token, stops),
        (*_glm4v_vision(vision, text.hidden), *_glm4v_text(text)),
        special=token,
        tokenizer_config={
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "clean_up_tokenization_spaces": False,
            "chat_template": GLM_TEMPLATE,
        },
        generation={"eos_token_id": stops, "pad_token_id": stops[0], "do_sample": False},
        files={"preprocessor_config.json": _glm4v_pictures()},
    )


def _glm4v_config(text: GlmText, vision: GlmVision, token: Mapping[str, int], stops: list[int]) -> dict[str, Any]:
    return {
        "architectures": ["Glm4vForConditionalGeneration"],
        "model_type": "glm4v",
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
        "image_token_id": token["<|image|>"],
        "video_token_id": token["<|video|>"],
        "image_start_token_id": token["<|begin_of_image|>"],
        "image_end_token_id": token["<|end_of_image|>"],
        "video_start_token_id": token["<|begin_of_video|>"],
        "video_end_token_id": token["<|end_of_video|>"],
        "text_config": {
            "model_type": "glm4v_text",
            "vocab_size": text.vocab,
            "hidden_size": text.hidden,
            "intermediate_size": text.ffn,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "num_key_value_heads": text.kv_heads,
            "max_position_embeddings": text.context,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 500000.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": list(text.mrope),
            },
            "eos_token_id": stops,
            "pad_token_id": stops[0],
        },
        "vision_config": {
            "model_type": "glm4v_vision",
            "depth": vision.depth,
            "hidden_size": vision.hidden,
            "num_heads": vision.heads,
            "in_channels": 3,
            "image_size": vision.image,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": text.hidden,
            "intermediate_size": vision.ffn,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "attention_bias": False,
        },
    }


def _glm4v_vision(vision: GlmVision, out: int) -> tuple[Group, ...]:
    hidden, ffn = vision.hidden, vision.ffn
    stem = {
        "embeddings.position_embedding.weight": ((vision.image // 14) ** 2, hidden),
        "patch_embed.proj.weight": (hidden, 3, 2, 14, 14),
        "patch_embed.proj.bias": (hidden,),
    }
    block = {
        "norm1.weight": (hidden,),
        "norm2.weight": (hidden,),
        "attn.qkv.weight": (3 * hidden, hidden),
        "attn.proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (out, hidden),
        "mlp.up_proj.weight": (out, hidden),
        "mlp.down_proj.weight": (hidden, out),
    }
    end = {
        "merger.proj.weight": (out, out),
        "merger.post_projection_norm.weight": (out,),
        "merger.post_projection_norm.bias": (out,),
        "merger.gate_proj.weight": (ffn, out),
        "merger.up_proj.weight": (ffn, out),
        "merger.down_proj.weight": (out, ffn),
        "post_conv_layernorm.weight": (hidden,),
        "downsample.weight": (out, hidden, 2, 2),
        "downsample.bias": (out,),
        "post_layernorm.weight": (hidden,),
    }
    prefix = "model.visual."
    return Group(prefix, 1, stem), Group(prefix + "blocks.{}.", vision.depth, block), Group(prefix, 1, end)


def _glm4v_text(text: GlmText) -> tuple[Group, ...]:
    hidden, kv = text.hidden, text.kv_heads * (text.hidden // text.heads)
    layer = {
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.q_proj.bias": (hidden,),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.k_proj.bias": (kv,),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.v_proj.bias": (kv,),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_up_proj.weight": (2 * text.ffn, hidden),
        "mlp.down_proj.weight": (hidden, text.ffn),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "post_self_attn_layernorm.weight": (hidden,),
        "post_mlp_layernorm.weight": (hidden,),
    }
    prefix = "model.language_model."
    return (
        Group(prefix, 1, {"embed_tokens.weight": (text.vocab, hidden)}),
        Group(prefix + "layers.{}.", text.layers, layer),
        Group("", 1, {prefix + "norm.weight": (hidden,), "lm_head.weight": (text.vocab, hidden)}),
    )


def _glm4v_pictures() -> dict[str, Any]:
    """What the published checkpoints say, which is what transformers' image processor assumes where they do not."""
    return {
        "image_processor_type": "Glm4vImageProcessor",
        "processor_class": "Glm4vProcessor",
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "merge_size": 2,
        "patch_size": 14,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 15000},
        "temporal_patch_size": 2,
    }


PRESETS = {
    "llama-1.1b": llama(2048, 22, 32, 4, 5632, 32000, 2048),
    "llama-tiny": llama(64, 2, 4, 2, 128, 320, 128),
    "autoglm-phone-9b": glm4v(
        GlmText(4096, 40, 32, 2, 13696, 151552, 65536, mrope=(8, 12, 12), first_special=151329),
        GlmVision(1536, 24, 12, image=336, ffn=13696),
    ),
    "glm4v-tiny": glm4v(
        GlmText(64, 2, 4, 2, 160, 320, 512, mrope=(2, 1, 1), first_special=256),
        GlmVision(64, 2, 4, image=56, ffn=128),
    ),
}
