"""Seeded mutations of files that nobody has vetted: the same seed always makes the same bad input.

`mutated_json` keeps a value's shape and breaks one to three places in it, and `json_bytes` writes the result down;
`mutated_bytes` knows no format. None of them changes what it is given. A result may be equal to the original: a
mutation is an input to try, not a promise that it is bad.
"""

from __future__ import annotations

import copy
import json
import math
import random
import sys
from collections.abc import Callable
from typing import Any

DEPTH = 2_000
"""Nesting of the deepest value: beyond Python's own recursion limit of 1,000, and what JSON files can say."""

ODD_NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 10**9, 2**53 + 1, 2**63 - 1, 2**63),
    *(2**64 - 1, 2**64, -(2**31), -(2**63), -(2**63) - 1, 10**30, 10**400, -(10**400)),
    *(0.5, -0.5, -0.0, 1e-300, 5e-324, 1e300, 1.7976931348623157e308, math.nan, math.inf, -math.inf),
)
ODD_TEXTS: tuple[str, ...] = (
    *("", " ", "0", "-1", "257", "1e999", "NaN", "true", "null", "\n", "..", "../x", "/", "C:\\x", "~", "x" * 100_000),
    *("\0", "a\0b", "\ud800", "\udfff\ud800", "\ufeff", "\u202e", "\xe9", "e\u0301", "\u6f22", "\U0001f600"),
    *("(a+)+$", "(", "[", "\\", "(?:a|b)" * 30, "(" * 600 + ")" * 600, "a{1000}{1000}", "(?<=a*)b", "AAAAAAAA"),
    *("%s%n", "{{1}}", "{% x", "${x}", "<s>", "<unk>", "<|im_start|>", "__class__"),
)
ODD_VALUES: tuple[Any, ...] = (None, True, False, [], {}, [[]], [{}], {"": None}, [None], [0], ["a", 1], {"type": "x"})

Place = tuple[Any, Any]
"""A container and the key or index in it."""


def mutated_json(value: Any, seed: int) -> Any:
    """A copy of a JSON value (dicts, lists, texts, numbers, booleans, None) with one to three places broken.

    A place gets another type, an odd number or text, another place's value, or is doubled, renamed, removed, emptied,
    or nested deeply; lists are shuffled, cut and lengthened. The result may hold NaN, numbers beyond 64 bits, lone
    surrogates and nesting of 2,000.
    """
    dice = random.Random(seed)
    if dice.random() < 0.01:
        return _odd(dice)
    changed = copy.deepcopy(value)
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        places = _places(changed)
        if places:
            container, key = _drawn(dice, places)
            dice.choice(_CHANGES)(dice, container, key, [place for _, place in places])
    places = _places(changed)
    if places and dice.random() < 0.02:  # last, since nothing that recurses may touch it
        container, key = _drawn(dice, places)
        _nest(dice, container, key, DEPTH)
    return changed


