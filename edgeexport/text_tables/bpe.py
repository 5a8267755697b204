"""tokenizer.json of a byte-level BPE as tables that need no JSON, no regex engine and no Unicode library to be used.

The file is `MAGIC` and then 32-bit numbers, little-endian; runs of bytes are padded with zeros to whole numbers:

    ids, bytes, merges, by_bytes, added, before, after, steps, flags
    start of each token in the bytes [ids + 1], bytes
    id of each byte [256]                       NONE where the model has no such token
    first merge of each left half [ids + 1], right half [merges], rank [merges], result [merges]
    ids in the order of their bytes [by_bytes]  only where a piece that is a token is not taken apart
    added tokens: id, special, normalized, length, bytes
    ids before a text [before], ids after it [after]
    NFC, where flags say so: see `_normal_form`
    steps: see `splitting`
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from typing import Any

from edgeexport.session.library import Library
from edgeexport.text_tables import Unsupported
from edgeexport.text_tables.splitting import programs
from edgeexport.text_tables.unicode import composition
from edgeexport.tokenizer_json import Step, flat_steps, merge_pairs

FILE = "tokenizer/bpe.bin"
MAGIC = b"EEBPE/1\n"
NONE = 0xFFFFFFFF
NFC, WHOLE_TOKENS = 1, 2
"""Flags: texts are brought into the normal form NFC; a piece that is a token is not taken apart."""
MAX_IDS = 1 << 21
NEVER_IN_UTF8 = (0xC0, 0xC1, *range(0xF5, 0x100))


def bpe_file(tokenizer_json: bytes) -> bytes:
    """The file. Raises Unsupported for a tokenizer that these tables cannot hold, BundleError `tokenizer-unusable` for
    one that nobody can use."""
    library = Library(tokenizer_json)
    whole = json.loads(library.written())  # as the library writes it: every key there, and of its type
    model: Step = whole["model"]
    _refuse_other_models(model)
    decoders = [step["type"] for step in flat_steps(whole.get("decoder"), "decoders")]
    if decoders != ["ByteLevel"]:
        raise Unsupported("decoder", ", ".join(decoders) or "none")
    normalised = _is_nfc(whole.get("normalizer"))
    steps = programs(whole.get("pre_tokenizer"))

    vocab: dict[str, int] = library.ids(added=False)
    added = sorted(library.added_tokens().items())
    tokens = {number: _bytes_of(text) for text, number in vocab.items()}
    # the library keeps an added token's text in the normal form that it is looked for in
    tokens |= {number: _bytes_of(library.id_to_token(number) or "") for number, _ in added}
    ids = max(tokens, default=-1) + 1
    if not 0 < ids <= MAX_IDS:
        raise Unsupported("model", f"{ids} ids, where 1 to {MAX_IDS} are possible")
    merges = _ranked_merges(model, vocab)
    whole_pieces = [number for text, number in vocab.items() if _BYTES.keys() >= set(text)]
    ordered = sorted(whole_pieces, key=tokens.__getitem__) if model.get("ignore_merges", False) else []
    before, after = _around(library)
    flags = NFC * normalised | WHOLE_TOKENS * bool(ordered)
    pieces = [tokens.get(number, b"") for number in range(ids)]
    parts = [
        MAGIC,
        _numbers(
            [ids, sum(map(len, pieces)), len(merges), len(ordered), len(added), len(before), len(after), len(steps)]
        ),
        _numbers([flags]),
        _numbers(_starts(map(len, pieces))),
        _padded(b"".join(pieces)),
        _numbers(_byte_ids(model, vocab)),
        *(_numbers(column) for column in _by_left_half(merges, ids)),
        _numbers(ordered),
        *(_added(library, number, token) for number, token in added),
        _numbers([*before, *after]),
        _normal_form() if normalised else b"",
        *steps,
    ]
    return b"".join(parts)


def _refuse_other_models(model: Step) -> None:
    kind = model.get("type") or ("Unigram" if isinstance(model["vocab"], list) else "BPE")
    if kind != "BPE":
        raise Unsupported("model", kind)
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise Unsupported("model", f"{name} {model[name]!r}")


def _is_nfc(normaliser: Step | None) -> bool:
    kinds = [step["type"] for step in flat_steps(normaliser, "normalizers")]
    if kinds not in ([], ["NFC"]):
        raise Unsupported("normalizer", ", ".join(kinds))
    return bool(kinds)


def byte_chars() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary: itself where it can be printed, else one
    from U+0100 on. Source: GPT-2's encoder.py, `bytes_to_unicode`."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = byte_chars()


def _bytes_of(token: str) -> bytes:
    """What a token adds to a decoded text: a token with a character that stands for no byte is its own text."""
    if all(char in _BYTES for char in token):
        return bytes(_BYTES[char] for char in token)
    return token.encode("utf-8")


def _byte_ids(model: Step, vocab: dict[str, int]) -> list[int]:
    found = [NONE] * 256
    for char, byte in _BYTES.items():
        found[byte] = vocab.get(char, NONE)
    missing = any(number == NONE for byte, number in enumerate(found) if byte not in NEVER_IN_UTF8)
    if missing and (model.get("unk_token") is not None or model.get("byte_fallback", False)):
        raise Unsupported("model", "a vocabulary without some of the bytes")
    return found


def _ranked_merges(model: Step, vocab: dict[str, int]) -> list[tuple[int, int, int, int]]:
    """(left, right, rank, result), ascending. Of two merges of the same halves the library keeps the last."""
    found = {}
    for rank, (left, right) in enumerate(merge_pairs(model)):
        if not {left, right, left + right} <= vocab.keys():  # such as where two tokens have one id
            raise Unsupported("model", f"a merge of {left[:40]!r} and {right[:40]!r} that are no tokens of their own")
        found[vocab[left], vocab[right]] = rank, vocab[left + right]
    return sorted((*halves, *result) for halves, result in found.items())


def _by_left_half(merges: Sequence[tuple[int, int, int, int]], ids: int) -> list[list[int]]:
    counts = [0] * ids
    for left, *_ in merges:
        counts[left] += 1
    return [_starts(counts), *([merge[column] for merge in merges] for column in (1, 2, 3))]


def _around(library: Library) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after a text of its own accord."""
    plain = library.encode("a", add_special_tokens=False)
    full = library.encode("a", add_special_tokens=True)
    for first in range(len(full) - len(plain) + 1):
        if full[first : first + len(plain)] == plain:
            return full[:first], full[first + len(plain) :]
    raise Unsupported("post_processor", "that changes the text's own tokens")


