"""How much longer the steps of a tokenizer.json can make a text: from the steps alone, before one is run.

A few replacements, each of a character by ten, make 10^10 characters of one; a bound that is known beforehand is the
only one that holds, since the library has none. Bounds are on the safe side: a step that is not known counts much.
"""

from __future__ import annotations

import base64
import itertools
import struct
from collections.abc import Mapping
from typing import Any

Step = Mapping[str, Any]

FACTORS = {
    "Strip": 1,
    "StripAccents": 1,
    "Nmt": 1,
    "Lowercase": 2,
    "NFC": 3,
    "NFD": 3,
    "NFKC": 11,
    "NFKD": 11,
    "BertNormalizer": 10,
    "ByteLevel": 2,
    "Metaspace": 4,
    "Split": 1,
    "Digits": 1,
    "Whitespace": 1,
    "Punctuation": 1,
    "WhitespaceSplit": 1,
    "BertPreTokenizer": 1,
    "CharDelimiterSplit": 1,
    "UnicodeScripts": 1,
    "FixedLength": 1,
    "ByteFallback": 3,
    "Fuse": 1,
    "WordPiece": 2,
    "BPEDecoder": 2,
    "CTC": 2,
}
"""Bytes of UTF-8 that a step makes of one byte at most; Unicode Standard Annex 15 has those of the normal forms."""
UNKNOWN = 64
HUGE = 1e18
MAX_STEPS = 256
"""Of one kind. Published tokenizers have a dozen at most, and every one is a walk over the whole text."""


class _Text:
    """What has become of a text: `growth` bytes for each, and the characters that were put in, None for any."""

    def __init__(self) -> None:
        self.growth = 1.0
        self.made: set[str] | None = set()

    def take(self, step: Step) -> None:
        kind = step["type"]
        if kind == "Replace":
            self._replace(step["pattern"], step["content"])
        elif kind == "Prepend":  # before every piece between added tokens, of which there are fewer than bytes
            self._put(step["prepend"], len(step["prepend"].encode()))
        else:
            factor = _charsmap(step) if kind == "Precompiled" else FACTORS.get(kind, UNKNOWN)
            self.growth = min(HUGE, self.growth * factor)
            if factor > 1:
                self.made = None

    def _replace(self, pattern: Mapping[str, str], content: str) -> None:
        plain = pattern.get("String", "")
        if plain and self.made is not None and self.made.isdisjoint(plain):  # of the text's own characters alone
            self._put(content, len(content.encode()) / len(plain.encode()))
        else:
            factor = len(content.encode()) / len(plain.encode()) if plain else len(content.encode()) + 1
            self.growth = min(HUGE, self.growth * max(1, factor))
            self.made = None if self.made is None else self.made | set(content)

    def _put(self, content: str, share: float) -> None:
        self.growth += share
        if self.made is not None:
            self.made |= set(content)


def encoded_growth(steps: Mapping[str, Any]) -> tuple[float, float]:
    """(a, b): n bytes become at most a * n + b bytes or tokens, by normaliser, pre-tokeniser and post-processor."""
    text = _Text()
    for step in itertools.chain(
        _flat(steps["normalizer"], "normalizers"), _flat(steps["pre_tokenizer"], "pretokenizers")
    ):
        text.take(step)
    factor, around = 1.0, 0.0
    for step in _flat(steps["post_processor"], "processors"):
        more, put = _template(step)
        factor, around = min(HUGE, factor * more), min(HUGE, around * more + put)
    return min(HUGE, text.growth * factor), around


def decoded_growth(decoder: Step | None) -> float:
    """Bytes that a decoder makes of one byte of tokens at most."""
    text = _Text()
    for step in _flat(decoder, "decoders"):
        text.take(step)
    return text.growth


def _flat(step: Step | None, name: str) -> list[Step]:
    found: list[Step] = []
    waiting = [step] if step is not None else []
    while waiting:
        each = waiting.pop()
        if each["type"] == "Sequence":
            waiting += reversed(each[name])
        else:
            found.append(each)
        if len(waiting) + len(found) > MAX_STEPS:
            raise ValueError(f"it has more than {MAX_STEPS} {name}")
    return found


def _template(step: Step) -> tuple[float, float]:
    """How often a post-processor repeats the text's tokens, and how many of its own it adds."""
    if step["type"] != "TemplateProcessing":
        return 1, 2
    pieces = [piece for piece in step["single"] if "SpecialToken" in piece]
    special = step["special_tokens"]
    own = sum(len(special[piece["SpecialToken"]["id"]]["ids"]) for piece in pieces)
    return max(1, len(step["single"]) - len(pieces)), own


def _charsmap(step: Step) -> float:
    """The longest text of a SentencePiece map of characters: a trie behind its length, and texts that end in zero.
    Raises ValueError for a map without a trie, in which the library would look nevertheless."""
    data = base64.b64decode(step["precompiled_charsmap"] or "")
    size = struct.unpack_from("<I", data)[0] if len(data) >= 4 else 0
    if not size or size % 4 or size > len(data) - 4:
        raise ValueError("its map of characters has no trie")
    return max(1, *(len(text) for text in data[4 + size :].split(b"\0")))
