"""Rebuild a tokenizer's files from the metadata of a GGUF file: byte-level BPE of known pre-tokenizers only.

Sources: `llm_tokenizer_bpe` in llama.cpp's src/llama-vocab.cpp for what each `tokenizer.ggml.pre` means, and the
models' own tokenizer.json for what llama.cpp leaves out (Qwen's normalizer).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeexport import errors
from edgeexport.checkpoint.files import dump_object
from edgeexport.checkpoint.gguf import GgufHeader, read_header
from edgeexport.checkpoint.gguf_architectures import read_model

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
"""Values of tokenizer.ggml.token_type; the others are ordinary tokens."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_PUNCTUATION_AND_SPACE = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2_SPLIT = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_PUNCTUATION_AND_SPACE}"
_LLAMA3_SPLIT = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_PUNCTUATION_AND_SPACE}"


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut before BPE. `split` is a regular expression, or None for GPT-2's, built into ByteLevel."""

    split: str | None = None
    single_digits: bool = False
    normalize: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False


PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "gpt-2": PreTokenizer(),
    "smollm": PreTokenizer(single_digits=True),
    "qwen2": PreTokenizer(split=_QWEN2_SPLIT, normalize=True),
    "deepseek-r1-qwen": PreTokenizer(split=_QWEN2_SPLIT, normalize=True),
    "llama-bpe": PreTokenizer(split=_LLAMA3_SPLIT, ignore_merges=True, adds_bos=True),
    "llama3": PreTokenizer(split=_LLAMA3_SPLIT, ignore_merges=True, adds_bos=True),
    "llama-v3": PreTokenizer(split=_LLAMA3_SPLIT, ignore_merges=True, adds_bos=True),
    "glm4": PreTokenizer(split=_LLAMA3_SPLIT),
    "chatglm-bpe": PreTokenizer(split=_LLAMA3_SPLIT),
}


