"""tokenizer.json as the file that MNN-LLM tokenises with: its pipeline of normaliser, splitter, model and decoder.

A header of text, and then numbers: little-endian, strings behind their length in 16 bits. What a kind of step needs
follows its number. Source: MNN 3.6 transformers/llm/engine/src/tokenizer/tokenizer.cpp, PipelineTokenizer.
"""

from __future__ import annotations

import json
import struct
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, cast

from edgeexport import errors
from edgeexport.tokenizer_json import Step, flat_steps, merge_pairs, pattern

MAGIC, PIPELINE = 430, 4
NUMBER = r"\p{N}"
BEHAVIOURS = {"Isolated": 0, "Removed": 1, "MergedWithPrevious": 2}


def tokenizer_file(tokenizer_json: bytes, template: str, stop_ids: Sequence[int], eos: str, bos: str) -> bytes:
    """The file. It adds no token of its own around a text: a chat template writes those it wants.

    Raises: LoweringError `mnn-tokenizer-unsupported` for a step that MNN does not have.
    """
    whole = json.loads(tokenizer_json)
    added = whole.get("added_tokens") or []
    special = [token["id"] for token in added if token.get("special")]
    head = [f"{MAGIC} {PIPELINE}", f"{len(special)} {len(stop_ids)} 0", " ".join(map(str, [*special, *stop_ids]))]
    splitter, decoder = whole.get("pre_tokenizer"), whole.get("decoder")
    parts = [
        ("\n".join(head) + "\n").encode(),
        _normaliser(whole.get("normalizer")),
        _splitter(splitter),
        _model(whole["model"], byte_level=_has(decoder, "ByteLevel") and not _has(splitter, "ByteLevel")),
        _decoder(decoder),
        struct.pack("<I", len(added)),
        *(_added(token) for token in added),
        struct.pack("<I", len(template.encode())),
        template.encode(),
        _text(eos),
        struct.pack("<B", 0),
        _text(bos),
        struct.pack("<H", 0),  # steps that put tokens around a text
    ]
    return b"".join(parts)


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    if len(data) > 0xFFFF:
        raise errors.mnn_tokenizer_unsupported("a string of more than 65535 bytes", text[:40])
    return struct.pack("<H", len(data)) + data


def _has(step: Step | None, kind: str) -> bool:
    name = next((key for key in ("pretokenizers", "decoders") if step is not None and key in step), "")
    return any(each["type"] == kind for each in flat_steps(step, name))


def _normaliser(step: Step | None) -> bytes:
    if step is None:
        return struct.pack("<B", 0)
    kind = step["type"]
    if kind in ("NFC", "NFKC"):
        return struct.pack("<B", 6) + _table(kind)
    if kind == "Prepend":
        return struct.pack("<B", 2) + _text(step["prepend"])
    if kind == "Replace" and "Regex" not in step["pattern"]:
        return struct.pack("<B", 3) + _text(pattern(step)) + _text(step["content"])
    if kind == "Sequence":
        inner = step["normalizers"]
        return struct.pack("<BI", 4, len(inner)) + b"".join(_normaliser(each) for each in inner)
    raise errors.mnn_tokenizer_unsupported("normalizer", kind)


def _table(form: str) -> bytes:
    """Every character that a normal form changes, and what it becomes. MNN looks characters up one by one."""
    wanted = cast("Any", form)
    changed = [
        (code, new.encode())
        for code in range(sys.maxunicode + 1)
        if not 0xD800 <= code < 0xE000 and (new := unicodedata.normalize(wanted, chr(code))) != chr(code)
    ]
    return struct.pack("<I", len(changed)) + b"".join(struct.pack("<IH", code, len(new)) + new for code, new in changed)


