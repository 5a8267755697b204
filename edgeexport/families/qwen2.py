"""Qwen2 and Qwen2.5: Llama with biases on q, k and v."""

from edgeexport.families.decoder import DECODER_OPS, DecoderFamily

FAMILY = DecoderFamily(
    model_type="qwen2",
    ops=DECODER_OPS,
    defaults={"num_key_value_heads": 32},
    tiny={
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