def read_tokenizer(path: Path) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json, generation_config.json and, where there is one, chat_template.jinja.

    Reads the file's header again rather than keeping its vocabulary in memory. Raises `gguf-tokenizer`.
    """
    header = read_header(path)
    config, generation, _ = read_model(header)
    files = tokenizer_files(header, config)
    files["generation_config.json"] = dump_object(generation)
    return files


def tokenizer_files(header: GgufHeader, config: Mapping[str, Any]) -> dict[str, bytes]:
    """The tokenizer's own files; `config` is the model's."""
    metadata, path = header.metadata, header.path
    kind, pre_name = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if not isinstance(kind, str) or kind != "gpt2":
        raise errors.gguf_tokenizer(
            path, f"tokenizer.ggml.model is {kind!a:.80}; only 'gpt2' (byte-level BPE) is supported"
        )
    if not isinstance(pre_name, str) or pre_name not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise errors.gguf_tokenizer(path, f"tokenizer.ggml.pre is {pre_name!a:.80}; supported are {known}")
    pre = PRE_TOKENIZERS[pre_name]
    tokens, types = _vocabulary(header, int(config["vocab_size"]))
    special = {f"{role}_token": tokens[index] for role, index in _special_ids(header, tokens, config).items()}
    files = {
        "tokenizer.json": _build(header, pre, tokens, types, config),
        "tokenizer_config.json": dump_object(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                **special,
                "model_max_length": config["max_position_embeddings"],
                "clean_up_tokenization_spaces": False,
            }
        ),
    }
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        files["chat_template.jinja"] = template.encode("utf-8")
    return files


def _vocabulary(header: GgufHeader, size: int) -> tuple[list[str], list[int]]:
    """Tokens and their types, by id."""
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not 0 < len(tokens) <= size or not all(isinstance(t, str) for t in tokens):
        raise errors.gguf_tokenizer(header.path, f"tokenizer.ggml.tokens must list 1 to {size} tokens")
    if len(set(tokens)) != len(tokens):
        raise errors.gguf_tokenizer(header.path, "tokenizer.ggml.tokens lists a token twice")
    types = header.metadata.get("tokenizer.ggml.token_type")
    if types is None or isinstance(types, (str, int, float, list)) or len(types) != len(tokens):
        raise errors.gguf_tokenizer(header.path, "tokenizer.ggml.token_type must give each token a type")
    return tokens, types.tolist()


def _special_ids(header: GgufHeader, tokens: list[str], config: Mapping[str, Any]) -> dict[str, int]:
    """bos, eos and pad, as far as the file names them."""
    named = {role: config[f"{role}_token_id"] for role in ("bos", "eos", "pad")}
    found = {role: int(index) for role, index in named.items() if index is not None}
    for role, index in found.items():
        if index >= len(tokens):
            raise errors.gguf_tokenizer(header.path, f"the {role} token is {index}, but there are {len(tokens)} tokens")
    return found


def _merges(header: GgufHeader, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    merges = header.metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise errors.gguf_tokenizer(header.path, "tokenizer.ggml.merges is missing")
    pairs = []
    for merge in merges:
        left, space, right = str(merge).partition(" ")
        if not space or not {left, right, left + right} <= vocabulary.keys():
            raise errors.gguf_tokenizer(header.path, f"the merge {merge!a:.80} is not of two tokens that make a third")
        pairs.append((left, right))
    return pairs


def _flag(header: GgufHeader, key: str, default: bool) -> bool:
    value = header.metadata.get(key, default)
    if not isinstance(value, bool):
        raise errors.gguf_tokenizer(header.path, f"{key} is {value!a:.80}; true or false is needed")
    return value


def _build(
    header: GgufHeader, pre: PreTokenizer, tokens: list[str], types: list[int], config: Mapping[str, Any]
) -> bytes:
    """tokenizer.json, by the library that will read it. Raises `gguf-tokenizer`."""
    try:
        return _built(header, pre, tokens, types, config)
    except (errors.EdgeExportError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as problem:  # the library raises Exception itself, and panics by what is none
        raise errors.gguf_tokenizer(header.path, f"the tokenizers library says: {problem}"[:500]) from problem


def _built(
    header: GgufHeader, pre: PreTokenizer, tokens: list[str], types: list[int], config: Mapping[str, Any]
) -> bytes:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    # Fillers of an embedding that is larger than its vocabulary are no tokens: they must never come out of encoding.
    vocabulary = {token: index for index, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != UNUSED}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=_merges(header, vocabulary), ignore_merges=pre.ignore_merges)
    )
    if pre.normalize:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = []
    if pre.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if pre.split is not None:
        steps.append(pre_tokenizers.Split(Regex(pre.split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.split is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = _post_processor(header, pre, tokens, config)
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    plain = [token for token, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    return (tokenizer.to_str(pretty=True) + "\n").encode("utf-8")


def _post_processor(header: GgufHeader, pre: PreTokenizer, tokens: list[str], config: Mapping[str, Any]) -> Any:
    """What adds the first and the last token, as far as the file asks for them."""
    from tokenizers import processors

    ids = _special_ids(header, tokens, config)
    wanted = {
        "bos": _flag(header, "tokenizer.ggml.add_bos_token", pre.adds_bos),
        "eos": _flag(header, "tokenizer.ggml.add_eos_token", False),
    }
    for role, is_wanted in wanted.items():
        if is_wanted and (role not in ids or ":" in tokens[ids[role]] or "$" in tokens[ids[role]]):
            raise errors.gguf_tokenizer(header.path, f"it asks for a {role} token around text, but names no usable one")
    added = [ids[role] for role, is_wanted in wanted.items() if is_wanted]
    if not added:
        return processors.ByteLevel(trim_offsets=False)
    first = [tokens[ids["bos"]]] if wanted["bos"] else []
    last = [tokens[ids["eos"]]] if wanted["eos"] else []
    special = sorted({(tokens[index], index) for index in added})
    return processors.TemplateProcessing(single=[*first, "$A", *last], special_tokens=special)
