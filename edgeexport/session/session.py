"""The session: feed tokens to an open decoder, keep its position, refuse misuse."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from edgeexport import errors
from edgeexport.session.runner import DecoderRunner

Tokens = Sequence[int] | NDArray[np.integer]

PREFILL_CHUNK = 512
"""Longest piece of a prompt that the runner sees at once: the memory of activations grows with it."""


class Session:
    """One conversation with a decoder, at batch 1. Not safe to use from several threads at once.

    The cache is changed in place, so `truncate` only moves `position`: the slots behind it are written again before
    anything attends to them.
    """

    def __init__(self, runner: DecoderRunner) -> None:
        self.runner = runner
        self._position = 0
        self._closed = False
        self._one = np.zeros(1, np.int64)

    @property
    def position(self) -> int:
        """Number of tokens in the cache."""
        return self._position

    @property
    def context(self) -> int:
        """Number of tokens that the cache can hold."""
        return self.runner.context

    @property
    def vocab(self) -> int:
        """Number of token ids."""
        return self.runner.vocab

    def prefill(self, tokens: Tokens) -> NDArray[np.float32]:
        """Append one or more tokens to the cache.

        Returns the logits [vocab] float32 of the last token, a view that the next call overwrites. When a call is
        refused or fails, the position stays where it was.
        Raises bad-token, context-full, session-closed.
        """
        self._refuse_closed()
        ids = checked_tokens(tokens, self.vocab)
        self._refuse_overflow(len(ids))
        logits = self.runner.step(ids[:PREFILL_CHUNK], self._position)
        for start in range(PREFILL_CHUNK, len(ids), PREFILL_CHUNK):
            logits = self.runner.step(ids[start : start + PREFILL_CHUNK], self._position + start)
        self._position += len(ids)
        return logits

    def decode(self, token: int) -> NDArray[np.float32]:
        """Append one token; the same as `prefill([token])`, without its checks of arrays.

        Returns the logits [vocab] float32, a view that the next call overwrites.
        Raises bad-token, context-full, session-closed.
        """
        self._refuse_closed()
        if isinstance(token, bool) or not isinstance(token, int | np.integer):
            raise errors.bad_token(f"decode takes one whole number, not {type(token).__name__}")
        if not 0 <= token < self.vocab:
            raise errors.bad_token(f"id {token} is not in 0..{self.vocab - 1}")
        self._refuse_overflow(1)
        self._one[0] = token
        logits = self.runner.step(self._one, self._position)
        self._position += 1
        return logits

    def truncate(self, length: int) -> None:
        """Forget all tokens but the first `length`. Raises bad-truncate, session-closed."""
        self._refuse_closed()
        whole = isinstance(length, int | np.integer) and not isinstance(length, bool)
        if not whole or not 0 <= length <= self._position:
            raise errors.bad_truncate(length, self._position)
        self._position = int(length)

    def reset(self) -> None:
        """Forget all tokens. Raises session-closed."""
        self.truncate(0)

    def close(self) -> None:
        """Release the cache and the runtime; calling it again does nothing."""
        if not self._closed:
            self._closed = True
            self.runner.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _refuse_closed(self) -> None:
        if self._closed:
            raise errors.session_closed()

    def _refuse_overflow(self, count: int) -> None:
        if self._position + count > self.context:
            raise errors.context_full(self._position, count, self.context)


def checked_tokens(tokens: Tokens, vocab: int) -> NDArray[np.int64]:
    """The tokens as int64 [T], contiguous. Raises bad-token unless they are one or more ids below `vocab`."""
    try:
        ids = np.asarray(tokens)
    except ValueError as error:
        raise errors.bad_token("a flat list of whole numbers is needed") from error
    if ids.ndim != 1 or ids.size == 0:
        raise errors.bad_token(f"one or more ids in a flat list are needed, not shape {list(ids.shape)}")
    if ids.dtype.kind not in "iu":
        raise errors.bad_token(f"whole numbers are needed, not {ids.dtype.name}")
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= vocab:
        raise errors.bad_token(f"id {lowest if lowest < 0 else highest} is not in 0..{vocab - 1}")
    return np.ascontiguousarray(ids, np.int64)
