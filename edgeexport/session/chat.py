"""Chat templates, rendered exactly as transformers' `apply_chat_template` renders them.

The rules follow `transformers/utils/chat_template_utils.py` of version 5.23: block trimming, the globals and filters a
template sees, messages without their None values, the older names of reasoning text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import ext
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.utils import Namespace

from edgeexport import errors
from edgeexport.session.sandbox import MAX_TEXT, BoundedEnvironment

Message = Mapping[str, Any]
"""One turn: `role`, `content`, and what else the template reads (tool_calls, reasoning_content)."""

_REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")
_FAILURES = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a template can make Python raise: all of it is the template's doing, none of it ours."""


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
        **variables: Any,
    ) -> str:
        """The text to tokenise with `add_special_tokens=False`. `variables` are the template's own switches.

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
            return _rendered(self.source, {name: _plain(value) for name, value in given.items()})
        except _FAILURES as error:
            raise errors.chat_template_failed(str(error) or type(error).__name__) from error


def _rendered(source: str, variables: Mapping[str, Any]) -> str:
    """Raises what the template raises. The environment counts one rendering's work, so it is made anew each time."""
    if len(source) > MAX_TEXT:
        raise SecurityError(f"the template has more than {MAX_TEXT} characters")
    environment = BoundedEnvironment([ext.loopcontrols])

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # jinja2's own filter escapes HTML
        environment.charge_value(value)
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _TemplateDict(),
        "namespace": _TemplateNamespace,
    }
    pieces: list[str] = []
    length = 0
    for piece in environment.template(source).generate(variables):
        length += len(piece)
        if length > MAX_TEXT:
            raise SecurityError(f"the template writes more than {MAX_TEXT} characters")
        pieces.append(piece)
    return "".join(pieces)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


class _TemplateDict:
    """`dict` for templates: the type itself would offer more than making dictionaries."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _TemplateNamespace(Namespace):
    """`namespace` for templates: names with a leading underscore are refused."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # jinja2's own trick, so that namespace(self=...) works
        self, given = args[0], args[1:]
        values = dict(*given, **kwargs)
        for name in values:
            _refuse_underscore(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        Namespace.__setitem__(self, name, value)


def _refuse_underscore(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a template may not store {name!r} in a namespace")


def _message(message: Message) -> dict[str, Any]:
    """A message without its None values, with the reasoning under every name that templates read."""
    if not isinstance(message, Mapping):
        raise errors.chat_template_failed(f"a message is a mapping with role and content, not {message!r}")
    present = {name: value for name, value in message.items() if value is not None}
    reasoning = next((present[name] for name in _REASONING_NAMES if name in present), None)
    return present if reasoning is None else {"thinking": reasoning, **present, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """A copy of `value` in JSON's own types: a template gets no object with methods that the sandbox does not know."""
    if value is None or type(value) in {str, int, float, bool}:
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    if isinstance(value, str):
        return str.__str__(value)
    raise errors.chat_template_failed(f"messages and tools hold text, numbers, lists and mappings, not {value!r}")
