"""The one door into the tokenizers library: a tokenizer.json is foreign bytes, and so is what is done by it.

The library panics, by an exception that no handler of `Exception` sees; its regular expressions may take longer than
anyone waits; and steps of a small file can make gigabytes of a short text. Every call goes through `Library`: what the
library raises is a `tokenizer-unusable`, what a text may grow to is known before it does, and a call that may take long
runs in a thread that is given up after its time.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from edgeexport import errors
from edgeexport.session.growth import decoded_growth, encoded_growth

MAX_TOKENIZER_BYTES = 128 << 20
"""No tokenizer comes near this; a larger file is refused before it is read."""
MAX_GROWN = 1 << 25
"""Bytes or tokens that one text may become on its way: the library takes some 30 bytes for each."""
SECONDS, SECONDS_PER_BYTE = 1.0, 2e-5
"""Of processor time for one call that may take long; published tokenizers take 1e-6 s for each byte."""

_T = TypeVar("_T")
_lock = threading.Lock()


class Library:
    """A tokenizer of the tokenizers library, without truncation and padding."""

    def __init__(self, data: bytes, where: object = "tokenizer.json") -> None:
        """Raises tokenizer-unusable."""
        import tokenizers

        self._where = where
        if len(data) > MAX_TOKENIZER_BYTES:
            raise errors.tokenizer_unusable(where, f"{len(data)} bytes is more than any tokenizer needs")
        self._library = self._said(lambda: tokenizers.Tokenizer.from_buffer(data))
        self._library.no_truncation()
        self._library.no_padding()
        parts = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
        states = {name: _state(getattr(self._library, name)) for name in parts}
        self.steps: Mapping[str, Any] = {name: json.loads(state) for name, state in states.items()}
        """The steps around the model, as the library writes them; None for one that is not there."""
        self._growth, self._around = self._said(lambda: encoded_growth(self.steps))
        self._decoded_growth = self._said(lambda: decoded_growth(self.steps["decoder"]))
        self._careful = any(mark in state for state in states.values() for mark in (b'"Regex"', b'"Precompiled"'))

    @property
    def vocab(self) -> int:
        """Number of ids, added tokens included."""
        return int(self._library.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Raises: BundleError `tokenizer-unusable`; UsageError `text-not-unicode`."""
        try:
            size = len(text.encode("utf-8"))
        except UnicodeEncodeError as problem:
            raise errors.text_not_unicode(text) from problem
        grown = (size + 1) * self._growth + self._around
        if grown > MAX_GROWN:
            raise self._unusable(f"it would make {grown:.3g} bytes or tokens of a text of {size} bytes")
        if not self._careful:
            return self._said(lambda: list(self._library.encode(text, add_special_tokens=add_special_tokens).ids))
        # a batch of one: the library lets other threads run while it works at a batch
        return self._in_time(
            lambda: list(self._library.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids), size
        )

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Raises: BundleError `tokenizer-unusable`; UsageError `bad-token`."""
        try:
            size = sum(len(self._library.id_to_token(token) or "") + 4 for token in ids)
        except (OverflowError, TypeError) as error:
            raise errors.bad_token("ids are whole numbers from 0") from error
        if size * self._decoded_growth > MAX_GROWN:
            raise self._unusable(f"it would make {size * self._decoded_growth:.3g} bytes of {len(ids)} tokens")
        if not self._careful:
            return self._said(lambda: str(self._library.decode(ids, skip_special_tokens=skip_special_tokens)))
        return self._in_time(
            lambda: str(self._library.decode_batch([ids], skip_special_tokens=skip_special_tokens)[0]), size
        )

    def token_id(self, token: str) -> int | None:
        """The id of one token's text, or None."""
        with suppress(UnicodeEncodeError):
            found: int | None = self._library.token_to_id(token)
            return found
        return None

    def id_to_token(self, token: int) -> str | None:
        """The text of one token, or None. Raises bad-token."""
        try:
            found: str | None = self._library.id_to_token(token)
        except (OverflowError, TypeError) as error:
            raise errors.bad_token("ids are whole numbers from 0") from error
        return found

    def ids(self, *, added: bool) -> dict[str, int]:
        """Every token's id, with those of added tokens where `added`."""
        found: dict[str, int] = self._library.get_vocab(with_added_tokens=added)
        return found

    def added_tokens(self) -> dict[int, Any]:
        """Added tokens by id, as the library has them: content, special, normalized, lstrip, rstrip, single_word."""
        found: dict[int, Any] = self._library.get_added_tokens_decoder()
        return found

    def normalized(self, text: str) -> str:
        """What the normaliser makes of a text. Raises tokenizer-unusable."""
        if self._library.normalizer is None:
            return text
        if (len(text.encode("utf-8")) + 1) * self._growth > MAX_GROWN:
            raise self._unusable("it makes texts too long")
        return self._said(lambda: str(self._library.normalizer.normalize_str(text)))

    def written(self) -> str:
        """tokenizer.json as the library writes it."""
        return self._said(lambda: str(self._library.to_str()))

    def _unusable(self, problem: str) -> errors.BundleError:
        return errors.tokenizer_unusable(self._where, problem)

    def _said(self, call: Callable[[], _T]) -> _T:
        """What a call returns; what it raises is the file's doing."""
        try:
            return call()
        except (KeyboardInterrupt, SystemExit, errors.EdgeExportError):
            raise
        except BaseException as problem:  # pyo3's PanicException is no Exception
            raise self._unusable(str(problem)[:1000] or type(problem).__name__) from problem

    def _in_time(self, call: Callable[[], _T], size: int) -> _T:
        """The same for a call that may take longer than anyone waits, or panic in a way that the library prints."""
        answer: list[Callable[[], _T]] = []

        def work() -> None:
            try:
                found = call()
            except BaseException as problem:  # noqa: BLE001 - it is raised again where it is waited for
                answer.append(_raiser(problem))
            else:
                answer.append(lambda: found)

        bound = SECONDS + SECONDS_PER_BYTE * size
        with _quiet():
            worker = threading.Thread(target=work, name="tokenizer", daemon=True)
            started, spent = time.monotonic(), time.process_time()
            worker.start()
            # both clocks: on a machine that is busy with other things a second is not a second's work
            while worker.is_alive() and min(time.monotonic() - started, time.process_time() - spent) < bound:
                worker.join(0.05)
        if not answer:
            raise self._unusable(f"its regular expressions take more than {bound:.1f} s for a text of {size} bytes")
        return self._said(answer[0])


def _raiser(problem: BaseException) -> Callable[[], Any]:
    def again() -> Any:
        raise problem

    return again


def _state(part: Any) -> bytes:
    return bytes(part.__getstate__()) if part is not None else b"null"


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing reaches the process's standard error: a panic prints its backtrace there before it is an exception. For
    one caller at a time; another one meanwhile is heard."""
    if not _lock.acquire(blocking=False):
        yield
        return
    try:
        with suppress(OSError):  # it may be closed
            kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.dup2(nowhere, 2)
                yield
            finally:
                os.dup2(kept, 2)
                os.close(kept)
                os.close(nowhere)
            return
        yield
    finally:
        _lock.release()
