"""The syntax of an agent's call, do(name="text", name=[1,2]): a parser that repairs what can be read in one way only.

No eval and no recursion: text is matched once from left to right, in time linear in its length.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

WS: Final = r"[ \t\r\n]*+"
WRAPPING: Final = r"(?:[ \t\r\n]|<\|[A-Za-z0-9_]{1,32}\|>|</?answer>)*+"
"""What may stand around a call without a meaning of its own: white space, special tokens of the model, answer tags."""

_WORD: Final = r"[A-Za-z_][A-Za-z0-9_]*+"
_BEFORE: Final = re.compile(WRAPPING)
_FUNCTION: Final = re.compile(rf"({_WORD}){WS}\({WS}")
_KEYWORD: Final = re.compile(rf"({_WORD}){WS}={WS}")
_SPACE: Final = re.compile(WS)
_BARE: Final = re.compile(r"""[^ \t\r\n,()\[\]"'=]++""")
_AFTER: Final = re.compile(rf"{WRAPPING}\Z")
_QUOTE: Final = {'"': re.compile(r'\\.|"', re.DOTALL), "'": re.compile(r"\\.|'", re.DOTALL)}
_AFTER_STRING: Final = re.compile(rf"{WS}(?:,{WS}{_WORD}{WS}=|,?{WS}\))")
_ESCAPE: Final = re.compile(r"\\(u[0-9a-fA-F]{4}|[\"'\\/ntr])")
_ESCAPED: Final = {"n": "\n", "t": "\t", "r": "\r"}
_SURROGATES: Final = range(0xD800, 0xE000)


class Problem(Exception):
    """Why the text is no such call, and at which character. `parse_action` catches it: it is a result, not an error."""

    def __init__(self, problem: str, position: int) -> None:
        super().__init__(problem)
        self.problem = problem
        self.position = position


@dataclass(frozen=True)
class Value:
    """A keyword's value: its text (a string's content, anything else as written) and, in a list, the items."""

    kind: Literal["string", "list", "bare"]
    text: str
    position: int
    items: tuple[str, ...] = ()
    note: str = ""


def parse_call(text: str) -> tuple[str, dict[str, Value], int]:
    """(function, keywords in their order, position of the closing bracket) of the only call in `text`.

    The function is do or finish. Raises Problem for any other text.
    """
    start = _past(_BEFORE, text, 0)
    function = _FUNCTION.match(text, start)
    if function is None or function[1] not in {"do", "finish"}:
        empty = start == len(text)
        raise Problem("the answer is empty" if empty else "the answer is neither do(...) nor finish(...)", start)
    keywords: dict[str, Value] = {}
    at = function.end()
    while not text.startswith(")", at):
        name = _KEYWORD.match(text, at)
        if name is None:
            raise _expected("a keyword and =", text, at)
        if name[1] in keywords:
            raise Problem(f"{short(name[1])} is given twice", at)
        keywords[name[1]], end = _value(text, name.end())
        at = _past(_SPACE, text, end)
        if text.startswith(",", at):
            at = _past(_SPACE, text, at + 1)
        elif not text.startswith(")", at):
            raise _expected("a comma or )", text, at)
    if _AFTER.match(text, at + 1) is None:
        raise Problem("there is more text after the call", at + 1)
    return function[1], keywords, at


def _past(pattern: re.Pattern[str], text: str, at: int) -> int:
    """The position after what `pattern` skips at `at`."""
    found = pattern.match(text, at)
    return found.end() if found else at


def _expected(what: str, text: str, at: int) -> Problem:
    return Problem(f"{what} should stand here" if at < len(text) else "the call breaks off before its closing )", at)


def _value(text: str, at: int) -> tuple[Value, int]:
    """The value that begins at `at`, and the position after it."""
    if text.startswith(("'", '"'), at):
        return _string(text, at)
    if text.startswith(("[", "("), at):
        return _list(text, at)
    bare = _BARE.match(text, at)
    if bare is None:
        raise _expected("a value", text, at)
    return Value("bare", bare[0], at), bare.end()


def _string(text: str, at: int) -> tuple[Value, int]:
    """A quoted string. A quote ends it where a keyword or ) follows. So text="say "hi"" can be read although its own
    quotes are not escaped; where several quotes could be the end, nothing is guessed."""
    quotes = (found.start() for found in _QUOTE[text[at]].finditer(text, at + 1) if found[0] == text[at])
    end = next(quotes, None)
    if end is None:
        raise Problem("the string that begins here is not closed", at)
    note = ""
    if _AFTER_STRING.match(text, end + 1) is None:
        ends = [quote for quote in quotes if _AFTER_STRING.match(text, quote + 1)]
        if len(ends) > 1:
            raise Problem("the string that begins here has unescaped quotes and could end in several places", at)
        if ends:  # else what follows the first quote is wrong, and the caller says how
            end, note = ends[0], "its quotes were not escaped"
    return Value("string", _unescaped(text[at + 1 : end]), at, note=note), end + 1


def _unescaped(content: str) -> str:
    r"""`content` with \" \' \\ \/ \n \t \r and \uXXXX replaced; any other backslash, as in C:\dir, stays."""
    return _ESCAPE.sub(lambda found: _character(found[1]), content) if "\\" in content else content


def _character(escape: str) -> str:
    if escape[0] == "u":
        code = int(escape[1:], 16)
        return "\\" + escape if code in _SURROGATES else chr(code)
    return _ESCAPED.get(escape, escape)


def _list(text: str, at: int) -> tuple[Value, int]:
    """Numbers or words in [] or (), flat."""
    closing = "]" if text[at] == "[" else ")"
    items: list[str] = []
    here = _past(_SPACE, text, at + 1)
    while not text.startswith(closing, here):
        item = _BARE.match(text, here)
        if item is None:
            raise _expected("a number", text, here)
        items.append(item[0])
        here = _past(_SPACE, text, item.end())
        if text.startswith(",", here):
            here = _past(_SPACE, text, here + 1)
        elif not text.startswith(closing, here):
            raise _expected(f"a comma or {closing}", text, here)
    return Value("list", text[at : here + 1], at, tuple(items)), here + 1


def short(text: str) -> str:
    """At most 40 characters of a text, for a message."""
    return text if len(text) <= 40 else text[:39] + "…"
