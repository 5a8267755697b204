"""JSON that anyone may have written, read within bounds: the one way into Python's parser for foreign documents."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Any, NoReturn

from edgeexport.limits import UNTRUSTED

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse(data: bytes, *, unique: bool = True) -> Any:
    """The document in `data`, UTF-8: finite numbers, text that is Unicode, nested no deeper than `UNTRUSTED.depth`, so
    that it can be written again. With `unique`, no key is given twice; without, the last one counts.

    Raises ValueError, with what is wrong, and nothing else.
    """
    items = data.count(b",") + data.count(b"[") + data.count(b"{")
    if items > UNTRUSTED.items:
        raise ValueError(f"it has more than {UNTRUSTED.items} values")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique if unique else None,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except RecursionError as problem:
        raise ValueError("it is nested too deeply") from problem
    _refuse_depth(value)
    if _SURROGATE.search(data) and not _is_unicode(value):
        raise ValueError("a text in it has half a surrogate pair, which is no Unicode")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:80]} is too large")
    return number


def _refuse_depth(value: Any) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(UNTRUSTED.depth):
        level = [child for item in level for child in _children(item) if isinstance(child, dict | list)]
        if not level:
            return
    raise ValueError(f"it is nested more than {UNTRUSTED.depth} deep")


def _children(item: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return item.values() if isinstance(item, dict) else item


def _is_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
