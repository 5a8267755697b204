"""The tokenizer of a bundle is AutoTokenizer's: ids over 2,000 lines and over the chat template's own output."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from mutation import json_bytes
from tokenizers_zoo import CUT_AND_PADDED, KINDS, TEMPLATE, conversations, lines

from edgeexport.checkpoint import resolved
from edgeexport.checkpoint.folder import read_tokenizer
from edgeexport.session.chat import ChatTemplate
from edgeexport.session.tokenizer import Tokenizer, special_tokens

Files = dict[str, Any]
LINES = lines()
TOKEN = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}


@pytest.fixture(scope="module")
def kinds() -> dict[str, Any]:
    return {name: made() for name, made in KINDS.items()}


def next_id(tokenizer: Mapping[str, Any]) -> int:
    ids = [*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"])]
    return int(max(ids)) + 1


def settings(files: Files) -> dict[str, Any]:
    found: dict[str, Any] = files.setdefault("tokenizer_config.json", {})
    return found


def added_tokens_decoder(files: Files) -> None:
    first = next_id(files["tokenizer.json"])
    settings(files)["added_tokens_decoder"] = {
        str(first): {**TOKEN, "content": "<|im_start|>"},
        str(first + 1): {**TOKEN, "content": "<|im_end|>"},
        str(first + 2): {**TOKEN, "content": "<think>", "special": False, "rstrip": True},
    }


def added_tokens_file(files: Files) -> None:
    first = next_id(files["tokenizer.json"])
    files["added_tokens.json"] = {"<|im_start|>": first, "<|im_end|>": first + 1}


def extra_special_tokens(files: Files) -> None:
    settings(files)["extra_special_tokens"] = ["<|im_start|>", "<|im_end|>"]


def extra_by_name(files: Files) -> None:
    settings(files)["extra_special_tokens"] = {"image_token": "<|im_start|>", "end_of_image_token": "<|im_end|>"}


def additional_special_tokens(files: Files) -> None:
    settings(files)["additional_special_tokens"] = [
        {**TOKEN, "__type": "AddedToken", "content": "<|im_start|>", "lstrip": True},
        "<|im_end|>",
    ]


def special_tokens_map(files: Files) -> None:
    files["special_tokens_map.json"] = {
        "pad_token": "<think>",
        "mask_token": {**TOKEN, "content": "<|im_end|>", "lstrip": True},
        "additional_special_tokens": ["<|im_start|>"],
    }


def named_tokens(files: Files) -> None:
    names = {"bos_token": "<|im_start|>", "eos_token": {**TOKEN, "__type": "AddedToken", "content": "<|im_end|>"}}
    files["tokenizer_config.json"] = {**settings(files), **names, "sep_token": "<sop>", "cls_token": "[gMASK]"}


def add_prefix_space(files: Files) -> None:
    settings(files)["add_prefix_space"] = True


def split_special_tokens(files: Files) -> None:
    settings(files)["split_special_tokens"] = True


def bos_and_eos(files: Files) -> None:
    settings(files).update(add_bos_token=True, add_eos_token=True, bos_token="<s>", eos_token="</s>")


def cut_and_padded(files: Files) -> None:
    files["tokenizer.json"] |= CUT_AND_PADDED


def another_class(name: str) -> Callable[[Files], None]:
    def change(files: Files) -> None:
        settings(files)["tokenizer_class"] = name

    change.__name__ = name
    return change


def no_config(files: Files) -> None:
    files.pop("tokenizer_config.json", None)


def old_template(files: Files) -> None:
    settings(files)["chat_template"] = [
        {"name": "tool_use", "template": "x"},
        {"name": "default", "template": TEMPLATE},
    ]


def everything(files: Files) -> None:
    for change in (added_tokens_decoder, named_tokens, add_prefix_space, bos_and_eos, extra_special_tokens):
        change(files)


CASES = [
    *(
        (kind, model, change)
        for kind, model in (
            *(("llama3", "llama"), ("llama2", "llama"), ("qwen2", "qwen2"), ("qwen2", "qwen3")),
            *(("glm4", "glm4"), ("glm4", "glm4v"), ("gpt2", "llama")),
        )
        for change in (no_config, everything)
    ),
    *(
        (kind, "llama", change)
        for kind in ("llama3", "llama2")
        for change in (
            *(added_tokens_decoder, added_tokens_file, extra_special_tokens, special_tokens_map, bos_and_eos),
            *(split_special_tokens, another_class("LlamaTokenizer")),
        )
    ),
    *(
        ("qwen2", "qwen2", change)
        for change in (
            *(added_tokens_file, named_tokens, split_special_tokens, add_prefix_space),
            another_class("LlamaTokenizerFast"),
        )
    ),
    *(
        ("glm4", "glm4", change)
        for change in (
            *(additional_special_tokens, extra_by_name, old_template, cut_and_padded),
            another_class("PreTrainedTokenizerFast"),
        )
    ),
    *(("gpt2", "llama", change) for change in (another_class("GPT2TokenizerFast"), added_tokens_file)),
    ("gpt2", "llama", another_class("NoSuchTokenizer")),
    ("qwen2", "autoglm_phone", added_tokens_decoder),
    ("llama3", "qwen2", another_class("Qwen2Tokenizer")),
]


def written(folder: Path, files: Files) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name).write_bytes(value if isinstance(value, bytes) else json_bytes(value))
    return folder


@pytest.mark.parametrize(("kind", "model", "change"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_ids_are_those_of_autotokenizer(
    kind: str,
    model: str,
    change: Callable[[Files], None],
    kinds: dict[str, Any],
    asked: Callable[[Path], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(resolved, "ask", asked)
    config = {"model_type": model}
    files: Files = {
        "tokenizer.json": json.loads(json.dumps(kinds[kind])),
        "config.json": config,
        "tokenizer_config.json": {"chat_template": TEMPLATE, "clean_up_tokenization_spaces": True},
    }
    change(files)
    folder = written(tmp_path / "model", files)
    oracle = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    ours = read_tokenizer(folder, config)
    tokenizer = Tokenizer(ours["tokenizer.json"])
    assert oracle(LINES)["input_ids"] == [tokenizer.encode(line) for line in LINES]
    plain = oracle(LINES, add_special_tokens=False)["input_ids"]
    assert plain == [tokenizer.encode(line, add_special_tokens=False) for line in LINES]
    for ids in plain[:200]:
        assert tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=True)
    names = special_tokens(ours).names
    assert names == oracle.special_tokens_map
    assert len(oracle) == tokenizer.vocab
    if oracle.chat_template is None:
        assert "chat_template.jinja" not in ours
        return
    template = ChatTemplate(ours["chat_template.jinja"].decode(), names)
    for chat in conversations():
        expected = oracle.apply_chat_template(chat, tokenize=True, add_generation_prompt=True, return_dict=False)
        assert tokenizer.encode(template.render(chat), add_special_tokens=False) == expected


def test_what_is_written_is_a_tokenizer_of_its_own(kinds: dict[str, Any], tmp_path: Path) -> None:
    """Whoever opens the bundle's files by transformers gets the same ids: nothing is decided twice."""
    transformers = pytest.importorskip("transformers")
    files: Files = {
        "tokenizer.json": kinds["qwen2"],
        "tokenizer_config.json": {},
        "config.json": {"model_type": "qwen2"},
    }
    everything(files)
    folder = written(tmp_path / "model", files)
    first = read_tokenizer(folder, {"model_type": "qwen2"})
    again = transformers.PreTrainedTokenizerFast.from_pretrained(written(tmp_path / "again", dict(first)))
    tokenizer = Tokenizer(first["tokenizer.json"])
    assert again(LINES)["input_ids"] == [tokenizer.encode(line) for line in LINES]
    assert again.special_tokens_map == special_tokens(first).names