def json_bytes(value: Any) -> bytes:
    """JSON of any depth that `mutated_json` makes: lone surrogates are escapes, NaN and infinities as Python writes."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, 10 * DEPTH))
    try:
        return json.dumps(value).encode()
    finally:
        sys.setrecursionlimit(limit)


def mutated_bytes(data: bytes, seed: int) -> bytes:
    """`data` with one to four changes: bits flipped, bytes overwritten, removed, doubled, moved, cut off or added."""
    dice = random.Random(seed)
    changed = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 4))):
        at = dice.randint(0, len(changed))
        length = min(dice.choice((1, 1, 2, 4, 8, 64, 1024)), len(changed) - at)
        kind = dice.randrange(8)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << dice.randrange(8)
        elif kind == 1:
            changed[at : at + length] = dice.randbytes(length)
        elif kind == 2:
            changed[at : at + length] = bytes([dice.choice((0x00, 0x7F, 0x80, 0xFF))]) * length
        elif kind == 3:
            del changed[at : at + length]
        elif kind == 4:
            changed[at:at] = changed[at : at + length] * dice.choice((1, 1, 2, 100))
        elif kind == 5:
            number = dice.choice((0, 1, -1, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63), dice.getrandbits(62)))
            width = dice.choice((2, 4, 8))
            changed[at : at + width] = (number % (1 << 8 * width)).to_bytes(width, dice.choice(("little", "big")))
        elif kind == 6:
            del changed[at:]
        else:
            changed[at:at] = dice.randbytes(dice.choice((1, 4, 16, 4096)))
    return bytes(changed)


def _places(value: Any) -> list[tuple[int, Place]]:
    """Every place in a value with its depth."""
    found: list[tuple[int, Place]] = []
    waiting: list[tuple[int, Any]] = [(0, value)] if isinstance(value, dict | list) else []
    while waiting:
        depth, container = waiting.pop()
        for key, value in container.items() if isinstance(container, dict) else enumerate(container):
            found.append((depth, (container, key)))
            if isinstance(value, dict | list):
                waiting.append((depth + 1, value))
    return found


def _drawn(dice: random.Random, places: list[tuple[int, Place]]) -> Place:
    """A place of a drawn depth: a vocabulary has a hundred thousand places, and the type of a tokenizer is one."""
    wanted = dice.randint(0, max(depth for depth, _ in places))
    return dice.choice([place for depth, place in places if depth == wanted])


def _odd(dice: random.Random) -> Any:
    return copy.deepcopy(dice.choice(dice.choice((ODD_NUMBERS, ODD_TEXTS, ODD_VALUES))))


def _replace(dice: random.Random, container: Any, key: Any, _: list[Place]) -> None:
    container[key] = _odd(dice)


def _remove(dice: random.Random, container: Any, key: Any, _: list[Place]) -> None:
    del container[key]


def _copy_of_another(dice: random.Random, container: Any, key: Any, places: list[Place]) -> None:
    other, name = dice.choice(places)
    container[key] = copy.deepcopy(other[name])


def _wrap(dice: random.Random, container: Any, key: Any, _: list[Place]) -> None:
    _nest(dice, container, key, dice.choice((1, 2, 100)))


def _nest(dice: random.Random, container: Any, key: Any, turns: int) -> None:
    value, name = container[key], dice.choice(("a", "type", "normalizers", "pretokenizers"))
    as_list = dice.random() < 0.5
    for _ in range(turns):
        value = [value] if as_list else {name: value}
    container[key] = value


def _near(dice: random.Random, container: Any, key: Any, _: list[Place]) -> None:
    """Another value of the same type: what a check of types does not see."""
    value = container[key]
    if isinstance(value, bool):
        container[key] = not value
    elif isinstance(value, int | float):
        container[key] = dice.choice(ODD_NUMBERS)
    elif isinstance(value, str):
        odd = dice.choice(ODD_TEXTS)
        container[key] = dice.choice((odd, value + odd, odd + value, value[:-1], value.swapcase(), value[::-1]))
    elif isinstance(value, list) and value:
        dice.choice((dice.shuffle, list.reverse, list.clear, list.pop, _double))(value)
    elif isinstance(value, dict) and value:
        _rename(dice, value, dice.choice(list(value)), [])


def _double(values: list[Any]) -> None:
    values += copy.deepcopy(values)


def _rename(dice: random.Random, container: Any, key: Any, _: list[Place]) -> None:
    """A key's value under another key, or a list lengthened."""
    if isinstance(container, dict):
        container[dice.choice((*ODD_TEXTS, str(key) + "x", str(key).swapcase()))] = container.pop(key)
    else:
        container.insert(key, _odd(dice))


_CHANGES: tuple[Callable[[random.Random, Any, Any, list[Place]], None], ...] = (
    *(_replace, _replace, _near, _near),
    *(_remove, _copy_of_another, _wrap, _rename),
)
