"""An agent's answer as it comes out of the model: the thought and the answer told apart, whole or while it streams.

The format is the one of AutoGLM-Phone's public system prompt (Open-AutoGLM, phone_agent/config/prompts_zh.py):

    <think>...</think><answer>do(action="Tap", element=[x,y])</answer>
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from edgeexport.session.call_syntax import WRAPPING, WS

Channel = Literal["think", "answer", "text"]

_TAGS: Final[Mapping[str, Channel]] = {
    "<think>": "think",
    "</think>": "text",
    "<answer>": "answer",
    "</answer>": "text",
}
"""A tag, and the channel of what follows it, whatever came before: so nested and repeated tags need no rules."""
_TAG: Final = re.compile("|".join(_TAGS))

_WHITE: Final = " \t\r\n"
_CALL: Final = re.compile(rf"(?<![A-Za-z0-9_])(?:do\({WS}action|finish\({WS}message){WS}=")
_CLOSED_CALL: Final = re.compile(rf"\){WRAPPING}\Z")


@dataclass(frozen=True)
class Thought:
    """`think`: the reasoning, None where there is none; `answer`: what it led to; both without white space around.

    `complete` is False where the text visibly breaks off: within a thought, before any answer, or within an open
    answer that does not end as a call does. Such an answer is to be shown, not carried out.
    """

    think: str | None
    answer: str
    complete: bool


def split_answer(text: str) -> Thought:
    """The thought and the answer in a whole generation, whatever tags it has; any text is taken.

    The answer is the first closed answer block; else the last open one, since `</answer>` may be a stop token that
    nobody sees; else the text outside of the thoughts, from its first `do(action=` or `finish(message=` on where there
    is one: tags that are special tokens are gone in many decoders.
    """
    thoughts: list[str] = []
    closed: list[str] = []
    opened: list[str] = []
    outside: list[str] = []
    blocks = _blocks(text)
    for channel, block, tag in blocks:
        if not block:
            continue
        if channel == "think" or tag == "</think>":  # the opening tag may be in the prompt
            thoughts.append(block)
        elif channel == "answer":
            (closed if tag == "</answer>" else opened).append(block)
        else:
            outside.append(block)
    if closed:
        return Thought(_joined(thoughts), closed[0], True)
    answer = opened[-1] if opened else "\n".join(outside)
    call = None if opened else _CALL.search(answer)
    if call is not None:
        before, answer = answer[: call.start()].strip(_WHITE), answer[call.start() :]
        thoughts += [before] if before else []
    whole = bool(answer) and blocks[-1][0] != "think"
    if opened or call is not None:
        whole = whole and _CLOSED_CALL.search(answer) is not None
    return Thought(_joined(thoughts), answer, whole)


def _blocks(text: str) -> list[tuple[Channel, str, str]]:
    """(channel, what stands in it, the tag that ends it) for all of `text`; the last block ends with ""."""
    blocks: list[tuple[Channel, str, str]] = []
    channel: Channel = "text"
    start = 0
    for tag in _TAG.finditer(text):
        blocks.append((channel, text[start : tag.start()].strip(_WHITE), tag[0]))
        channel, start = _TAGS[tag[0]], tag.end()
    rest = text[start:]
    if channel == "answer" and _held(rest).startswith("</"):  # the closing tag itself was cut
        rest = rest[: rest.rindex("<")]
    return [*blocks, (channel, rest.strip(_WHITE), "")]


class AnswerSplitter:
    """The same tags, met while the text is still being written. Tags may be cut anywhere between two pieces.

    What has been handed out cannot be taken back: a text that only later proves to have been a thought, or an answer
    without tags, stays "text". `split_answer` over the whole text decides.
    """

    def __init__(self) -> None:
        self._channel: Channel = "text"
        self._waiting = ""

    def push(self, piece: str) -> list[tuple[Channel, str]]:
        """(channel, text) pairs of what is certain by now; at most 8 characters, a tag's beginning, are held back."""
        text = self._waiting + piece
        found: list[tuple[Channel, str]] = []
        start = 0
        for tag in _TAG.finditer(text):
            found.append((self._channel, text[start : tag.start()]))
            self._channel, start = _TAGS[tag[0]], tag.end()
        self._waiting = _held(text[start:])
        found.append((self._channel, text[start : len(text) - len(self._waiting)]))
        return [(channel, part) for channel, part in found if part]

    def flush(self) -> list[tuple[Channel, str]]:
        """What was held back, when no more will come. The splitter then starts anew."""
        left = [(self._channel, self._waiting)] if self._waiting else []
        self._channel, self._waiting = "text", ""
        return left


def _held(text: str) -> str:
    """The end of `text`, which has no whole tag, that may be the beginning of one."""
    at = text.rfind("<")
    tail = text[at:] if at >= 0 else ""
    return tail if tail and any(tag.startswith(tail) for tag in _TAGS) else ""


def _joined(parts: list[str]) -> str | None:
    return "\n".join(parts) if parts else None
