"""A jinja2 sandbox for templates that nobody has vetted: no way to Python's internals, bounded work and output.

jinja2's own sandbox keeps templates away from attributes and from changing what they are given. It lets them loop and
build strings without end; this module counts both, so that the same templates are refused on every machine. It covers
loops, calls, operators and the filters and methods that make text longer, not every way to keep a processor busy or to
fill a memory: rendering.py bounds those. What draws at random is refused, since the same messages must give the same
prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any, NoReturn, cast

from jinja2 import nodes
from jinja2.environment import Template
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from edgeexport.limits import UNTRUSTED

_PADDING_METHODS = frozenset({"ljust", "rjust", "center", "zfill", "expandtabs"})
_COUNTING_FILTERS = frozenset({"batch", "center", "indent", "slice", "tojson"})
_WIDE_FORMAT = re.compile(r"%[^a-zA-Z%]*(\d{6,}|\*)")
_WIDE_FORMAT_SPEC = re.compile(r":[^{}]*(\d{6,}|\{)")


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox of one template. `begin` a rendering: it holds that rendering's count of steps, and its time.

    Raises jinja2's SecurityError when a bound is reached.
    """

    now = datetime.min
    """The time that a template may write."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, extensions: Iterable[str | type[Extension]] = ()) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, *extensions], finalize=self._charged
        )
        self._left = UNTRUSTED.steps
        self.filters |= {
            "_each": self._each,
            "_small": _small,
            "_concat": self._concat,
            "replace": self._replace,
            "join": self._join,
            "format": self._format,
            "random": _refuse_chance,
        }
        self.globals["lipsum"] = _refuse_chance

    def begin(self, now: datetime) -> None:
        """Count the steps of a new rendering."""
        self._left = UNTRUSTED.steps
        self.now = now

    def template(self, source: str) -> Template:
        """Compile `source` with its loops, concatenations and counting filters under watch."""
        tree = self.parse(source)
        _Watch().visit(tree)
        tree.set_environment(self)
        return Template.from_code(self, self.compile(tree), self.make_globals(None))

    def spend(self, steps: int) -> None:
        """Count `steps`; raises SecurityError when there were too many."""
        self._left -= steps
        if self._left < 0:
            raise SecurityError(f"the template needs more than {UNTRUSTED.steps} steps")

    def charge_text(self, length: int) -> None:
        """Count the making of a text of `length` characters; raises SecurityError when it is too long."""
        if length > UNTRUSTED.text:
            raise SecurityError(f"the template makes a text of more than {UNTRUSTED.text} characters")
        self.spend(1 + length // 256)

    def charge_value(self, value: object) -> None:
        """Count what it takes to write `value` out: lists may hold themselves many times over."""
        if isinstance(value, str):
            self.charge_text(len(value))
        elif isinstance(value, dict):
            for key, item in value.items():
                self.charge_value(key)
                self.charge_value(item)
        elif isinstance(value, list | tuple):
            self.spend(1)
            for item in value:
                self.charge_value(item)
        else:
            self.spend(1)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            self.charge_text(len(left) + len(right))
        elif operator == "*":
            self._charge_repetition(left, right)
            self._charge_repetition(right, left)
        elif operator == "**" and (abs(left) > UNTRUSTED.width or abs(right) > 64):
            raise SecurityError("the template computes a power that is too large")
        elif operator == "%" and isinstance(left, str):
            _refuse_wide_format(_WIDE_FORMAT, left)
        self.spend(1)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # a wrapped str.format keeps the original method in __wrapped__
        method = getattr(__obj, "__wrapped__", __obj)
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str):
            if name in _PADDING_METHODS:
                for value in args:
                    _small(value)
            elif name in {"format", "format_map"}:
                _refuse_wide_format(_WIDE_FORMAT_SPEC, owner)
            elif name == "replace" and len(args) >= 2:
                __self._charge_replacement(owner, args[0], args[1])
            elif name == "join" and len(args) == 1:
                args = (__self._listed(owner, args[0]),)
        __self.spend(1)
        return super().call(__context, __obj, *args, **kwargs)

    def _charge_repetition(self, text: Any, count: Any) -> None:
        if isinstance(text, str | list | tuple) and isinstance(count, int):
            self.charge_text(len(text) * max(count, 0))

    def _charge_replacement(self, text: str, old: object, new: object) -> None:
        self.charge_text(len(text) + text.count(str(old)) * len(str(new)))

    def _listed(self, separator: str, items: Iterable[Any]) -> list[Any]:
        listed = list(self._each(items))
        for item in listed:
            self.charge_value(item)
        self.charge_text(len(separator) * len(listed) + sum(len(item) for item in listed if isinstance(item, str)))
        return listed

    def _charged(self, value: Any) -> Any:
        self.charge_value(value)
        return value

    def _each(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.spend(1)
            yield item

    def _concat(self, items: list[Any]) -> str:
        return "".join(map(str, self._listed("", items)))

    def _replace(self, text: object, old: object, new: object, count: int | None = None) -> str:
        self._charge_replacement(str(text), old, new)
        return str(text).replace(str(old), str(new), -1 if count is None else count)

    def _join(self, items: Iterable[Any], separator: object = "", attribute: str | int | None = None) -> str:
        if attribute is not None:
            items = map(make_attrgetter(self, attribute), items)
        return str(separator).join(map(str, self._listed(str(separator), items)))

    def _format(self, text: object, *args: Any, **kwargs: Any) -> str:
        if args and kwargs:
            raise TemplateError("format takes values by position or by name, not both")
        _refuse_wide_format(_WIDE_FORMAT, str(text))
        return str(text) % (kwargs or args)


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's text for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as a plain set

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Watch(NodeTransformer):
    """Puts the counting filters of BoundedEnvironment into a parsed template."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered("_each", cast(nodes.Expr, node.iter))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered("_concat", nodes.List(node.nodes, lineno=node.lineno))

    def visit_Call(self, node: nodes.Call) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.node, nodes.Name) and node.node.name == "lipsum":
            _refuse_chance()
        return node

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        self.generic_visit(node)
        if node.name == "random":
            _refuse_chance()
        if node.name in _COUNTING_FILTERS:
            node.args = [_filtered("_small", argument) for argument in node.args]
            for pair in node.kwargs:
                pair.value = _filtered("_small", pair.value)
        return node


def _filtered(name: str, value: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(value, name, [], [], None, None, lineno=value.lineno)


def _refuse_chance(*_: Any, **__: Any) -> NoReturn:
    raise SecurityError("the template draws at random: the same messages would give another prompt each time")


def _small(value: Any) -> Any:
    if isinstance(value, int) and value > UNTRUSTED.width:
        raise SecurityError(f"the template asks for a width or count above {UNTRUSTED.width}")
    return value


def _refuse_wide_format(pattern: re.Pattern[str], text: str) -> None:
    if pattern.search(text):
        raise SecurityError("the template formats with a width that is too large or not written out")