def _splitter(step: Step | None) -> bytes:
    if step is None:
        return struct.pack("<B", 0)
    kind = step["type"]
    if kind == "ByteLevel" and not step.get("add_prefix_space", True):
        return struct.pack("<BB", 1, bool(step.get("use_regex", True)))
    if kind == "Digits":  # MNN's own step of that name knows decimal digits alone, this one halves and Roman ones too
        digits = NUMBER if step.get("individual_digits", False) else NUMBER + "+"
        return struct.pack("<B", 4) + _text(digits) + struct.pack("<BB", 0, BEHAVIOURS["Isolated"])
    if kind == "Metaspace" and step.get("prepend_scheme") == "first":  # MNN marks what follows a special token as well
        raise errors.mnn_tokenizer_unsupported("pre_tokenizer", "Metaspace that marks the first word alone")
    if kind == "Metaspace":
        return struct.pack("<B", 3) + _text(step["replacement"]) + struct.pack("<B", _prepends(step))
    if kind == "Split" and step["behavior"] in BEHAVIOURS:
        settings = struct.pack("<BB", bool(step.get("invert", False)), BEHAVIOURS[step["behavior"]])
        return struct.pack("<B", 4) + _text(pattern(step)) + settings
    if kind == "Sequence":
        inner = step["pretokenizers"]
        return struct.pack("<BI", 6, len(inner)) + b"".join(_splitter(each) for each in inner)
    raise errors.mnn_tokenizer_unsupported("pre_tokenizer", kind)


def _prepends(step: Step) -> bool:
    """Whether a space is put in front of a text that has none."""
    scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
    return bool(scheme != "never")


def _model(model: Step, *, byte_level: bool) -> bytes:
    kind = model.get("type") or ("Unigram" if isinstance(model["vocab"], list) else "BPE")
    fallback = bool(model.get("byte_fallback", False))
    if kind == "BPE":
        return _bpe(model["vocab"], merge_pairs(model), fallback, byte_level)
    if kind == "Unigram":
        pieces = sorted((piece.encode(), number, score) for number, (piece, score) in enumerate(model["vocab"]))
        head = struct.pack("<BIIB", 2, len(pieces), model.get("unk_id") or 0, fallback)
        return head + b"".join(_text(p.decode()) + struct.pack("<Id", number, score) for p, number, score in pieces)
    raise errors.mnn_tokenizer_unsupported("model", str(kind))


def _bpe(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], fallback: bool, byte_level: bool) -> bytes:
    """Tokens by their bytes, and merges by the ids of their halves: MNN searches both by halving."""
    tokens = sorted(vocab.items(), key=lambda item: item[0].encode("utf-8", "surrogatepass"))
    ranked = sorted((vocab[left], vocab[right], rank) for rank, (left, right) in enumerate(merges))
    parts = [struct.pack("<BIBBI", 0, len(tokens), fallback, byte_level, len(ranked))]
    parts += [_text(token) + struct.pack("<I", number) for token, number in tokens]
    parts += [struct.pack("<III", *merge) for merge in ranked]
    return b"".join(parts)


def _decoder(step: Step | None) -> bytes:
    kind = step["type"] if step is not None else "ByteLevel"
    if step is None or kind == "ByteLevel":
        return struct.pack("<B", 0)
    if kind in ("ByteFallback", "Fuse"):
        return struct.pack("<B", 1 if kind == "ByteFallback" else 4)
    if kind == "Metaspace":
        return struct.pack("<B", 2) + _text(step["replacement"]) + struct.pack("<B", _prepends(step))
    if kind == "Replace" and "Regex" not in step["pattern"]:
        return struct.pack("<B", 5) + _text(pattern(step)) + _text(step["content"])
    if kind == "Strip":
        return struct.pack("<B", 6) + _text(step["content"]) + struct.pack("<II", step["start"], step["stop"])
    if kind == "Sequence":
        inner = step["decoders"]
        return struct.pack("<BI", 7, len(inner)) + b"".join(_decoder(each) for each in inner)
    raise errors.mnn_tokenizer_unsupported("decoder", kind)


def _added(token: Step) -> bytes:
    flags = (bool(token.get(name, False)) for name in ("special", "lstrip", "rstrip"))
    return struct.pack("<IBBB", token["id"], *flags) + _text(token["content"])
