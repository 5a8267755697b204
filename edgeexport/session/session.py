"""The session: feed tokens to an open decoder, keep its position, refuse misuse."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from edgeexport import errors
from edgeexport.core import Array
from edgeexport.session.audio import Sound, read_wav
from edgeexport.session.image_file import Image, read_image
from edgeexport.session.inputs import Features, Inputs
from edgeexport.session.runner import DecoderRunner

Tokens = Sequence[int] | NDArray[np.integer]

PREFILL_CHUNK = 512
"""Longest piece of a prompt that the runner sees at once: the memory of activations grows with it."""


class Session:
    """One conversation with a decoder, at batch 1. Not safe to use from several threads at once.

    The cache is changed in place, so `truncate` only moves `position`: the slots behind it are written again before
    anything attends to them. `inputs` is there for models with an embedding of their own, and takes pictures and
    sound.
    """

    def __init__(self, runner: DecoderRunner, inputs: Inputs | None = None) -> None:
        self.runner = runner
        self.inputs = inputs
        self._position = 0
        self._rope = np.arange(runner.context + 1)
        """M-RoPE position of the token that would follow so many cached ones; a picture makes it lag behind."""
        self._attended: tuple[Features, ...] = ()
        self._attended_from = 0
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

    def encode_image(self, image: Image | Path | str | bytes) -> Features:
        """What the model sees of a picture (decoded, a file, or a file's bytes): to be given to `prefill`.

        Raises modality-missing, session-closed, and what reading a picture raises.
        """
        self._refuse_closed()
        decoded = image if isinstance(image, Image) else read_image(Path(image) if isinstance(image, str) else image)
        return self._inputs("picture", "vision").encode(self._inputs("picture", "vision").prepare_image(decoded))

    def encode_audio(self, sound: Sound | Path | str | bytes) -> Features:
        """What the model hears in a sound (samples, a wav file, or its bytes): to be given to `prefill`.

        Raises modality-missing, session-closed, and what reading a wav raises.
        """
        self._refuse_closed()
        decoded = sound if isinstance(sound, Sound) else read_wav(Path(sound) if isinstance(sound, str) else sound)
        return self._inputs("sound", "audio").encode(self._inputs("sound", "audio").prepare_audio(decoded))

    def prefill(self, tokens: Tokens, features: Sequence[Features] = ()) -> NDArray[np.float32]:
        """Append one or more tokens to the cache, and what `encode_image` or `encode_audio` made, in order.

        Returns the logits [vocab] float32 of the last token, a view that the next call overwrites. When a call is
        refused or fails, the position stays where it was. A placeholder of a picture must be there once per feature:
        `inputs.expand` repeats it.
        Raises bad-token, context-full, session-closed, modality-missing, image-tokens-mismatch.
        """
        self._refuse_closed()
        ids = checked_tokens(tokens, self.vocab)
        self._refuse_overflow(len(ids))
        fed, rope, after = self._fed(ids, features)
        logits = self.runner.step(fed[:PREFILL_CHUNK], self._position, _part(rope, 0))
        for start in range(PREFILL_CHUNK, len(ids), PREFILL_CHUNK):
            logits = self.runner.step(fed[start : start + PREFILL_CHUNK], self._position + start, _part(rope, start))
        if features and self.inputs is not None and self.inputs.contract.joining == "attend":
            self._attended, self._attended_from = tuple(features), self._position
        if rope is not None:  # inside a picture there is no place where text could go on
            self._rope[self._position + 1 : self._position + len(ids)] = rope.max(axis=0)[:-1] + 1
        self._position += len(ids)
        self._rope[self._position] = after
        return logits

    def decode(self, token: int) -> NDArray[np.float32]:
        """Append one token of an answer: as `prefill([token])`, but an image token is a word like any other here.

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
        fed, rope, after = self._fed(self._one, (), written=True)
        logits = self.runner.step(fed, self._position, rope)
        self._position += 1
        self._rope[self._position] = after
        return logits

    def truncate(self, length: int) -> None:
        """Forget all tokens but the first `length`. Raises bad-truncate, session-closed."""
        self._refuse_closed()
        whole = isinstance(length, int | np.integer) and not isinstance(length, bool)
        if not whole or not 0 <= length <= self._position:
            raise errors.bad_truncate(length, self._position)
        self._position = int(length)
        if self._position <= self._attended_from:
            self._attended = ()

    def reset(self) -> None:
        """Forget all tokens. Raises session-closed."""
        self.truncate(0)

    def close(self) -> None:
        """Release the cache and the runtime; calling it again does nothing."""
        if not self._closed:
            self._closed = True
            self.runner.close()
            if self.inputs is not None:
                self.inputs.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _fed(
        self, ids: NDArray[np.int64], features: Sequence[Features], *, written: bool = False
    ) -> tuple[Array, Array | None, int]:
        """(what the decoder is fed, its M-RoPE positions, the position after them) for token ids [T]."""
        start = int(self._rope[self._position])
        if self.inputs is None:
            if features:
                raise errors.modality_missing("picture or sound", "embed")
            return ids, None, start + len(ids)
        attends = self.inputs.contract.joining == "attend"
        made = self.inputs.feed(ids, features or (self._attended if attends else ()), start, written=written)
        return made.embeds, made.rope, made.next_rope

    def _inputs(self, what: str, component: str) -> Inputs:
        if self.inputs is None:
            raise errors.modality_missing(what, component)
        return self.inputs

    def _refuse_closed(self) -> None:
        if self._closed:
            raise errors.session_closed()

    def _refuse_overflow(self, count: int) -> None:
        if self._position + count > self.context:
            raise errors.context_full(self._position, count, self.context)


def _part(rope: Array | None, start: int) -> Array | None:
    return None if rope is None else rope[:, start : start + PREFILL_CHUNK]


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
