"""What a calibration reads: the texts and conversations that the package carries, or a user's own.

The package's texts were written for it (quant/texts/LICENSE): English, Chinese, German, code, numbers, conversations
and a phone agent's actions. A fixed number of tokens is taken from each, at places that a seed chooses, so that the
same tokenizer always gives the same sequences.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgeexport import errors
from edgeexport.core import Array

Method = Literal["none", "search", "gptq"]
METHODS: tuple[Method, ...] = ("none", "search", "gptq")

LARGE = 2_000_000_000
"""Parameters up to which a model is calibrated by GPTQ if nothing is said; beyond, by search alone: minutes, not an
hour and more."""

TOKENS = 8192
"""Tokens that are read: on SmolLM2-135M twice as many lower the KL by less than one run differs from another."""

LENGTH = 256
"""Tokens of one sequence at most."""

GROUP = 2048
"""Tokens that go through a layer together: what their activations take bounds the memory, and each group reads the
layer's weights once."""

LEAST = 16
"""Tokens that a sequence has at least, where the context has room for them."""

SEED = 20261130

SHARES: Mapping[str, float] = {
    "english.txt": 0.32,
    "chats.jsonl": 0.28,
    "code.txt": 0.12,
    "german.txt": 0.10,
    "chinese.txt": 0.10,
    "numbers.txt": 0.08,
}
"""Of the tokens, by file of the package."""

SEPARATOR = "\n---\n"
"""Between two documents of a text file."""

MAX_FILE = 64 << 20
"""Bytes of a user's file."""
MAX_FILES = 512

TEXTS, CHATS = frozenset({".txt", ".md"}), frozenset({".jsonl"})


@dataclass(frozen=True)
class Medium:
    """A picture or a sound of a conversation: its file's bytes."""

    kind: Literal["image", "audio"]
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class Document:
    """A text, or the messages of a conversation in the form of OpenAI's API, its pictures and sounds apart, in order.
    In the messages {"type": "image"} stands for a picture and nothing for a sound, as chat templates take them."""

    text: str = ""
    messages: tuple[Mapping[str, Any], ...] = ()
    where: str = ""
    media: tuple[Medium, ...] = ()


@dataclass(frozen=True)
class Source:
    """Documents of one kind, and how much of all tokens is to come from them."""

    name: str
    share: float
    documents: tuple[Document, ...] = field(repr=False)


@dataclass(frozen=True)
class Calibration:
    """How integers are chosen, and by which texts."""

    method: Method
    sources: tuple[Source, ...] = field(default=(), repr=False)
    digest: str = ""
    device: str = "cpu"

    @classmethod
    def of(cls, method: Method, path: Path | None, device: str = "cpu") -> Calibration:
        """By a user's texts, or by the package's. Raises: UsageError `calibration-unusable`."""
        if method == "none":
            return cls(method)
        sources = given(path) if path is not None else packaged()
        state = hashlib.sha256()
        for source in sources:
            for each in source.documents:
                state.update(json.dumps([source.name, source.share, each.text, each.messages]).encode())
                for medium in each.media:
                    state.update(medium.kind.encode() + hashlib.sha256(medium.data).digest())
        return cls(method, tuple(sources), state.hexdigest(), device)


def packaged() -> list[Source]:
    """The package's own texts."""
    root = resources.files("edgeexport.quant") / "texts"
    return [
        Source(name, share, tuple(_documents(name, (root / name).read_text("utf-8")))) for name, share in SHARES.items()
    ]


def given(path: Path) -> list[Source]:
    """A user's file of text (.txt, .md) or of conversations (.jsonl, one {"messages": [...]} a line), or a folder of
    such files. Raises: UsageError `calibration-unusable`."""
    try:
        files = sorted(each for each in path.rglob("*") if each.suffix in TEXTS | CHATS) if path.is_dir() else [path]
    except OSError as problem:
        raise errors.calibration_unusable(path, problem.strerror or str(problem)) from problem
    if not files or len(files) > MAX_FILES:
        many = f"it holds {len(files)} files, and at most {MAX_FILES} are read"
        raise errors.calibration_unusable(path, many if files else "it holds no .txt, .md or .jsonl file")
    found = []
    for file in files:
        if file.suffix not in TEXTS | CHATS:
            raise errors.calibration_unusable(file, "it is neither text (.txt, .md) nor conversations (.jsonl)")
        try:
            if file.stat().st_size > MAX_FILE:
                raise errors.calibration_unusable(file, f"it has more than {MAX_FILE >> 20} MiB")
            text = file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as problem:
            raise errors.calibration_unusable(file, str(problem)) from problem
        documents = tuple(_documents(file.name, text, file))
        found.append(Source(file.name, 1 / len(files), documents))
    if not any(source.documents for source in found):
        raise errors.calibration_unusable(path, "it holds no text")
    return found


