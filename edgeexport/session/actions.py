"""AutoGLM-Phone's answers as typed actions: the calls it may make, their places in pixels, and their JSON.

    do(action="Tap", element=[x,y])        finish(message="...")

The calls are those of the model's public system prompt (Open-AutoGLM, phone_agent/config/prompts_zh.py). Nothing here
raises for what a model wrote: an answer that is no action is `Malformed`. docs/actions.md has the rules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

import msgspec

from edgeexport import errors
from edgeexport.session.answers import AnswerSplitter, Channel, Thought, split_answer
from edgeexport.session.call_syntax import Problem, Value, parse_call, short

__all__ = [
    "Action", "AnswerSplitter", "Back", "CallAPI", "Channel", "Done", "DoubleTap", "Finish", "Home", "Interact",
    "Launch", "LongPress", "Malformed", "Note", "Swipe", "TakeOver", "Tap", "Thought", "Type", "TypeName", "Wait",
    "kind_of", "parse_action", "split_answer", "to_json", "to_pixels",
]  # fmt: skip

MAX_ANSWER_CHARS: Final = 65_536
"""Longest answer that is parsed. The model's own limit is 3000 tokens, some 15,000 characters."""
MAX_WAIT_SECONDS: Final = 600.0
"""The prompt's Wait is for a page to load; a longer one would only hang the device."""

Point: TypeAlias = tuple[int, int]
"""(x, y) in thousandths of the screen's width and height, each 0..999, from the top left corner."""


class Parsed(msgspec.Struct, frozen=True, kw_only=True, tag_field="action", omit_defaults=True):
    """What all actions have: `notes` on what was repaired while reading, and `extra` keywords that nothing here reads
    (strings as they are, other values as written)."""

    notes: tuple[str, ...] = ()
    extra: Mapping[str, str] = msgspec.field(default_factory=dict)


class Launch(Parsed, frozen=True, tag="Launch"):
    """Open an app by its name on the screen."""

    app: str


class Tap(Parsed, frozen=True, tag="Tap"):
    """Tap a point. A `message` marks it as sensitive (payment, privacy): ask the user before."""

    element: Point
    message: str | None = None


class Type(Parsed, frozen=True, tag="Type"):
    """Put text into the focused field, replacing what is there."""

    text: str


class TypeName(Parsed, frozen=True, tag="Type_Name"):
    """The same for a person's name."""

    text: str


class Interact(Parsed, frozen=True, tag="Interact"):
    """Several things would do: ask the user which."""


class Swipe(Parsed, frozen=True, tag="Swipe"):
    """Drag from `start` to `end`."""

    start: Point
    end: Point


class Note(Parsed, frozen=True, tag="Note"):
    """Remember this page for a later summary; the message is usually "True"."""

    message: str


class CallAPI(Parsed, frozen=True, tag="Call_API"):
    """Summarise or comment on the pages noted so far."""

    instruction: str


class LongPress(Parsed, frozen=True, tag="Long Press"):
    """Press a point and hold."""

    element: Point


class DoubleTap(Parsed, frozen=True, tag="Double Tap"):
    """Tap a point twice, quickly."""

    element: Point


class TakeOver(Parsed, frozen=True, tag="Take_over"):
    """The user must act: log in, solve a captcha."""

    message: str


class Back(Parsed, frozen=True, tag="Back"):
    """The device's back button."""


class Home(Parsed, frozen=True, tag="Home"):
    """The device's home button."""


class Wait(Parsed, frozen=True, tag="Wait"):
    """Let `duration` seconds pass, 0..600."""

    duration: float


class Finish(Parsed, frozen=True, tag="finish"):
    """The task is over; `message` is for the user."""

    message: str


class Malformed(msgspec.Struct, frozen=True, tag_field="action", tag="malformed"):
    """No action: what was wrong with the answer, and at which character of it (counted from 0 in code points).

    `answer` is what was given, cut after MAX_ANSWER_CHARS.
    """

    answer: str
    problem: str
    position: int


Done: TypeAlias = (
    Launch | Tap | Type | TypeName | Interact | Swipe | Note | CallAPI | LongPress | DoubleTap | TakeOver
    | Back | Home | Wait | Finish
)  # fmt: skip
"""What a device can carry out."""
Action: TypeAlias = Done | Malformed

_DO: Final[Mapping[str, type[Done]]] = {
    str(kind.__struct_config__.tag): kind
    for kind in (
        Launch, Tap, Type, TypeName, Interact, Swipe, Note, CallAPI, LongPress, DoubleTap, TakeOver, Back, Home, Wait,
    )
}  # fmt: skip


def kind_of(action: Action) -> str:
    """The action's name as the model writes it ("Long Press"), or "finish", or "malformed"."""
    return str(type(action).__struct_config__.tag)


# from keywords to fields

_NUMBER: Final = re.compile(r"[+-]?[0-9]{1,9}(?:\.[0-9]{1,9})?")
_SECONDS: Final = re.compile(r" *([0-9]{1,9}(?:\.[0-9]{1,9})?) *(?:s|secs?|seconds?|秒|秒钟)? *")


