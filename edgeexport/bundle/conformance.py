"""Conformance vectors: what preparing prompts, pictures and sound must give, for every loader that does it anew.

golden/chat.json holds conversations as messages, the text that the chat template makes of them, and its tokens. Beside
the logits of a prompt with pictures or sound lie `rope_positions` int64 [3, P] of its prefill, where the model has
M-RoPE, and `input.{i}.{name}` float32 [rows, width]: of what the encoder takes of the i-th picture or sound, every row
whose index is a multiple of `step`, where step = max(1, all rows // 32) and rows run along the last axis but one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from edgeexport import errors
from edgeexport.core import Array, EncoderInput
from edgeexport.session.inputs import rope_positions

if TYPE_CHECKING:
    from edgeexport.session.chat import ChatTemplate
    from edgeexport.session.preprocess import Preprocess
    from edgeexport.session.tokenizer import Tokenizer

CHAT = "golden/chat.json"
MAX_BYTES = 1 << 24
MAX_TURNS = 100
"""Conversations of golden/chat.json; a build writes five at most."""
SAMPLED_ROWS = 32
TOLERANCE = 1e-4
"""Largest difference of a prepared number; one step of an 8-bit colour is 0.015."""

IMAGE = {"type": "image"}
CONVERSATIONS: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  Größe, 尺寸, 📱?\n"}],
    [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "<think>Two follows.</think><answer>Two</answer>"},
        {"role": "user", "content": "And then?"},
    ],
)
PICTURED: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": [IMAGE, {"type": "text", "text": "What is on the screen?"}]}],
    [{"role": "user", "content": [IMAGE, IMAGE, {"type": "text", "text": "Compare."}]}],
)


class Turn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A conversation, the text for the model with the generation prompt behind it, and the text's tokens."""

    messages: list[dict[str, Any]]
    text: str
    tokens: list[int]


def chat_turns(template: ChatTemplate, tokenizer: Tokenizer, *, pictures: bool) -> list[Turn]:
    """The conversations as this template and tokenizer render them. One that the template refuses is left out."""
    turns = []
    for messages in CONVERSATIONS + (PICTURED if pictures else ()):
        try:
            text = template.render(messages)
        except errors.EdgeExportError:
            continue  # some templates take no system message
        turns.append(Turn(messages, text, tokenizer.encode(text, add_special_tokens=False)))
    return turns


def check_chat(data: bytes, template: ChatTemplate, tokenizer: Tokenizer) -> None:
    """Render and tokenise golden/chat.json again. Raises: BundleError `golden-unusable`, `golden-mismatch`."""
    if len(data) > MAX_BYTES:
        raise errors.golden_unusable(CHAT, f"it has {len(data)} bytes, more than {MAX_BYTES}")
    try:
        turns = msgspec.json.decode(data, type=list[Turn])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise errors.golden_unusable(CHAT, str(error)[:400]) from error
    if len(turns) > MAX_TURNS:
        raise errors.golden_unusable(CHAT, f"it has {len(turns)} conversations, more than {MAX_TURNS}")
    for i, turn in enumerate(turns):
        text = template.render(turn.messages)
        if text != turn.text or tokenizer.encode(text, add_special_tokens=False) != turn.tokens:
            raise errors.golden_mismatch(CHAT, f"conversation {i} gives another text or other tokens")


def prepared(contract: Preprocess, tokens: Array, given: Sequence[EncoderInput]) -> dict[str, Array]:
    """The vectors of one prompt: its tokens int64 [P], placeholders repeated, and its pictures and sounds in order."""
    found = {}
    if contract.position_rows == 3:
        found["rope_positions"] = rope_positions(tokens, contract.image_token_id, given, 0)[0]
    for i, each in enumerate(given):
        for name, array in each.inputs.items():
            rows = array.reshape(-1, array.shape[-1])
            found[f"input.{i}.{name}"] = np.ascontiguousarray(rows[:: max(1, len(rows) // SAMPLED_ROWS)])
    return found


def check_prepared(wanted: Mapping[str, Array], found: Mapping[str, Array], where: object) -> None:
    """Raises: BundleError `golden-mismatch`."""
    for name in sorted(wanted.keys() | found.keys()):
        one, other = wanted.get(name), found.get(name)
        if one is None or other is None or one.shape != other.shape or one.dtype != other.dtype:
            raise errors.golden_mismatch(where, f"{name} is missing or has another shape")
        difference = float(np.abs(one - other).max(initial=0))
        if not difference <= TOLERANCE:
            raise errors.golden_mismatch(where, f"{name} differs by {difference:.6g}, the gate is {TOLERANCE:g}")
