"""A chat template as the texts between messages, for loaders without Jinja; proven against the template itself.

tokenizer/chat.json, schema "edgeexport.chat/1": `joins` has what stands between two messages, by their roles, "start"
before the first and "answer" behind the last (the generation prompt; a default system message is in "start user").
`content` has for each role what is done to a message's text, see `RULES`; `image` is what stands for a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal

import msgspec

from edgeexport import errors
from edgeexport.session.chat import ChatTemplate
from edgeexport.text_tables import Unsupported

FILE = "tokenizer/chat.json"
SCHEMA: Final = "edgeexport.chat/1"
PART = "chat template"
START, ANSWER = "start", "answer"
END_OF_THOUGHT = "</think>"

RULES: Mapping[str, Callable[[str], str]] = {
    "as-is": lambda text: text,
    "strip": str.strip,
    "after-thought": lambda text: text.split(END_OF_THOUGHT)[-1].lstrip("\n") if END_OF_THOUGHT in text else text,
    "after-thought-strip": lambda text: text.split(END_OF_THOUGHT)[-1].strip(),
}
"""What a template may do to a message's text."""

ROLES = (("user",), ("user", "assistant", "user", "assistant", "user"))
WITH_SYSTEM = (("system", "user"), ("system", "user", "assistant", "user", "assistant", "user"))
"""Conversations that a loader may hold: the last word is the user's."""

CONTENTS = (
    "Plain text.",
    "  spaces  ",
    "\n\nlines\n\n",
    "<think>one</think>two",
    "<think>\none\n</think>\n\n two \n",
    "one</think>two</think>\n three ",
    "</think>",
    "<b> & \"quotes\" 'of' \\both\\ kinds, Größe, 尺寸, 📱",
    "{{ messages }} {% if %} {# #}",
    "",
)
IMAGE = {"type": "image"}


class ChatTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    joins: dict[str, str]
    content: dict[str, str]
    image: str | None = None
    schema: Literal["edgeexport.chat/1"] = SCHEMA

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text of a conversation whose roles follow each other as `joins` has them."""
        before, text = START, ""
        for message in messages:
            role, content = message["role"], message["content"]
            rule = RULES[self.content[role]]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            text += self.joins[f"{before} {role}"]
            text += "".join(rule(part["text"]) if part["type"] == "text" else self.image or "" for part in parts)
            before = role
        return text + self.joins[f"{before} {ANSWER}"]


def chat_table(template: ChatTemplate, *, pictures: bool) -> ChatTable:
    """The table of a template, equal to it on every conversation of `probes`. Raises Unsupported."""
    if "strftime_now" in template.source:
        raise Unsupported(PART, "that writes today's date")
    orders = [*ROLES, *(WITH_SYSTEM if _takes_system(template) else ())]
    joins: dict[str, str] = {}
    for order in orders:
        for name, text in _joins(template, order).items():
            if joins.setdefault(name, text) != text:
                raise Unsupported(PART, f"whose text between {name} depends on more than the roles")
    table = ChatTable(joins, dict.fromkeys(sorted({role for order in orders for role in order}), "as-is"))
    for role in table.content:
        table = _with_rule(table, template, role, orders)
    if pictures:
        shown = _rendered(template, [{"role": "user", "content": [IMAGE, {"type": "text", "text": "Q0Q"}]}])
        opening, closing = joins[f"{START} user"], "Q0Q" + joins[f"user {ANSWER}"]
        if not (shown.startswith(opening) and shown.endswith(closing)):
            raise Unsupported(PART, "whose pictures do not stand where they are given")
        table = msgspec.structs.replace(table, image=shown[len(opening) : -len(closing)])
    for messages in probes(orders, pictures=pictures):
        if table.render(messages) != _rendered(template, messages):
            raise Unsupported(PART, f"that no table of this kind equals, such as for {messages!r}")
    return table


def to_json(table: ChatTable) -> bytes:
    """The one text of this table."""
    return msgspec.json.format(msgspec.json.encode(table, order="deterministic"), indent=1) + b"\n"


def probes(orders: Sequence[Sequence[str]], *, pictures: bool) -> Iterator[list[dict[str, Any]]]:
    """Every order of roles, each with all contents in turn at each place, and with pictures in a user's message."""
    for order in orders:
        for shift in range(len(CONTENTS)):
            yield [
                {"role": role, "content": CONTENTS[(shift + 3 * place) % len(CONTENTS)]}
                for place, role in enumerate(order)
            ]
        if not pictures:
            continue
        one, other = ({"type": "text", "text": text} for text in CONTENTS[:2])
        for parts in ([one], [one, other], [IMAGE, one], [IMAGE, IMAGE, other], [one, IMAGE, other], [IMAGE]):
            yield [{"role": role, "content": parts if role == "user" else "Q"} for role in order]


def _takes_system(template: ChatTemplate) -> bool:
    """Whether the template renders a conversation with a system message at all: some refuse."""
    try:
        template.render([{"role": "system", "content": "S"}, {"role": "user", "content": "U"}])
    except errors.BundleError:
        return False
    return True


def _rendered(template: ChatTemplate, messages: Sequence[Mapping[str, Any]]) -> str:
    try:
        return template.render(messages)
    except errors.BundleError as error:
        raise Unsupported(PART, f"that refuses {[message['role'] for message in messages]}: {error}") from error


def _joins(template: ChatTemplate, order: Sequence[str]) -> dict[str, str]:
    """What stands between messages of these roles, found by contents that nothing else holds."""
    marks = [f"Q{place}Q" for place in range(len(order))]
    messages = [{"role": role, "content": mark} for role, mark in zip(order, marks, strict=True)]
    found: dict[str, str] = {}
    rest, before = _rendered(template, messages), START
    for role, mark in zip(order, marks, strict=True):
        text, at, rest = rest.partition(mark)
        if not at or found.setdefault(f"{before} {role}", text) != text:
            raise Unsupported(PART, f"whose text between {before} and {role} depends on more than the roles")
        before = role
    found[f"{before} {ANSWER}"] = rest
    return found


def _with_rule(table: ChatTable, template: ChatTemplate, role: str, orders: Sequence[Sequence[str]]) -> ChatTable:
    """The table with the first rule for this role's text that gives what the template gives."""
    for name in RULES:
        made = msgspec.structs.replace(table, content={**table.content, role: name})
        conversations = (
            [{"role": each, "content": text if each == role else "Q"} for each in order]
            for order in orders
            if role in order
            for text in CONTENTS
        )
        if all(made.render(messages) == _rendered(template, messages) for messages in conversations):
            return made
    raise Unsupported(PART, f"that changes the text of {role} messages in a way of its own")
