"""The terminal: results go to stdout, narration to stderr. No other module writes to either."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Literal, TextIO

from edgeexport.units import format_bytes, format_number, format_seconds

if TYPE_CHECKING:  # core imports numpy, and `edgeexport --help` must not
    from edgeexport.core import Finding, ParityResult, Progress
    from edgeexport.errors import EdgeExportError

Cell = str | tuple[str, str]
"""A table's cell: text, or text with a rich style."""

VERDICT_STYLES = {"PASS": "green", "FAIL": "bold red", "AMBIGUOUS": "yellow", "NOT_RUN": "bright_black"}
SEVERITY_STYLES = {"error": "bold red", "warning": "bold yellow", "note": "bold cyan"}
FINDINGS = 200
"""At most so many are shown of one failure: a damaged folder of a million files has as many."""
WIDE = 240
"""Columns assumed when nobody looks: a log file is not wrapped."""


def printable(text: str) -> str:
    """The text without control characters but newline and tab: names in a checkpoint and a model's answer are
    foreign, and must not drive the terminal."""
    return "".join(c for c in text if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160))


def render_finding(finding: Finding) -> str:
    """A finding as plain text, without a newline at the end: one headline, then where, why and fix."""
    lines = [f"{finding.severity}[{finding.code}]: {finding.what}"]
    for label, text in (("where", finding.where), ("why", finding.why), ("fix", finding.fix)):
        lines += [f"  {label:<5} {text}".replace("\n", "\n        ")]
    return printable("\n".join(lines))


