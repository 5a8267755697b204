"""Sets of characters and the normal form NFC, asked of the tokenizers library itself: its tables decide, not Python's.

A set is a bool array over all code points. The library's tables are of another version of Unicode than Python's.
"""

from __future__ import annotations

import functools
import string
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Chars: TypeAlias = NDArray[np.bool_]
CODES = 0x110000
BLOCK = 1 << 11
"""Characters asked for at a time: the library's time grows faster than the length of a text."""

HANGUL = range(0xAC00, 0xD7A4)
"""Syllables, composed by arithmetic: The Unicode Standard, chapter 3.12."""
GREEK_YPOGEGRAMMENI = "\u0345"
"""The only mark of combining class 240, the highest: any other mark behind it is moved before it."""


@dataclass(frozen=True)
class Composition:
    """What NFC needs, Hangul apart. `decomposed`: character to its full decomposition. `classes`: character to its
    combining class, where that is not 0. `composed`: two characters to the one that replaces them."""

    decomposed: dict[int, tuple[int, ...]]
    classes: dict[int, int]
    composed: dict[tuple[int, int], int]


def chars(codes: Iterable[int]) -> Chars:
    """The set of these code points."""
    found = np.zeros(CODES, np.bool_)
    found[list(codes)] = True
    return found


@functools.cache
def matched(regex: str) -> Chars:
    """Every character that a regular expression for one character matches."""
    from tokenizers import Regex, pre_tokenizers

    return _removed(pre_tokenizers.Split(Regex(regex), "removed"))


@functools.cache
def numeric() -> Chars:
    """Every character that the step `Digits` takes for one."""
    from tokenizers import pre_tokenizers

    found = np.zeros(CODES, np.bool_)
    step = pre_tokenizers.Digits(individual_digits=True)
    for start, text in _blocks():
        # a letter between any two: characters that are no digits stay with it, a digit stands alone
        for piece, (first, _) in step.pre_tokenize_str("a" + "a".join(text)):
            found[start + first // 2] = len(piece) == 1 and first % 2 == 1
    return found


def folded(letter: str) -> Chars:
    """Every character that is this ASCII letter where case is ignored."""
    from tokenizers import Regex, pre_tokenizers

    step = pre_tokenizers.Split(Regex(f"(?i:{letter})"), "removed")
    return chars(ord(char) for char in _alike()[letter.lower()] if not step.pre_tokenize_str(char))


@functools.cache
def long_folds() -> frozenset[str]:
    """Several ASCII letters that are one character where case is ignored, such as those of a ligature."""
    return frozenset(fold for char in map(chr, _codes()) if len(fold := char.casefold()) > 1 and fold.isascii())


@functools.cache
def composition() -> Composition:
    """The library's canonical decompositions, combining classes and compositions."""
    from tokenizers import normalizers

    nfd, nfc = normalizers.NFD(), normalizers.NFC()
    decomposed, classes, composed = {}, {}, {}
    for _, text in _blocks():
        for char in text if nfd.normalize_str(text) != text else "":
            if (whole := nfd.normalize_str(char)) != char and ord(char) not in HANGUL:
                decomposed[ord(char)] = tuple(map(ord, whole))
    for code in _codes():
        if (number := unicodedata.combining(chr(code))) and _moves(nfd, code):
            classes[code] = number
    for code in decomposed:
        pair = unicodedata.decomposition(chr(code)).split()
        if len(pair) == 2 and nfc.normalize_str("".join(chr(int(half, 16)) for half in pair)) == chr(code):
            composed[int(pair[0], 16), int(pair[1], 16)] = code
    return Composition(decomposed, classes, composed)


@functools.cache
def _alike() -> dict[str, list[str]]:
    """Each small ASCII letter and the characters that may be it where case is ignored."""
    found: dict[str, list[str]] = {letter: [] for letter in string.ascii_lowercase}
    for char in map(chr, _codes()):
        for letter in {char.lower(), char.casefold(), char.upper().lower()} & found.keys():
            found[letter].append(char)
    return found


def _moves(nfd: Any, code: int) -> bool:
    """Whether the library knows a mark's combining class: one it does not know stays where it is."""
    if chr(code) == GREEK_YPOGEGRAMMENI:
        return True
    pair: str = nfd.normalize_str(GREEK_YPOGEGRAMMENI + chr(code))
    return pair[-1] == GREEK_YPOGEGRAMMENI


def _codes() -> Iterator[int]:
    """All code points that may stand in a text."""
    return (code for code in range(CODES) if not 0xD800 <= code < 0xE000)


def _blocks() -> Iterator[tuple[int, str]]:
    """All characters in texts of consecutive ones, each with its first code point."""
    for start in range(0, CODES, BLOCK):
        if not 0xD800 <= start < 0xE000:
            yield start, "".join(map(chr, range(start, start + BLOCK)))


def _removed(step: Any) -> Chars:
    """The characters that a pre-tokeniser takes away."""
    found = np.ones(CODES, np.bool_)
    found[0xD800:0xE000] = False
    for start, text in _blocks():
        for _, (first, last) in step.pre_tokenize_str(text):
            found[start + first : start + last] = False
    return found
