"""Text to token ids and back, through the tokenizers library."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeexport import errors
from edgeexport.session.library import MAX_TOKENIZER_BYTES, Library

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_NAME_ENDING = "_token"
"""Of the name of a special token: bos_token, image_token."""


@dataclass(frozen=True)
class SpecialTokens:
    """`names`: bos_token and the like to their text, as chat templates see them. `stop_ids`: ids that end an answer,
    ascending."""

    names: Mapping[str, str] = field(default_factory=dict)
    stop_ids: tuple[int, ...] = ()


class Tokenizer:
    """A tokenizer.json. Truncation and padding that the file may ask for are switched off."""

    def __init__(self, data: bytes, where: object = "tokenizer.json") -> None:
        """Raises tokenizer-unusable."""
        self._library = Library(data, where)

    @classmethod
    def from_file(cls, path: Path) -> Tokenizer:
        """Raises tokenizer-unusable."""
        try:
            size = path.stat().st_size
            if size > MAX_TOKENIZER_BYTES:
                raise errors.tokenizer_unusable(path, f"{size} bytes is more than any tokenizer needs")
            data = path.read_bytes()
        except OSError as error:
            raise errors.tokenizer_unusable(path, error.strerror or str(error)) from error
        return cls(data, path)

    @property
    def vocab(self) -> int:
        """Number of ids, added tokens included."""
        return self._library.vocab

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`; special tokens written out in it are recognised.

        `add_special_tokens` lets the tokenizer put its own around it: right for plain text, wrong for a rendered chat.
        Raises: UsageError `text-not-unicode`; BundleError `tokenizer-unusable` where the file's own steps fail at the
        text, take too long or make too much of it.
        """
        return self._library.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of all ids together; bytes that are no UTF-8 become U+FFFD. Raises bad-token, tokenizer-unusable."""
        return self._library.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int | None:
        """The id of one token's text, or None."""
        return self._library.token_id(token)

    def stream(self, *, skip_special_tokens: bool = True) -> TextStream:
        """A streaming decoder for one answer."""
        return TextStream(self, skip_special_tokens)

    def ends_in_byte(self, token: int) -> bool:
        """True for the byte tokens of sentencepiece vocabularies, `<0xE4>`. Raises bad-token."""
        text = self._library.id_to_token(token)
        return text is not None and _BYTE_TOKEN.fullmatch(text) is not None


class TextStream:
    """Turns token ids into text as they come: `push` each id, then `flush`.

    All pieces together equal `Tokenizer.decode` of all ids, and no piece ends inside a character. Text is held back
    while it ends in U+FFFD, since the next token may complete the character, and during a run of byte tokens, since
    the decoder judges the whole run at once. Each push decodes a window of a few tokens: the last piece that was
    given out, so that the decoder knows it is not at the start of the text, and what came after it.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []
        self._window = 0
        self._given = 0
        self._in_bytes = False
        self._pieces: list[str] = []

    def push(self, token: int) -> str:
        """The text that became certain with this token; often the token's own, sometimes "". Raises bad-token."""
        self._ids.append(token)
        # a token without text, such as a special one that is skipped, does not end a run of bytes
        self._in_bytes = self._tokenizer.ends_in_byte(token) or (self._in_bytes and not self._decode([token]))
        if self._in_bytes:
            return ""
        before = self._decode(self._ids[self._window : self._given])
        after = self._decode(self._ids[self._window :])
        piece = after[len(before) :]
        if not piece or piece.endswith("\ufffd"):
            return ""
        self._window, self._given = self._given, len(self._ids)
        self._pieces.append(piece)
        return piece

    def flush(self) -> str:
        """The text that was still held back, incomplete characters as U+FFFD. The stream starts anew after it."""
        rest = self._decode(self._ids)[sum(map(len, self._pieces)) :]
        self._ids, self._window, self._given, self._in_bytes, self._pieces = [], 0, 0, False, []
        return rest

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)


def special_tokens(files: Mapping[str, bytes], config: Mapping[str, Any] | None = None) -> SpecialTokens:
    """Special tokens and stop ids from a checkpoint's tokenizer files.

    `files` maps names ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "generation_config.json") to contents; all but the first may be missing. Stop ids are the `eos_token_id` of the
    generation config (one or several), or where it names none that of the model's `config`, and the id of the
    tokenizer's `eos_token`. Raises tokenizer-unusable.
    """
    if "tokenizer.json" not in files:
        raise errors.tokenizer_unusable("tokenizer.json", "the file is missing")
    tokenizer = Tokenizer(files["tokenizer.json"])
    # tokenizer_config.json is read last: transformers lets it win over the older file
    configs = [_json_object(files, name) for name in ("special_tokens_map.json", "tokenizer_config.json")]
    names: dict[str, str] = {}
    for written in configs:
        for name, value in written.items():
            text = _token_text(value) if name.endswith(_NAME_ENDING) else None
            if text is not None:
                names[name] = text
    stops = _stop_ids(_json_object(files, "generation_config.json"), "generation_config.json")
    for given in _configs(config or {}):
        stops = stops or _stop_ids(given, "config.json")
    if "eos_token" in names:
        eos = tokenizer.token_id(names["eos_token"])
        if eos is None:
            raise errors.tokenizer_unusable("tokenizer_config.json", f"eos_token {names['eos_token']} has no id")
        stops.add(eos)
    return SpecialTokens(dict(sorted(names.items())), tuple(sorted(stops)))


def _configs(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A model's configuration, and behind it that of its language model where it has parts."""
    inner = config.get("text_config")
    return [config, inner] if isinstance(inner, Mapping) else [config]


def _json_object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        found = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise errors.tokenizer_unusable(name, f"it is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise errors.tokenizer_unusable(name, "it is not a JSON object")
    return found


def _token_text(value: object) -> str | None:
    """A special token is written as its text or as an object with its text in `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _stop_ids(config: Mapping[str, Any], where: str) -> set[int]:
    value = config.get("eos_token_id")
    listed = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(item) is int and item >= 0 for item in listed):
        raise errors.tokenizer_unusable(where, f"eos_token_id is {value!r:.80}, not one or more ids")
    return set(listed)
