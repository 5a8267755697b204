"""A program of its own: opens the tokenizer in a folder as `AutoTokenizer` does, and writes down what it became.

It runs on files that nobody has vetted, so it runs in a process of its own, within bounds of memory and time, and it
imports nothing of this package. `python auto_tokenizer.py FOLDER` writes FOLDER/resolved.json, the tokenizer as the
tokenizers library writes it, and FOLDER/answer.json: `names` of special tokens, `extra` special tokens, `template`,
`kind` of tokenizer, `window`, and `differs`: a text that the folder's own tokenizer.json alone gives other ids, or
null. Where that fails answer.json holds `problem` instead.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

MEMORY_BYTES = 6 << 30
CPU_SECONDS = 120
FILE_BYTES = 1 << 30
PROBES = (
    *("a", "Hello, world", " leading", "two  spaces,   three ", "tabs\t\tand\nlines\n\n\nend\n", "x = foo(1, 234567)"),
    *("Größe, Straße, naïve café", "cafe\u0301 e\u0308 n\u0303", "你好，世界。日本語と한국어", "don't I'LL we've"),
    *("😀👩\u200d👩\u200d👧 🇫🇷", "a" * 40 + "b", "\u00a0\u3000\u200b", "1234567890 3.14159", "¿Qué? — “quoted” …"),
    "if (a<b) { return a[0]; } // end",
)  # fmt: skip
"""Texts without special tokens."""


def main(folder: Path) -> None:
    """Write the answer, whatever happens: an exception of the libraries is one, and so is a panic."""
    _bound()
    try:
        answer = _answer(folder)
    except BaseException as problem:  # noqa: BLE001 - a panic is no Exception, and this process does nothing else
        answer = {"problem": f"{type(problem).__name__}: {problem}"[:1000]}
    (folder / "answer.json").write_text(json.dumps(answer), "ascii")


def _bound() -> None:
    for limit, bound in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        with suppress(OSError, ValueError):  # a system may bound less, or a user's own bound may be lower
            resource.setrlimit(limit, (bound, bound))


def _answer(folder: Path) -> dict[str, Any]:
    sys.modules["torch"] = None  # type: ignore[assignment]  # a tokenizer needs none, and importing it takes seconds
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    import tokenizers
    from transformers import AutoTokenizer

    opened = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    library = getattr(opened, "_tokenizer", None)
    if not isinstance(library, tokenizers.Tokenizer):
        raise TypeError(f"{type(opened).__name__} does not work by the tokenizers library")
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = opened.split_special_tokens
    ids = _ids(library)
    text = library.to_str()
    if opened.split_special_tokens:
        text = _unmatched(library, text)
    again = tokenizers.Tokenizer.from_str(text)
    if _ids(again) != ids or again.get_vocab() != library.get_vocab():
        raise ValueError("what the tokenizers library writes of it is not what it reads")
    (folder / "resolved.json").write_text(text, "utf-8")
    template = opened.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str | None):
        raise TypeError(f"the chat template is {type(template).__name__}, not text")
    return {
        "names": opened.special_tokens_map,
        "extra": [str(token) for token in opened.extra_special_tokens],
        "template": template,
        "kind": type(opened).__name__,
        "window": opened.model_max_length if opened.model_max_length < 1 << 31 else None,
        "differs": _difference(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), ids),
    }


def _ids(library: Any) -> list[list[int]]:
    return [library.encode(text, add_special_tokens=False).ids for text in PROBES]


def _difference(alone: Any, ids: list[list[int]]) -> str | None:
    alone.no_truncation()
    alone.no_padding()
    try:
        own = _ids(alone)
    except BaseException:  # noqa: BLE001 - a panic: AutoTokenizer has replaced what fails
        return PROBES[0]
    return next((text for text, one, other in zip(PROBES, own, ids, strict=True) if one != other), None)


def _unmatched(library: Any, text: str) -> str:
    """The tokenizer with `split_special_tokens`, for which tokenizer.json has no word: its special tokens become tokens
    of the vocabulary that no merge makes, so that none is found in a text, and a first step of the decoder takes them
    away. Raises ValueError where that would not be the same."""
    import tokenizers

    whole = json.loads(text)
    special = [token for token in whole["added_tokens"] if token["special"]]
    whole["added_tokens"] = [token for token in whole["added_tokens"] if not token["special"]]
    vocab = whole["model"]["vocab"]
    if not isinstance(vocab, dict):
        raise ValueError("split_special_tokens cannot be written into a tokenizer.json of this model")
    vocab |= {token["content"]: token["id"] for token in special}
    pattern = "|".join(re.escape(token["content"]) for token in special)
    hidden = {"type": "Replace", "pattern": {"Regex": rf"\A(?:{pattern})\z"}, "content": ""}
    rest = [whole["decoder"]] if whole["decoder"] is not None else []
    whole["decoder"] = {"type": "Sequence", "decoders": [hidden, *rest]}
    written = json.dumps(whole, ensure_ascii=False)
    again = tokenizers.Tokenizer.from_str(written)
    for token in special:
        for each in (token["content"], f"a{token['content']} b", token["content"] * 2):
            if again.encode(each).ids != library.encode(each).ids:
                raise ValueError(f"split_special_tokens cannot be written into tokenizer.json: {token['content']!r}")
    return written


if __name__ == "__main__":
    main(Path(sys.argv[1]))