def to_json(document: Any) -> str:
    """The document as strict JSON, indented, ASCII only. Numbers that are not finite become null."""
    return json.dumps(_plain(document), indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value) if isinstance(value, set | frozenset) else value
        return [_plain(item) for item in items]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, PurePath):
        return str(value)
    if hasattr(value, "tolist"):  # numpy's scalars and arrays
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class Console:
    """One command's voice.

    With `as_json` only `json` writes to stdout, and it writes one document. With `quiet` narration is dropped;
    findings are always shown. `supervised` says that a command may go on in a child process. Colours and progress bars
    appear on a terminal only; NO_COLOR turns colours off.
    """

    def __init__(
        self, *, as_json: bool = False, quiet: bool = False, verbosity: int = 0, supervised: bool = False
    ) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self.verbosity = verbosity
        self.stop: BaseException | None = None
        """What a signal asked for; whoever answers it sets it back."""
        self.supervised = supervised
        self._step_open = False

    # results: stdout

    def result(self, text: str) -> None:
        """One line of result: a path, a summary."""
        if not self.as_json:
            _write(printable(text) + "\n", sys.stdout)

    def stream(self, text: str) -> None:
        """A piece of a model's answer, shown at once and without a newline."""
        if not self.as_json:
            _write(printable(text) if sys.stdout.isatty() else text, sys.stdout)
            sys.stdout.flush()

    def json(self, document: Any) -> None:
        """The command's one JSON document; nothing without `--json`."""
        if self.as_json:
            sys.stdout.write(to_json(document) + "\n")

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[Cell]], *, right: Sequence[str] = ()) -> None:
        """A table without rules, so that it can be piped; the columns named in `right` are right-aligned."""
        if self.as_json:
            return
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for column in columns:
            table.add_column(column, justify="right" if column in right else "left", overflow="fold")
        for row in rows:
            cells = [(cell, "") if isinstance(cell, str) else cell for cell in row]
            table.add_row(*(Text(printable(text), style=style) for text, style in cells))
        _write(_rendered(table, sys.stdout, wrap=True), sys.stdout)

    def fields(self, values: Mapping[str, str]) -> None:
        """Names and values, one pair a line."""
        width = max((len(name) for name in values), default=0)
        for name, value in values.items():
            self.result(f"{name:<{width}}  {value}".rstrip())

    def parity(self, results: Iterable[ParityResult]) -> None:
        """The ladder: one row per comparison, its verdict in colour, a reason beside every NOT_RUN."""
        rows: list[list[Cell]] = [
            [
                result.level,
                result.component,
                result.output,
                _numbers(result.metrics),
                _numbers(result.gate),
                (result.verdict.value, VERDICT_STYLES[result.verdict.value]),
                result.note,
            ]
            for result in results
        ]
        self.table(["level", "component", "output", "measured", "gate", "verdict", "note"], rows)

    def answers(self, answers: Iterable[Mapping[str, Any]]) -> None:
        """What was asked, the original's answer and the artifact's, and how far they agree."""
        rows: list[list[Cell]] = []
        for each in answers:
            place = f"{each['agree']} of {each['tokens']} tokens"
            parted: Cell = (f"{place}, then near a tie", "yellow") if each["near_tie"] else (place, "red")
            agree: Cell = ("to the end", "green") if each["whole"] else parted
            rows.append([each["prompt"], each["original"].strip(), each["artifact"].strip(), agree])
        if rows:
            self.table(["asked", "original", "artifact", "agree"], rows)

    # input: stdin

    def ask(self, prompt: str) -> str | None:
        """One line of input without its end, None when the input has ended. The prompt is for a person only."""
        if sys.stdin.isatty() and sys.stdout.isatty():
            try:
                return input(prompt)
            except EOFError:
                return None
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None

    # narration: stderr

    def say(self, text: str) -> None:
        """One line of narration."""
        if not self.quiet:
            self._narrate(printable(text) + "\n")

    def finding(self, finding: Finding) -> None:
        """An error, warning or note, with where, why and fix. A part of the document instead with `--json`."""
        if self.as_json:
            return
        from rich.text import Text

        text = Text(render_finding(finding))
        text.stylize(SEVERITY_STYLES[finding.severity], 0, len(finding.severity) + len(finding.code) + 2)
        self._narrate(_rendered(text, sys.stderr, wrap=False))

    def failure(self, error: EdgeExportError, document: Mapping[str, Any] | None = None) -> None:
        """The end of a command that failed: its findings, or with `--json` the document with the error added."""
        shown, left_out = error.findings[:FINDINGS], len(error.findings[FINDINGS:])
        for finding in shown:
            self.finding(finding)
        if left_out and not self.as_json:
            self._narrate(f"... and {left_out} more\n")
        codes = [finding.code for finding in error.findings if finding.severity == "error"]
        summary = {"exit_code": error.exit_code, "code": codes[0] if codes else "", "message": str(error)}
        more = {"findings_left_out": left_out} if left_out else {}
        self.json({**(document or {}), "error": summary, "findings": list(shown), **more})

    def traceback(self, error: BaseException) -> None:
        """Where in our code an exception came from; for -vv."""
        import traceback

        self._narrate("".join(traceback.format_exception(error)))

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """One line per step: a mark for its outcome, the title, and the seconds it took."""
        self._go_on()
        start = time.perf_counter()
        if not self.quiet and sys.stderr.isatty():
            self._narrate(f"  {printable(title)}…")
            self._step_open = True
        mark, style = "✕", "red"
        try:
            yield
            mark, style = "✓", "green"
        finally:
            if not self.quiet:
                self._narrate(_styled(mark, style) + f" {printable(title)}  {self._since(start)}\n")

    @contextmanager
    def progress(
        self, label: str, total: int | None = None, unit: Literal["bytes", "steps", "tokens"] = "bytes"
    ) -> Iterator[Progress]:
        """A bar on a terminal, silence elsewhere; yields what is to be called with (done, total).

        `total` may be left out where the first call is the first to know it.
        """
        if self.quiet or not sys.stderr.isatty():
            yield self._go_on
            return
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._narrate("")
        stderr = RichConsole(file=sys.stderr, no_color=not _colour(sys.stderr), highlight=False)
        columns = (TextColumn("  {task.description}", markup=False), BarColumn(), TextColumn("{task.fields[count]}"))
        with Progress(*columns, TimeRemainingColumn(), console=stderr, transient=True) as bar:
            task = bar.add_task(printable(label), total=total, count="")

            def update(done: int, total: int) -> None:
                self._go_on()
                bar.update(task, completed=done, total=total, count=_count(done, total, unit))

            yield update

    def log_to_stderr(self) -> None:
        """Send the package's log records to stderr: warnings, with -v information, with -vv everything."""
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        logger = logging.getLogger("edgeexport")
        logger.handlers = [handler]
        logger.setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(self.verbosity, 2)])

    def _go_on(self, done: int = 0, total: int = 0) -> None:
        """Raise again what a signal asked for, where a library has swallowed it; the progress of those who do not
        watch, too."""
        if self.stop is not None:
            raise self.stop

    def _since(self, start: float) -> str:
        return format_seconds(time.perf_counter() - start)

    def _narrate(self, text: str) -> None:
        if self._step_open:
            sys.stderr.write("\r\x1b[2K")
            self._step_open = False
        _write(text, sys.stderr)
        sys.stderr.flush()


def _numbers(values: Mapping[str, float | int]) -> str:
    return ", ".join(f"{name} {format_number(value)}" for name, value in values.items())


def _count(done: int, total: int, unit: str) -> str:
    show: Callable[[int], str] = format_bytes if unit == "bytes" else str
    return f"{show(done)} / {show(total)}" + ("" if unit == "bytes" else f" {unit}")


def _colour(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _styled(text: str, style: str) -> str:
    from rich.text import Text

    return _rendered(Text(text, style=style), sys.stderr, wrap=False).removesuffix("\n")


def _rendered(renderable: Any, stream: TextIO, *, wrap: bool) -> str:
    """Rich's text for the stream. It is rendered apart and written by us, because rich ends the process itself
    when a pipe closes."""
    from rich.console import Console as RichConsole

    colour = _colour(stream)
    buffer = io.StringIO()
    rich = RichConsole(
        file=buffer,
        width=None if stream.isatty() else WIDE,
        force_terminal=colour,
        color_system="standard" if colour else None,
        highlight=False,
    )
    rich.print(renderable, soft_wrap=not wrap)
    return "\n".join(line.rstrip(" ") for line in buffer.getvalue().split("\n"))  # the padding of last columns


def _write(text: str, stream: TextIO) -> None:
    """Write what the stream can hold: a check mark must not end a build whose log is ASCII."""
    encoding = stream.encoding or "utf-8"
    stream.write(text.encode(encoding, "replace").decode(encoding))
