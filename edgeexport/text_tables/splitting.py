"""A pre-tokeniser's regular expressions as programs over classes of characters, for loaders without a regex engine.

A program is an ordered list of alternatives; at a place the first that matches gives the next piece, and what none
matches is a piece as well. An alternative is a run of items; an item takes `least` to `most` characters of a class,
as many as it can, and gives back one after the other where what follows does not match: so a regex engine does it.
"""

from __future__ import annotations

import itertools
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from edgeexport.text_tables import Unsupported
from edgeexport.text_tables.unicode import CODES, Chars, chars, folded, long_folds, matched, numeric
from edgeexport.tokenizer_json import Step, flat_steps, pattern

MANY = 0xFFFFFFFF
"""`most` of an item without an upper end."""
MAX_CLASSES = 64
MAX_ITEMS = 64
MAX_PATTERN = 4096
MAX_PARTS = 128
MAX_ALTERNATIVES = 512
MAX_DEPTH = 16
"""What a pattern may be: characters, sets of characters, alternatives once its groups are multiplied out, groups within
groups. The longest that is published has 600 characters, 50 sets, 40 alternatives and two groups."""
SHOWN = 80
"""Characters of a pattern that a message repeats."""

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What `ByteLevel` splits by. Source: tokenizers 0.23, pre_tokenizers/byte_level.rs."""

_PROPERTY = re.compile(r"\\[pP]\{\^?\w+\}|\\[sSdDwWhH]")
_QUANTIFIER = re.compile(r"[?*+]|\{(\d+)(,?)(\d*)\}")
_CONTROLS = {"r": "\r", "n": "\n", "t": "\t", "f": "\f", "v": "\v"}


@dataclass(frozen=True, eq=False)
class Item:
    """`least` to `most` characters of `chars`; with `absent` none of them may follow, and nothing is taken."""

    chars: Chars
    least: int = 1
    most: int = 1
    absent: bool = False


Alternatives = list[list[Item]]


def programs(pre_tokenizer: Step | None) -> list[bytes]:
    """One program for each step that splits, each to be run over the pieces of the one before. Raises Unsupported."""
    found, byte_level = [], False
    for step in flat_steps(pre_tokenizer, "pretokenizers"):
        kind = step["type"]
        if kind == "Split" and step["behavior"] == "Isolated" and not step.get("invert", False):
            literal = isinstance(step["pattern"], dict) and "String" in step["pattern"]
            found.append(_packed(_Parser(re.escape(pattern(step)) if literal else pattern(step)).parse()))
        elif kind == "Digits":
            found.append(_packed([[Item(numeric(), 1, 1 if step.get("individual_digits", False) else MANY)]]))
        elif kind == "ByteLevel" and not step.get("add_prefix_space", True):
            byte_level = True
            if step.get("use_regex", True):
                found.append(_packed(_Parser(GPT2).parse()))
        else:
            raise Unsupported("pre_tokenizer", kind)
    if not byte_level:
        raise Unsupported("pre_tokenizer", "without ByteLevel")
    return found


class _Parser:
    """Reads the part of Oniguruma's syntax that published tokenizers use. `parse` raises Unsupported."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = self.depth = self.parts = 0

    def parse(self) -> Alternatives:
        if len(self.text) > MAX_PATTERN:
            self._refuse(f"more than {MAX_PATTERN} characters")
        found = self._alternatives(ignore_case=False)
        if self.at < len(self.text):
            self._refuse("a bracket too many")
        if any(sum(item.least for item in items) == 0 for items in found):
            self._refuse("an alternative that matches nothing")
        return found

    def _refuse(self, why: str) -> NoReturn:
        shown = self.text if len(self.text) <= SHOWN else f"{self.text[:SHOWN]}..."
        raise Unsupported("pattern", f"{shown!r}, at {self.at}: {why}")

    def _next(self) -> str:
        """The next character, or "" at the end."""
        return self.text[self.at : self.at + 1]

    def _take(self, text: str) -> bool:
        found = self.text.startswith(text, self.at)
        self.at += len(text) * found
        return found

    def _alternatives(self, *, ignore_case: bool) -> Alternatives:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self._refuse(f"more than {MAX_DEPTH} groups within each other")
        found = self._sequence(ignore_case)
        while self._take("|"):
            found += self._sequence(ignore_case)
            self._bound(len(found))
        self.depth -= 1
        return found

    def _bound(self, alternatives: int) -> None:
        if alternatives > MAX_ALTERNATIVES:
            self._refuse(f"groups that make more than {MAX_ALTERNATIVES} alternatives")

    def _sequence(self, ignore_case: bool) -> Alternatives:
        """One alternative; several where it has a group, since a group is multiplied out."""
        found: Alternatives = [[]]
        start = self.at
        while self._next() not in ("", "|", ")"):
            if self._take("(?!"):
                found = _followed(found, [[Item(self._one(ignore_case), absent=True)]])
                if not self._take(")"):
                    self._refuse("looking ahead at more than one character")
            elif (fold := self._take("(?i:")) or self._take("(?:"):
                # (a|b) behind a run of changing length would be tried in another order than a regex engine does
                if any(item.least != item.most for items in found for item in items):
                    self._refuse("a group behind a run of changing length")
                tails = self._alternatives(ignore_case=ignore_case or fold)
                self._bound(len(found) * len(tails))
                found = _followed(found, tails)
                if not self._take(")") or _QUANTIFIER.match(self.text, self.at):
                    self._refuse("a group that is not plain")
            elif self._next() == "(":
                self._refuse("a group that is not plain")
            else:
                found = _followed(found, [[self._item(ignore_case)]])
        written = self.text[start : self.at].lower()
        if ignore_case and any(fold in written for fold in long_folds()):
            self._refuse("letters that are one character where case is ignored")
        return found

    def _item(self, ignore_case: bool) -> Item:
        taken = self._one(ignore_case)
        quantifier = _QUANTIFIER.match(self.text, self.at)
        if quantifier is None:
            return Item(taken)
        self.at = quantifier.end()
        if self._next() in ("?", "+", "*", "{"):
            self._refuse("a lazy or possessive quantifier")
        if quantifier[0] in "?*+":
            return Item(taken, *{"?": (0, 1), "*": (0, MANY), "+": (1, MANY)}[quantifier[0]])
        least = int(quantifier[1])
        most = least if not quantifier[2] else int(quantifier[3]) if quantifier[3] else MANY
        if not least <= most or not most:
            self._refuse("a quantifier that counts backwards")
        return Item(taken, least, most)

    def _one(self, ignore_case: bool) -> Chars:
        """The set of a character, an escape or a bracket."""
        self.parts += 1
        if self.parts > MAX_PARTS:
            self._refuse(f"more than {MAX_PARTS} sets of characters")
        if not self._take("["):
            return self._char(ignore_case)
        negated = self._take("^")
        found = np.zeros(CODES, np.bool_)
        while not self._take("]"):
            if self._next() in ("", "[", "&"):
                self._refuse("a bracket that is not plain")
            first = self._char(ignore_case)
            if self._next() == "-" and self.text[self.at + 1 : self.at + 2] != "]":
                self.at += 1
                last = self._char(ignore_case=False)
                if ignore_case or first.sum() != 1 or last.sum() != 1:
                    self._refuse("a range that is not plain")
                first = chars(range(int(first.argmax()), int(last.argmax()) + 1))
            found |= first
        return ~found if negated else found

    def _char(self, ignore_case: bool) -> Chars:
        known = _PROPERTY.match(self.text, self.at)
        if known is not None:
            self.at = known.end()
            try:
                return matched(known[0])
            except Exception as problem:  # the library raises nothing more specific
                raise Unsupported("pattern", f"{known[0]}, which is no set of characters: {problem}") from problem
        char = self._next()
        self.at += 1
        if char == "\\":
            char = self._next()
            self.at += 1
            if char.isalnum() and char not in _CONTROLS:
                self._refuse(f"the escape \\{char}")
            char = _CONTROLS.get(char, char)
        elif char in (".", "^", "$", "*", "+", "?", "{"):
            self._refuse(f"the sign {char}")
        if not char:
            self._refuse("it ends too early")
        if ignore_case and char.isalpha():
            if not char.isascii():
                self._refuse("a letter outside ASCII where case is ignored")
            return folded(char)
        return chars([ord(char)])


