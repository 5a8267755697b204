"""Llama, and what shares its architecture: SmolLM2, TinyLlama, Llama 2 and 3."""

from edgeexport.families.decoder import DECODER_OPS, DecoderFamily

FAMILY = DecoderFamily(
    model_type="llama",
    ops=DECODER_OPS,
    tiny={
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "rope_theta": 50000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
