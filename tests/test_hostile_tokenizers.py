"""Tokenizers that nobody should have written: each is refused by name or works, and none takes long or much memory."""

from __future__ import annotations

import base64
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mutation import json_bytes, mutated_bytes, mutated_json
from tokenizers_zoo import CUT_AND_PADDED, KINDS, TEMPLATE

from edgeexport import errors
from edgeexport.checkpoint import resolved
from edgeexport.checkpoint.folder import read_tokenizer
from edgeexport.session.chat import ChatTemplate
from edgeexport.session.tokenizer import Tokenizer, special_tokens
from edgeexport.text_tables.files import table_files

TEXT = "a" * 40 + "b <s> Hello, 123 \n 你好 e\u0301"
SECONDS = 30
"""Generous: a busy machine is no failure, and what is tried here would take minutes or for ever."""
A = {"Sequence": {"id": "A", "type_id": 0}}


def replace(text: str, by: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": text}, "content": by}


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def charsmap(data: bytes) -> dict[str, Any]:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


BAD: dict[str, dict[str, Any]] = {
    "map of characters without a trie": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"}},
    "map of characters whose trie leads nowhere": {"normalizer": charsmap(b"\4\0\0\0\xff\xff\xff\xffabc\0")},
    "retries of a regular expression": {"pre_tokenizer": split("(a+)+$")},
    "a regular expression in the normaliser": {
        "normalizer": {"type": "Replace", "pattern": {"Regex": "(a|aa)+$"}, "content": "x"}
    },
    "a template's token that is not there": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<nowhere>", "type_id": 0}}, A],
            "pair": [],
            "special_tokens": {},
        }
    },
    "words without an unknown one": {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}},
    "replacements that multiply": {
        "normalizer": {"type": "Sequence", "normalizers": [replace("a", "a" * 10)] * 20}
    },
    "one replacement by a long text": {"normalizer": replace("a", "b" * 2_000_000)},
    "bytes of bytes of bytes": {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
            ] * 40,
        }
    },
    "a text put twice, and twice again": {
        "post_processor": {
            "type": "Sequence",
            "processors": [{"type": "TemplateProcessing", "single": [A, A], "pair": [A], "special_tokens": {}}] * 40,
        }
    },
    "many tokens around a text": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*[{"SpecialToken": {"id": "x", "type_id": 0}}] * 10_000, A],
            "pair": [],
            "special_tokens": {"x": {"id": "x", "ids": [1] * 10_000, "tokens": ["a"] * 10_000}},
        }
    },
    "steps without end": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}] * 5_000}},
    "steps within steps": {
        "normalizer": json.loads('{"type":"Sequence","normalizers":[' * 300 + '{"type":"NFC"}' + "]}" * 300)
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def good() -> dict[str, Any]:
    return KINDS["gpt2"]()


def tokens(data: bytes, text: str = TEXT) -> list[int]:
    return Tokenizer(data).encode(text)


@pytest.mark.parametrize("what", list(BAD))
def test_bad_steps_are_refused(what: str, good: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(errors.BundleError) as error:
        tokens(json_bytes({**good, **BAD[what]}))
    assert [finding.code for finding in error.value.findings] == ["tokenizer-unusable"]
    assert len(error.value.findings[0].why) < 2_000
    assert capfd.readouterr().err == ""  # the library prints a backtrace of its own
    assert time.process_time() - start < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < (1 << 20)  # kilobytes here, bytes on a Mac


def test_a_regular_expression_is_given_up_after_its_time(good: dict[str, Any]) -> None:
    """Each piece stays within the library's own limit of retries; together they would take minutes."""
    with pytest.raises(errors.BundleError) as error:
        tokens(json_bytes({**good, "pre_tokenizer": split("(a+)+c")}), ("a" * 22 + "b") * 2_000)
    assert "regular expressions take more than" in error.value.findings[0].why


def test_decoding_is_bounded_too(good: dict[str, Any]) -> None:
    decoder = {"type": "Sequence", "decoders": [replace("a", "a" * 10)] * 20}
    tokenizer = Tokenizer(json_bytes({**good, "decoder": decoder}))
    with pytest.raises(errors.BundleError) as error:
        tokenizer.decode(list(range(50, 90)))
    assert error.value.findings[0].code == "tokenizer-unusable"


def test_what_the_file_pads_and_cuts_does_not_count(good: dict[str, Any]) -> None:
    data = json_bytes({**good, **CUT_AND_PADDED})
    assert tokens(data) == tokens(json_bytes(good))
    files, findings = table_files(data, None, pictures=False)
    assert files == table_files(json_bytes(good), None, pictures=False)[0] and findings == []


@pytest.mark.parametrize("text", ["\ud800", "a\udcffb", "\udfff\ud800"])
def test_text_that_is_no_unicode_is_refused(text: str, good: dict[str, Any]) -> None:
    with pytest.raises(errors.UsageError) as error:
        tokens(json_bytes(good), text)
    assert error.value.findings[0].code == "text-not-unicode"
    assert str(error.value).encode() and Tokenizer(json_bytes(good)).token_id(text) is None


PATTERNS = {
    "two-way groups": "(?:a|b)" * 30,
    "nested groups": "(?:" * 600 + "a" + ")" * 600,
    "groups of groups": "(?:" * 12 + "a|b" + ")(?:c|d)" * 11 + ")",
    "long": "a" * 10_000,
    "many sets": r"[\p{L}a]" * 500,
    "a long bracket": "[" + "a" * 100_000 + "]",
    "alternatives": "|".join("ab" for _ in range(900)),
    "no property": r"\p{Nonsense}",
    "counted": "a{4294967295}" * 20,
    "counted twice": "(?:a{1000}|b{1000}){1000}",
}


@pytest.mark.parametrize("what", list(PATTERNS))
def test_tables_of_a_bad_pattern_are_a_warning(what: str, good: dict[str, Any]) -> None:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    step = {"type": "Sequence", "pretokenizers": [split(PATTERNS[what]), level]}
    start = time.process_time()
    try:
        files, findings = table_files(json_bytes({**good, "pre_tokenizer": step}), None, pictures=False)
    except errors.BundleError as error:  # the library itself does not take it
        findings = list(error.findings)
        files = {}
    assert files == {} and {each.code for each in findings} <= {"tokenizer-without-table", "tokenizer-unusable"}
    assert len(findings) == 1 and len(findings[0].what) < 300
    assert time.process_time() - start < SECONDS


@pytest.mark.parametrize("kind", list(KINDS))
def test_mutated_tokenizers_work_or_are_refused(kind: str) -> None:
    """1,250 of them through everything that a session and a bundle's tables do with one."""
    good = KINDS[kind]()
    worked = 0
    for seed in range(200):
        worked += _tried(json_bytes(mutated_json(good, seed)), tables=seed % 50 == 0)
    data = json_bytes(good)
    for seed in range(50):
        worked += _tried(mutated_bytes(data, seed), tables=seed % 50 == 0)
    assert 10 < worked < 240  # else the mutations, or the checks, are too strong


def _tried(data: bytes, *, tables: bool) -> bool:
    start = time.process_time()
    try:
        tokenizer = Tokenizer(data)
        ids = tokenizer.encode(TEXT)
        stream = tokenizer.stream()
        whole = "".join([*map(stream.push, ids), stream.flush()])
        assert whole == tokenizer.decode(ids)
        tokenizer.decode(list(range(min(tokenizer.vocab, 500))))
        if tables:  # which take a tenth of a second
            table_files(data, None, pictures=False)
    except errors.EdgeExportError as error:
        assert all(len(finding.why) < 2_000 for finding in error.findings)
        return False
    finally:
        assert time.process_time() - start < SECONDS
    return True


@pytest.mark.parametrize("kind", list(KINDS))
def test_mutated_files_open_or_are_refused(
    kind: str, asked: Callable[[Path], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolved, "ask", asked)
    monkeypatch.setattr(resolved, "_recall", lambda memo: None)
    monkeypatch.setattr(resolved, "_remember", lambda memo, answer: None)
    token = {"content": "<|im_start|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    good: dict[str, Any] = {
        "tokenizer.json": KINDS[kind](),
        "tokenizer_config.json": {
            "tokenizer_class": "LlamaTokenizer",
            "bos_token": "<s>",
            "eos_token": {"__type": "AddedToken", **token},
            "extra_special_tokens": ["<x>"],
            "chat_template": TEMPLATE,
            "model_max_length": 1000,
            "add_prefix_space": False,
        },
        "added_tokens.json": {"<|im_end|>": 600},
        "special_tokens_map.json": {"pad_token": token, "additional_special_tokens": ["<y>"]},
    }
    config = {"model_type": {"qwen2": "qwen2", "glm4": "glm4"}.get(kind, "llama"), "transformers_version": "4.40.0"}
    worked = 0
    for seed in range(20):
        files = {name: json_bytes(value) for name, value in good.items()}
        name = list(good)[seed % len(good)]
        files[name] = json_bytes(mutated_json(good[name], seed)) if seed % 5 else mutated_bytes(files[name], seed)
        for each, data in files.items():
            (tmp_path / each).write_bytes(data)
        worked += _opened(tmp_path, mutated_json(config, seed) if seed % 7 == 0 else config)
    assert 3 < worked < 38


def _opened(folder: Path, config: Any) -> bool:
    try:
        files = read_tokenizer(folder, config if isinstance(config, dict) else {})
        names = special_tokens(files).names
        tokenizer = Tokenizer(files["tokenizer.json"])
        template = (
            ChatTemplate(files["chat_template.jinja"].decode(), names) if "chat_template.jinja" in files else None
        )
        if template is not None:
            tokenizer.encode(template.render([{"role": "user", "content": TEXT}]), add_special_tokens=False)
        table_files(files["tokenizer.json"], template, pictures=False)
    except errors.EdgeExportError as error:
        assert all(len(finding.why) < 3_000 for finding in error.findings)
        return False
    return True