def _followed(heads: Alternatives, tails: Alternatives) -> Alternatives:
    return [head + tail for head, tail in itertools.product(heads, tails)]


def _packed(alternatives: Alternatives) -> bytes:
    """A program as 32-bit numbers, little-endian: number of ranges, each as first code point << 8 | class; number of
    alternatives, each as its number of items, and items as (absent, classes 0-31, classes 32-63, least, most)."""
    items = list(dict.fromkeys(item for each in alternatives for item in each))  # alternatives share items
    if max(map(len, alternatives)) > MAX_ITEMS:
        raise Unsupported("pattern", f"an alternative of more than {MAX_ITEMS} parts")
    # characters that no item tells apart are one class
    rows = np.packbits(np.stack([item.chars for item in items]), axis=0)
    starts = np.concatenate([[0], 1 + np.flatnonzero((rows[:, 1:] != rows[:, :-1]).any(axis=0))])
    kinds, classes = np.unique(rows[:, starts], axis=1, return_inverse=True)
    ranges = list(zip(starts.tolist(), classes.reshape(-1).tolist(), strict=True))
    if kinds.shape[1] > MAX_CLASSES:
        raise Unsupported("pattern", f"more than {MAX_CLASSES} classes of characters")
    numbers = [len(ranges), *(start << 8 | kind for start, kind in ranges), len(alternatives)]
    for each in alternatives:
        numbers.append(len(each))
        numbers += (number for item in each for number in _numbers(item, ranges))
    return struct.pack(f"<{len(numbers)}I", *numbers)


def _numbers(item: Item, ranges: Sequence[tuple[int, int]]) -> list[int]:
    mask = 0
    for start, kind in ranges:
        mask |= int(item.chars[start]) << kind
    return [int(item.absent), mask & 0xFFFFFFFF, mask >> 32, item.least, item.most]
