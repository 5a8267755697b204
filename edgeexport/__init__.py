"""edgeexport: an edge deployment compiler.

    from edgeexport import build, open_bundle

Importing the package loads nothing else; what is asked for is loaded then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeexport.bundle import open_bundle
    from edgeexport.pipeline import build

__all__ = ["__version__", "build", "open_bundle"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "build":
        from edgeexport.pipeline import build

        return build
    if name == "open_bundle":
        from edgeexport.bundle import open_bundle

        return open_bundle
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
