"""Run a bundle for NNAPI in LiteRT on this machine's processor: as litert_runner.py, but that the loader writes the
KV cache. What an app does with such a bundle on a phone is written here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgeexport.backends.litert_names import DECODE
from edgeexport.backends.litert_runner import (
    Call,
    LiteRtDecoder,
    file_of,
    open_graph,
    read_signature,
)
from edgeexport.core import Array

__all__ = ["NnapiDecoder", "open_decoder", "open_graph", "read_signature"]


class NnapiDecoder(LiteRtDecoder):
    """One decoder at batch 1. After each call the slots of its tokens are filled with what it gave.

    The runtime's C API locks a buffer and writes a part of it; its Python package writes whole ones, so here each cache
    goes over anew.
    """

    GROWS = False

    def __init__(self, path: Path, component: Any, *, threads: int | None, exact: bool) -> None:
        self._held: dict[str, Array] = {}
        self._slices = {str(past): str(added) for past, added in component.state}
        super().__init__(path, component, threads=threads, exact=exact)

    def _new_cache(self, name: str, shape: tuple[int, ...]) -> Any:
        self._held[name] = np.zeros(shape, np.float32)
        return super()._new_cache(name, shape)

    def _run(self, length: int, fed: Array, position: int, rope: Array | None) -> Call:
        call = super()._run(length, fed, position, rope)
        count = len(fed)  # what pads a piece is left out
        for past, added in self._slices.items():
            self._held[past][:, :, position : position + count] = call.output(added)[:, :, :count]
            self._caches[past].write(self._held[past])
        return call


def open_decoder(folder: Path, component: Any, *, threads: int | None = None, exact: bool = False) -> NnapiDecoder:
    """Open a component of a bundle's manifest as a decoder; `exact` as in litert_runner.py.

    Raises: BundleError `artifact-does-not-open` with the runtime's message.
    """
    return NnapiDecoder(folder / file_of(component, DECODE), component, threads=threads, exact=exact)
