"""What a backend offers to a session: one open decoder artifact with its KV cache."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class DecoderRunner(Protocol):
    """One open decoder artifact with its KV cache, at batch 1."""

    context: int
    """Slots in the cache."""
    vocab: int
    """Number of logits."""
    runtime_seconds: float
    """Total seconds spent inside the runtime's call so far."""

    def step(self, tokens: NDArray[np.int64], position: int) -> NDArray[np.float32]:
        """Write the keys and values of `tokens` [T] at cache slots position..position+T-1.

        Returns the logits [vocab] of the last token: a view that the next step overwrites.
        """
        ...

    def close(self) -> None:
        """Release the cache and the runtime."""
        ...
