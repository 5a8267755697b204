"""`python -m edgeexport` is the command `edgeexport`."""

from edgeexport.cli import main

main()