def _added(library: Library, number: int, token: Any) -> bytes:
    for name in ("single_word", "lstrip", "rstrip"):
        if getattr(token, name):
            raise Unsupported("added token", f"{token.content!r} with {name}")
    text = library.normalized(token.content) if token.normalized else token.content
    data = text.encode("utf-8")
    return _numbers([number, token.special, token.normalized, len(data)]) + _padded(data)


def _normal_form() -> bytes:
    """NFC: numbers of decompositions, of their characters, of combining classes and of compositions; decomposed
    characters, where the characters of each start (and their end), these; marks as code point << 8 | class;
    compositions as first, second, result. All ascending."""
    table = composition()
    decomposed = sorted(table.decomposed.items())
    composed = sorted((*pair, result) for pair, result in table.composed.items())
    made = [code for _, codes in decomposed for code in codes]
    return _numbers([
        len(decomposed), len(made), len(table.classes), len(composed),
        *(code for code, _ in decomposed),
        *_starts(len(codes) for _, codes in decomposed),
        *made,
        *sorted(code << 8 | number for code, number in table.classes.items()),
        *(number for row in composed for number in row),
    ])  # fmt: skip


def _starts(lengths: Iterable[int]) -> list[int]:
    found = [0]
    for length in lengths:
        found.append(found[-1] + length)
    return found


def _numbers(values: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