def parse_action(answer: str) -> Action:
    """The action in an answer such as `do(action="Tap", element=[500,300])`; `Malformed` for any other text.

    White space, the model's special tokens and answer tags around the call are skipped. Keywords come in any order;
    those that the action does not have are kept in `extra`. What was repaired is told in `notes`.
    """
    if len(answer) > MAX_ANSWER_CHARS:
        problem = f"the answer has {len(answer)} characters; at most {MAX_ANSWER_CHARS} are read"
        return Malformed(answer[:MAX_ANSWER_CHARS], problem, MAX_ANSWER_CHARS)
    try:
        function, keywords, end = parse_call(answer)
        return _action(function, keywords, end)
    except Problem as found:
        return Malformed(answer, found.problem, found.position)


def _text(name: str, value: Value) -> tuple[str, str]:
    if value.kind == "list":
        raise Problem(f"{name} is a list, not a string", value.position)
    return value.text, "it was not quoted" if value.kind == "bare" else value.note


def _point(name: str, value: Value) -> tuple[Point, str]:
    if value.kind != "list":
        raise Problem(f"{name} is {short(value.text)}, not [x,y]", value.position)
    if len(value.items) != 2:
        raise Problem(f"{name} has {len(value.items)} numbers; [x,y] has 2", value.position)
    numbers = [_coordinate(name, item, value.position) for item in value.items]
    x, y = (math.floor(number + 0.5) for number in numbers)
    return (x, y), "" if numbers == [x, y] else "rounded to whole numbers"


def _coordinate(name: str, item: str, position: int) -> float:
    if _NUMBER.fullmatch(item) is None:
        raise Problem(f"{name} holds {short(item)}, which is not a number", position)
    if not 0 <= float(item) <= 999:
        raise Problem(f"{name} holds {item}, which is not in 0..999", position)
    return float(item)


def _duration(name: str, value: Value) -> tuple[float, str]:
    found = _SECONDS.fullmatch(value.text)
    if value.kind == "list" or found is None:
        raise Problem(f'{name} is {short(value.text)}, not like "2 seconds"', value.position)
    if float(found[1]) > MAX_WAIT_SECONDS:
        raise Problem(f"{name} is {found[1]} seconds; at most {MAX_WAIT_SECONDS:g} are waited", value.position)
    return float(found[1]), ""


_READERS: Final[Mapping[str, Callable[[str, Value], tuple[Any, str]]]] = {
    "app": _text,
    "text": _text,
    "message": _text,
    "instruction": _text,
    "element": _point,
    "start": _point,
    "end": _point,
    "duration": _duration,
}
"""Every field of every action: a keyword means the same in all of them. Gives the value and a note on its repair."""


def _action(function: str, keywords: dict[str, Value], end: int) -> Done:
    notes: list[str] = []
    kind: type[Done] = Finish
    if function == "do":
        if "action" not in keywords:
            raise Problem("do(...) has no action", end)
        kind = _kind(keywords["action"], notes)
        keywords = {key: value for key, value in keywords.items() if key != "action"}
    name = str(kind.__struct_config__.tag)
    fields = {field.name: field.required for field in msgspec.structs.fields(kind) if field.name in _READERS}
    missing = [field for field, required in fields.items() if required and field not in keywords]
    if missing:
        raise Problem(f"{name} needs {' and '.join(missing)}", end)
    values: dict[str, Any] = {}
    for field in [field for field in fields if field in keywords]:
        values[field], note = _READERS[field](field, keywords[field])
        notes += [f"{field}: {note}"] if note else []
    extra = {key: value.text for key, value in keywords.items() if key not in fields}
    return kind(**values, notes=tuple(notes), extra=extra)


def _kind(value: Value, notes: list[str]) -> type[Done]:
    """The action of that name; another spelling of it ("long_press") is taken, with a note."""
    for name, kind in _DO.items():
        if value.kind != "list" and _plain(value.text) == _plain(name):
            if value.text != name:
                notes.append(f"action: read {value.text} as {name}")
            return kind
    raise Problem(f"no action is named {short(value.text)}; {errors.suggest(value.text[:40], _DO)}", value.position)


def _plain(name: str) -> str:
    return name[:40].lower().replace(" ", "").replace("_", "")


# pixels and JSON


def to_pixels(action: Action, width: int, height: int) -> dict[str, Point]:
    """The action's points by field name in pixels of a picture: x in 0..width-1, y in 0..height-1; {} without points.

    `int(x / 1000 * width)` in double precision, as Open-AutoGLM's `_convert_relative_to_absolute` computes it.
    Raises: UsageError `no-pixels` for a picture without pixels, or a hand-made action whose point is not in 0..999.
    """
    if width < 1 or height < 1:
        raise errors.no_pixels(f"the picture is {width} x {height} pixels")
    points: dict[str, Point] = {}
    for name in ("element", "start", "end"):
        point: Point | None = getattr(action, name, None)
        if point is not None:
            if not all(0 <= value <= 999 for value in point):
                raise errors.no_pixels(f"{name} is {list(point)}; both numbers must be in 0..999")
            points[name] = (int(point[0] / 1000 * width), int(point[1] / 1000 * height))
    return points


def to_json(action: Action, size: tuple[int, int] | None = None) -> dict[str, Any]:
    """The action as plain values for JSON: "action", its fields, and "notes" and "extra" where there are any.

    With `size` = (width, height) each point's pixels follow as "element_pixels", "start_pixels", "end_pixels".
    Raises: what `to_pixels` raises.
    """
    plain: dict[str, Any] = msgspec.to_builtins(action)
    if size is not None:
        width, height = size
        plain |= {f"{name}_pixels": point for name, point in to_pixels(action, width, height).items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}
