"""The tokenizer that `AutoTokenizer` makes of a checkpoint's files, written down once for every loader.

transformers decides by more than tokenizer.json: tokens that only tokenizer_config.json, added_tokens.json or
special_tokens_map.json name, prefix spaces, and whole classes that put their own normaliser and pre-tokeniser in the
file's place. So transformers itself is asked, in a process of its own (`auto_tokenizer`) that sees the vetted files and
no others, and tokenizer.json is written anew with the answer. It is remembered by the bytes that it was made of.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from edgeexport import errors
from edgeexport.checkpoint import auto_tokenizer
from edgeexport.checkpoint.files import TOKENIZER_LIMIT, dump_object
from edgeexport.core import Finding
from edgeexport.paths import cache_dir, write_whole

WALL_SECONDS = 600
"""Of the process that asks transformers: it takes 3 s on a quiet machine."""
KEPT = 16
"""Answers that are remembered; the largest known takes 34 MB."""
TEMPLATE = "chat_template.jinja"
PACKAGES = ("transformers", "tokenizers")
DECIDING = ("model_type", "model_name", "tokenizer_class", "transformers_version", "_name_or_path")
"""What AutoTokenizer reads in config.json."""


class TokenizerFiles(dict[str, bytes]):
    """A tokenizer's files by name, and `remarks` on how they came to be."""

    def __init__(self, files: Mapping[str, bytes], remarks: tuple[Finding, ...] = ()) -> None:
        super().__init__(files)
        self.remarks = remarks


def resolve(folder: Path, files: Mapping[str, bytes], config: Mapping[str, Any]) -> TokenizerFiles:
    """tokenizer.json, tokenizer_config.json and, where there is one, chat_template.jinja, as AutoTokenizer has them.

    `files` are those that it would read in `folder`, by name, parsed before; `config` is the model's config.json.
    Raises: CheckpointError `tokenizer-unusable`; ToolError `missing-package`.
    """
    given = {**files, "config.json": dump_object({name: config[name] for name in DECIDING if name in config})}
    memo = cache_dir() / "tokenizers" / _key(given)
    answer = _recall(memo)
    if answer is None:
        answer = _asked(folder, given)
        _remember(memo, answer)
    return _files(folder, json.loads(answer))


def _files(folder: Path, answer: Mapping[str, Any]) -> TokenizerFiles:
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **answer["names"],
        **({"extra_special_tokens": answer["extra"]} if answer["extra"] else {}),
        **({"model_max_length": answer["window"]} if answer["window"] is not None else {}),
        "clean_up_tokenization_spaces": False,
    }
    made = {"tokenizer.json": answer["tokenizer"].encode(), "tokenizer_config.json": dump_object(settings)}
    if answer["template"] is not None:
        made[TEMPLATE] = answer["template"].encode()
    differs = answer["differs"]
    remarks = () if differs is None else (errors.tokenizer_by_class(folder, answer["kind"], differs),)
    return TokenizerFiles(made, remarks)


def _asked(folder: Path, files: Mapping[str, bytes]) -> bytes:
    """What the other process says, as JSON. Raises as `resolve` does."""
    with tempfile.TemporaryDirectory(prefix="edgeexport-") as name:
        place = Path(name)
        for file, data in files.items():
            (place / file).write_bytes(data)
        status = ask(place)
        answer = _read(place / "answer.json")
        if answer is None:
            how = f"ended with {status}" if status is not None else f"has not opened it within {WALL_SECONDS} s"
            raise _unusable(folder, f"the process in which transformers opens it {how}")
        found = json.loads(answer)
        if "problem" in found:
            if str(found["problem"]).startswith("ModuleNotFoundError"):
                raise errors.missing_package("transformers", "build")
            raise _unusable(folder, f"transformers says: {found['problem'].replace(name, str(folder))}")
        tokenizer = _read(place / "resolved.json") or b""
        if len(tokenizer) > TOKENIZER_LIMIT:
            raise _unusable(folder, f"as transformers has it it would take {len(tokenizer)} bytes")
        return _encoded(folder, {**found, "tokenizer": tokenizer.decode("utf-8")})


def ask(place: Path) -> int | None:
    """Run `auto_tokenizer` over the files in a folder; its exit status, or None where it took too long."""
    # -P: the program lies among modules whose names are those of packages that transformers imports
    command = [sys.executable, "-P", str(Path(auto_tokenizer.__file__)), str(place)]
    quiet = subprocess.DEVNULL
    try:
        done = subprocess.run(
            command, stdin=quiet, stdout=quiet, stderr=quiet, timeout=WALL_SECONDS, check=False, cwd=place
        )
    except subprocess.TimeoutExpired:
        return None
    return done.returncode


def _encoded(folder: Path, answer: Mapping[str, Any]) -> bytes:
    """The answer as UTF-8. Raises `tokenizer-unusable` where a name or template is no text that UTF-8 has."""
    try:
        return json.dumps(answer, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as problem:
        raise _unusable(folder, "a text in it has half a surrogate pair, which is no Unicode") from problem


def _read(path: Path) -> bytes | None:
    with suppress(OSError):
        return path.read_bytes()
    return None


def _unusable(folder: Path, problem: str) -> errors.CheckpointError:
    return errors.CheckpointError(*errors.tokenizer_unusable(folder, problem).findings)


def _key(files: Mapping[str, bytes]) -> str:
    """sha256 over everything that shapes the answer."""
    state = hashlib.sha256(Path(auto_tokenizer.__file__).read_bytes())
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            state.update(f"{package} {metadata.version(package)}\n".encode())
    for name, data in sorted(files.items()):
        state.update(f"{name} {len(data)}\n".encode() + data)
    return state.hexdigest()


def _recall(memo: Path) -> bytes | None:
    """The remembered answer; None where there is none, or where its seal is not that of its content and name."""
    try:
        seal, _, answer = memo.read_bytes().partition(b"\n")
        os.utime(memo)
    except OSError:
        return None
    return answer if seal == _seal(memo, answer) else None


def _remember(memo: Path, answer: bytes) -> None:
    """Write it whole or not at all. A cache that cannot be written costs time, not the build."""
    with suppress(OSError):
        write_whole(memo, _seal(memo, answer) + b"\n" + answer)
        for old in sorted(memo.parent.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)[KEPT:]:
            old.unlink(missing_ok=True)


def _seal(memo: Path, answer: bytes) -> bytes:
    return hashlib.sha256(memo.name.encode() + answer).hexdigest().encode()
