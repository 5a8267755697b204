"""Chat templates, rendered exactly as transformers' `apply_chat_template` renders them.

The rules follow `transformers/utils/chat_template_utils.py` of version 5.23: block trimming, the globals and filters a
template sees, messages without their None values, the older names of reasoning text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from edgeexport import errors
from edgeexport.session.renderer import SHARED, Renderer, RenderingFailed

Message = Mapping[str, Any]
"""One turn: `role`, `content`, and what else the template reads (tool_calls, reasoning_content)."""

_REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """A chat template's source and the special tokens it may name (`bos_token` and the like)."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self.special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        now: datetime | None = None,
        **variables: Any,
    ) -> str:
        """The text to tokenise with `add_special_tokens=False`. `variables` are the template's own switches; `now` is
        the local time that a template may write through `strftime_now`, the present one by default. The text depends
        on these alone: a template that draws at random fails.

        Raises chat-template-failed.
        """
        if not messages:
            raise errors.chat_template_failed("there are no messages")
        given = {
            **self.special_tokens,
            **variables,
            "messages": [_message(message) for message in messages],
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            plain = {name: _plain(value) for name, value in given.items()}
            return SHARED.render(self.source, plain, (now or datetime.now()).isoformat())
        except RenderingFailed as problem:
            raise errors.chat_template_failed(str(problem)) from problem
        except RecursionError as problem:
            raise errors.chat_template_failed("messages or tools are nested too deeply") from problem

    def warm(self) -> None:
        """Start what renders, so that the first prompt does not wait for it. Raises chat-template-failed."""
        try:
            SHARED.start()
        except RenderingFailed as problem:
            raise errors.chat_template_failed(str(problem)) from problem

    def check(self) -> None:
        """Refuse what cannot be compiled, draws at random, or writes another text in another process: a bundle with it
        could not be verified.

        Raises: CheckpointError `chat-template-unusable`.
        """
        now = datetime.now().isoformat()
        given = {**self.special_tokens, "messages": [{"role": "user", "content": "a"}], "add_generation_prompt": True}
        other = Renderer()
        try:
            SHARED.render(self.source, None, now)
            if _attempt(SHARED, self.source, given, now) != _attempt(other, self.source, given, now):
                raise RenderingFailed("it writes another text each time, for the same messages")
        except RenderingFailed as problem:
            raise errors.chat_template_unusable(str(problem)) from problem
        finally:
            other.close()


def _attempt(renderer: Renderer, source: str, given: Mapping[str, Any], now: str) -> str | None:
    """The text, or None of a template that asks for other messages."""
    try:
        return renderer.render(source, given, now)
    except RenderingFailed:
        return None


def _message(message: Message) -> dict[str, Any]:
    """A message without its None values, with the reasoning under every name that templates read."""
    if not isinstance(message, Mapping):
        raise errors.chat_template_failed(f"a message is a mapping with role and content, not {errors.shown(message)}")
    present = {name: value for name, value in message.items() if value is not None}
    reasoning = next((present[name] for name in _REASONING_NAMES if name in present), None)
    return present if reasoning is None else {"thinking": reasoning, **present, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """A copy of `value` in JSON's own types: a template gets no object with methods that the sandbox does not know."""
    if value is None or type(value) in {str, int, float, bool}:
        return value
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return str.__str__(value)
    raise errors.chat_template_failed(
        f"messages and tools hold text, numbers, lists and mappings by text, not {errors.shown(value)}"
    )
