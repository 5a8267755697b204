"""The process in which chat templates render: nobody has vetted them, so it may use little memory and little time.

It is started by renderer.py, reads requests and writes answers as JSON behind their lengths, and ends with its input.
A template that takes too long is ended by the system, with its process. It imports nothing heavy: what it takes to
start is what a first answer waits for.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any, BinaryIO, NoReturn

from jinja2 import ext
from jinja2.environment import Template
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.utils import Namespace

from edgeexport.limits import UNTRUSTED
from edgeexport.session.sandbox import BoundedEnvironment

LENGTH = 8
"""Bytes of a message's length, the lowest first."""


def main() -> None:
    """The process."""
    serve(sys.stdin.buffer, sys.stdout.buffer)


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until there are no more. A request has `source` and, where it is to be rendered and not only
    compiled, `variables` and the time `now`; an answer has `text` or `failed`, and `last` where no other request should
    be made of this process."""
    with suppress(ValueError, OSError):  # macOS has no limit of this kind, and then the time alone is bounded
        resource.setrlimit(resource.RLIMIT_AS, (UNTRUSTED.memory_bytes, UNTRUSTED.memory_bytes))
    while len(size := requests.read(LENGTH)) == LENGTH:
        signal.setitimer(signal.ITIMER_PROF, UNTRUSTED.cpu_seconds)
        answer: dict[str, Any]
        try:
            answer = _answer(json.loads(requests.read(int.from_bytes(size, "little"))))
        except MemoryError:
            failed = f"the template needs more than {UNTRUSTED.memory_bytes >> 20} MiB of memory"
            answer = {"failed": failed, "last": True}  # what is left of the memory is in pieces
        except Exception as error:  # noqa: BLE001 - whatever a template makes Python raise is the template's doing
            answer = {"failed": (str(error) or type(error).__name__)[:1000]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        data = json.dumps(answer).encode("ascii")
        answers.write(len(data).to_bytes(LENGTH, "little") + data)
        answers.flush()


def _answer(request: Mapping[str, Any]) -> dict[str, str]:
    environment, template = _compiled(request["source"])
    if "variables" not in request:
        return {"text": ""}
    environment.begin(datetime.fromisoformat(request["now"]))
    pieces: list[str] = []
    length = 0
    for piece in template.generate(request["variables"]):
        length += len(piece)
        if length > UNTRUSTED.text:
            raise SecurityError(f"the template writes more than {UNTRUSTED.text} characters")
        pieces.append(piece)
    return {"text": "".join(pieces)}


@lru_cache(maxsize=1)
def _compiled(source: str) -> tuple[BoundedEnvironment, Template]:
    """A template and its environment with what transformers gives templates."""
    if len(source) > UNTRUSTED.text:
        raise SecurityError(f"the template has more than {UNTRUSTED.text} characters")
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
        "strftime_now": lambda form: environment.now.strftime(form),
        "dict": _TemplateDict(),
        "namespace": _TemplateNamespace,
    }
    return environment, environment.template(source)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


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
