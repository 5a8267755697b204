"""Conformance vectors: conversations and prepared inputs, against transformers and against themselves when damaged."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models, pre_tokenizers

from edgeexport import errors
from edgeexport.bundle import conformance
from edgeexport.core import EncoderInput
from edgeexport.session.chat import ChatTemplate
from edgeexport.session.preprocess import Preprocess
from edgeexport.session.tokenizer import Tokenizer

GLM = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}<|begin_of_image|><|image|><|end_of_image|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}"
)
SPECIAL = ["[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|image|>", "<|begin_of_image|>", "<|end_of_image|>"]


@pytest.fixture(scope="module")
def tokenizer_json() -> bytes:
    tokenizer = HfTokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer.to_str().encode()


def of_transformers(tokenizer_json: bytes, template: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    tokenizer = HfTokenizer.from_str(tokenizer_json.decode())
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template)


@pytest.mark.parametrize(("template", "pictures"), [(GLM, True), (GLM, False), (NO_SYSTEM, False)])
def test_turns_are_those_of_transformers(tokenizer_json: bytes, template: str, pictures: bool) -> None:
    oracle = of_transformers(tokenizer_json, template)
    turns = conformance.chat_turns(ChatTemplate(template, {}), Tokenizer(tokenizer_json), pictures=pictures)
    asked = len(conformance.CONVERSATIONS) + pictures * len(conformance.PICTURED)
    assert len(turns) == asked - (template == NO_SYSTEM)
    for turn in turns:
        given: dict[str, Any] = {"conversation": turn.messages, "add_generation_prompt": True}
        assert turn.text == oracle.apply_chat_template(**given, tokenize=False)
        assert turn.tokens == list(oracle.apply_chat_template(**given, return_dict=False))


def test_chat_that_is_unchanged_passes_and_another_does_not(tokenizer_json: bytes) -> None:
    template, tokenizer = ChatTemplate(GLM, {}), Tokenizer(tokenizer_json)
    turns = conformance.chat_turns(template, tokenizer, pictures=True)
    conformance.check_chat(msgspec.json.encode(turns), template, tokenizer)
    first = msgspec.structs.replace(turns[0], tokens=[*turns[0].tokens[:-1], 5])
    with pytest.raises(errors.BundleError, match="golden-mismatch"):
        conformance.check_chat(msgspec.json.encode([first]), template, tokenizer)
    with pytest.raises(errors.BundleError, match="golden-mismatch"):
        conformance.check_chat(msgspec.json.encode(turns), ChatTemplate(GLM + " ", {}), tokenizer)


MANY = b"[" + b",".join([b'{"messages": [{"a": 1}], "text": "", "tokens": []}'] * 101) + b"]"


@pytest.mark.parametrize("data", [b"", b"{}", b'[{"messages": 1}]', b"\xff", b"[" * 100_000, MANY])
def test_damaged_chat_is_a_typed_error(data: bytes, tokenizer_json: bytes) -> None:
    with pytest.raises(errors.BundleError, match="golden-unusable"):
        conformance.check_chat(data, ChatTemplate(GLM, {}), Tokenizer(tokenizer_json))


def prepared(patches: np.ndarray) -> dict[str, np.ndarray]:
    contract = Preprocess(image_token_id=7, position_rows=3)
    tokens = np.array([1, 7, 7, 7, 7, 7, 7, 2], np.int64)
    given = EncoderInput("vision", "4x6", {"patches": patches}, (2, 3))
    return conformance.prepared(contract, tokens, [given])


def test_prepared_inputs_are_sampled_with_their_positions() -> None:
    patches = np.arange(100 * 4, dtype=np.float32).reshape(100, 4)
    found = prepared(patches)
    np.testing.assert_array_equal(found["input.0.patches"], patches[::3])
    # transformers' get_rope_index: text counts on, a 2 x 3 picture stands still in time
    rows = [[0, 1, 1, 1, 1, 1, 1, 4], [0, 1, 1, 1, 2, 2, 2, 4], [0, 1, 2, 3, 1, 2, 3, 4]]
    np.testing.assert_array_equal(found["rope_positions"], rows)


def test_another_preparation_is_refused() -> None:
    patches = np.zeros((100, 4), np.float32)
    wanted = prepared(patches)
    conformance.check_prepared(wanted, prepared(patches + np.float32(5e-5)), "x")
    for changed in (prepared(patches + np.float32(0.015)), prepared(np.zeros((90, 4), np.float32)), {}):
        with pytest.raises(errors.BundleError, match="golden-mismatch"):
            conformance.check_prepared(wanted, changed, "x")
    with pytest.raises(errors.BundleError, match="golden-mismatch"):
        conformance.check_prepared(wanted, prepared(patches * np.float32(np.nan)), "x")
