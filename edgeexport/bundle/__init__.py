"""Bundles: what a build leaves behind, opened, verified and described without torch."""

from edgeexport.bundle.bundle import Bundle, open_bundle

__all__ = ["Bundle", "open_bundle"]
