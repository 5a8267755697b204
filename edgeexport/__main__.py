"""`python -m edgeexport` and the console script: the command `edgeexport`."""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Run the command line. Until it listens to signals itself, Ctrl-C ends the process without a word: there is
    nothing to clean up, and a traceback out of an import says nothing."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda number, _: os._exit(128 + number))
    from edgeexport import cli_edge

    cli_edge.main()


if __name__ == "__main__":
    main()
