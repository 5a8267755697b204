"""The command line's outer edge: streams and signals of a process, and every failure as findings and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer
from typer.exceptions import TyperException

from edgeexport import process, supervise
from edgeexport.cli import app
from edgeexport.console import Console


def main() -> None:
    """The console script."""
    console = Console(supervised=True)
    process.own_streams()
    process.listen(console)
    code = execute(sys.argv[1:], console)
    process.listen_no_more()
    supervise.done(code)
    sys.exit(code)


def execute(arguments: Sequence[str], console: Console | None = None) -> int:
    """Run one command line and return its exit code. Every failure ends here, as findings or as a bug of ours.

    With a `console` that is supervised, a command that runs artifacts returns twice: in the child that does its work,
    and in the parent.
    """
    console = console or Console()
    try:
        code = _execute(console, list(arguments) or ["--help"])
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        # whoever read our output has left: say nothing, and keep the interpreter's own flush quiet too
        process.give_up(1, 2)
        return process.PIPE_CLOSED
    except process.StreamFailed as problem:
        process.give_up(1)
        console.as_json = False
        return _report(console, problem, arguments)
    except (KeyboardInterrupt, process.Ended) as stop:  # while it was said what failed
        return process.exit_code(stop)
    return code


def _execute(console: Console, arguments: list[str]) -> int:
    try:
        with typer.main.get_command(app).make_context("edgeexport", arguments, obj=console) as context:
            context.command.invoke(context)
    except typer.Exit as exit_:
        return exit_.exit_code
    except (KeyboardInterrupt, process.Ended) as stop:
        return process.exit_code(stop)
    except (BrokenPipeError, process.StreamFailed):
        raise
    except Exception as error:  # noqa: BLE001 - the outermost edge: nothing goes on from here
        if console.stop is not None:  # a library made it out of an interrupt
            return process.exit_code(console.stop)
        return _report(console, error, arguments)
    return 0


def _report(console: Console, error: Exception, arguments: Sequence[str]) -> int:
    from edgeexport import errors
    from edgeexport.doctor import extra_of

    failure: errors.EdgeExportError
    if isinstance(error, TyperException):
        # where parsing stopped early, --json has not been seen yet
        console.as_json = console.as_json or "--json" in arguments
        place = getattr(error, "ctx", None)
        failure = errors.bad_command_line(place.command_path if place else "edgeexport", error.format_message())
    elif isinstance(error, errors.EdgeExportError):
        failure = error
    elif isinstance(error, process.StreamFailed):
        failure = errors.stream_not_writable(error.strerror or str(error))
    elif isinstance(error, ModuleNotFoundError) and (extra := extra_of(error.name or "")) is not None:
        failure = errors.missing_package(error.name or "", extra)
    elif isinstance(error, OSError) and error.errno is not None:
        failure = errors.system_refused(error.filename, error.strerror or str(error))
    else:
        failure = errors.internal_error(type(error).__name__, str(error))
    if console.verbosity >= 2:
        console.traceback(error)
    console.failure(failure)
    return failure.exit_code
