"""Qwen3: RMSNorm on every head of q and k, and a head size of its own."""

from edgeexport.families.decoder import DECODER_OPS, DecoderFamily

FAMILY = DecoderFamily(
    model_type="qwen3",
    ops=DECODER_OPS,
    defaults={"num_key_value_heads": 32, "head_dim": 128},
    tiny={
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
