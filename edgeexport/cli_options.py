"""What the values of options are judged by, before a command runs."""

from __future__ import annotations

from pathlib import Path

import typer
from typer import CallbackParam


def set_json(context: typer.Context, value: bool) -> None:
    """One document instead of text."""
    context.obj.as_json = value


def set_quiet(context: typer.Context, value: bool) -> None:
    """Results alone."""
    context.obj.quiet = value


def set_verbose(context: typer.Context, value: int) -> None:
    """More log records."""
    context.obj.verbosity = value
    context.obj.log_to_stderr()


def out_folder(value: Path | None) -> Path | None:
    """A folder to write to. Raises: UsageError `output-not-writable`."""
    if value is not None:
        from edgeexport import outputs

        outputs.refuse_folder(value)
    return value


def out_file(value: Path | None) -> Path | None:
    """A file to write. Raises: UsageError `output-not-writable`."""
    if value is not None:
        from edgeexport import outputs

        outputs.refuse_file(value)
    return value


def text(context: typer.Context, param: CallbackParam, value: str | None) -> str | None:
    """Text for a model. Raises: UsageError `bad-command-line` where its bytes are not UTF-8."""
    if value is not None and any(0xD800 <= ord(character) < 0xE000 for character in value):
        from edgeexport import errors

        raise errors.bad_command_line(context.command_path, f"--{param.name} is no text in UTF-8")
    return value


def size(option: str, text: str | None) -> int | None:
    """The bytes that an option like `--max-rss 1.5G` means. Raises: UsageError `bad-size`."""
    from edgeexport import errors
    from edgeexport.units import parse_size

    if text is None:
        return None
    size = parse_size(text)
    if size is None:
        raise errors.bad_size(option, text)
    return size
