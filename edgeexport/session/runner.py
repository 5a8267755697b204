"""What a backend offers to a session: one open decoder with its KV cache, and graphs that keep nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgeexport.core import Array


@dataclass(frozen=True)
class Call:
    """One call of a decoder: `fed` are token ids int64 [T], or embeddings float32 [T,hidden] where the model has its
    embedding apart; they go to cache slots `position`.. . `rope` int64 [3,T] is for decoders with M-RoPE."""

    fed: Array
    position: int
    rope: Array | None = None

    def inputs(self) -> dict[str, Array]:
        """The call as a graph's inputs by name, its cache apart."""
        named = {
            "input_ids" if self.fed.ndim == 1 else "inputs_embeds": self.fed[None],
            "position": np.array([self.position], np.int64),
        }
        return named if self.rope is None else {**named, "rope_positions": self.rope[:, None]}


class DecoderRunner(Protocol):
    """One open decoder artifact with its KV cache, at batch 1."""

    context: int
    """Slots in the cache."""
    vocab: int
    """Number of logits."""
    runtime_seconds: float
    """Total seconds spent inside the runtime's call so far."""

    def step(self, fed: Array, position: int, rope: Array | None = None) -> NDArray[np.float32]:
        """Make one `Call`: write the keys and values of T tokens at cache slots position..position+T-1.

        Returns the logits [vocab] of the last token: a view that the next step overwrites.
        """
        ...

    def close(self) -> None:
        """Release the cache and the runtime."""
        ...


class GraphRunner(Protocol):
    """One open artifact without state: an encoder, an embedding table."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Inputs and outputs by the names and shapes of the component's signature."""
        ...

    def close(self) -> None:
        """Release the runtime."""
        ...