def _documents(name: str, text: str, file: Path | None = None) -> Iterator[Document]:
    if not name.endswith(".jsonl"):
        for part in text.split(SEPARATOR):
            if part.strip():
                yield Document(text=part.strip("\n"))
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            messages = json.loads(line)["messages"]
            good = isinstance(messages, list) and all(isinstance(each["role"], str) for each in messages) and messages
        except (ValueError, KeyError, TypeError, RecursionError) as problem:
            raise errors.calibration_unusable(
                file or Path(name), f"line {number} is no conversation: {problem}"
            ) from None
        if not good:
            raise errors.calibration_unusable(file or Path(name), f"line {number} is no list of messages with roles")
        try:
            media: list[Medium] = []
            plain = tuple(_plain(message, file.parent if file is not None else None, media) for message in messages)
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as problem:
            why = f"line {number} has a part that cannot be used: {problem}"
            raise errors.calibration_unusable(file or Path(name), why) from None
        yield Document(messages=plain, where=where, media=tuple(media))


def _plain(message: Mapping[str, Any], folder: Path | None, media: list[Medium]) -> Mapping[str, Any]:
    """A message as a chat template takes it; its pictures and sounds are added to `media`.

    Raises ValueError, KeyError, TypeError, AttributeError or OSError for a part of another form."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    parts: list[Mapping[str, Any]] = []
    for part in content:
        kind = part["type"]
        if kind == "image_url":
            media.append(Medium("image", _bytes_of(part["image_url"]["url"], folder)))
            parts.append({"type": "image"})
        elif kind == "input_audio":
            media.append(Medium("audio", _decoded(part["input_audio"]["data"])))
        elif kind == "audio_url":
            media.append(Medium("audio", _bytes_of(part["audio_url"]["url"], folder)))
        elif kind == "text":
            parts.append({"type": "text", "text": str(part["text"])})
        else:
            raise ValueError(f"its type is {kind!r}, not text, image_url, audio_url or input_audio")
    only_text = all(part["type"] == "text" for part in parts)
    return {**message, "content": "".join(str(part["text"]) for part in parts) if only_text else parts}


def _bytes_of(url: str, folder: Path | None) -> bytes:
    """What a data: URL holds, or a file in the conversations' own folder. Nothing is fetched. Raises as `_plain`."""
    if url.startswith("data:"):
        head, _, data = url.partition(",")
        if not head.endswith(";base64"):
            raise ValueError("a data: URL is read in base64 alone")
        return _decoded(data)
    if "://" in url:
        raise ValueError(f"{url.partition('://')[0]}: is not fetched; name a file beside the conversations, or data:")
    if folder is None:
        raise ValueError("files lie beside conversations")
    path = (folder / url).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        raise ValueError(f"{url} is no file in the folder of the conversations")
    if path.stat().st_size > MAX_FILE:
        raise ValueError(f"{url} has more than {MAX_FILE >> 20} MiB")
    return path.read_bytes()


def _decoded(data: str) -> bytes:
    return base64.b64decode(data, validate=True)


Encode = Callable[[Document], Sequence[int]]
"""Token ids of a text without special tokens, or of a conversation as the model is given it."""


def sequences(
    sources: Sequence[Source], encode: Encode, context: int, tokens: int = TOKENS, length: int = LENGTH
) -> list[Array]:
    """About `tokens` token ids, a sequence of each source at least, as sequences int64 [T] of at most `length` and
    `context`: conversations from their beginning, texts from anywhere. The same ids for the same texts, whatever the
    machine."""
    length = min(length, context)
    found: list[Array] = []
    rng = np.random.Generator(np.random.PCG64(SEED))
    for source in sources:
        wanted = max(length, round(source.share * tokens))
        pieces = list(_pieces(source, encode, length))
        for at in rng.permutation(len(pieces)):
            if wanted <= 0:
                break
            piece = pieces[at][: max(wanted, min(LEAST, length))]
            found.append(np.array(piece, np.int64))
            wanted -= len(piece)
    return found


def _pieces(source: Source, encode: Encode, length: int) -> Iterator[Sequence[int]]:
    """Texts joined and cut, conversations cut at their ends."""
    stream: list[int] = []
    for document in source.documents:
        if document.media:  # goes whole, with its pictures and sounds
            continue
        ids = list(encode(document))
        if document.messages:
            if ids:
                yield ids[:length]
            continue
        stream += ids
        while len(stream) >= length:
            yield stream[:length]
            stream = stream[length:]
    if len(stream) >= min(LEAST, length):
        yield stream


def digest(found: Sequence[Array]) -> str:
    """sha256 over sequences."""
    state = hashlib.sha256()
    for each in found:
        state.update(np.int64(len(each)).tobytes() + np.ascontiguousarray(each, "<i8").tobytes())
    return state.hexdigest()


def default_method(parameters: int) -> Method:
    """What a model of this size is calibrated by if nothing is said."""
    return "gptq" if parameters <= LARGE else "search"
