"""GLM-4 (0414): interleaved rotary over half of each head, four norms a block, gate and up in one projection."""

from edgeexport.families.decoder import DECODER_OPS, DecoderFamily

FAMILY = DecoderFamily(
    model_type="glm4",
    ops=DECODER_OPS | {"Split"},
    defaults={"num_key_value_heads": 2, "head_dim": 128},
    tiny={
        "architectures": ["Glm4ForCausalLM"],
        "model_type": "glm4",
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": True,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
