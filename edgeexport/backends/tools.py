"""Versions of the packages that shape an artifact, from their metadata: importing them takes seconds."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from edgeexport import errors


def versions_of(extra: str, *packages: str) -> dict[str, str]:
    """Version of each package. `extra` installs them. Raises: ToolError `missing-package`."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError as problem:
            raise errors.missing_package(name, extra) from problem
    return found
