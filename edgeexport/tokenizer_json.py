"""tokenizer.json as data: what is common to all who write it anew for another reader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Step = Mapping[str, Any]
"""A normaliser, pre-tokeniser, decoder or model: its `type` and settings."""


def pattern(step: Step) -> str:
    """A step's regular expression, or its plain text."""
    given = step["pattern"]
    return str(given.get("Regex", given.get("String", "")) if isinstance(given, dict) else given)


def flat_steps(step: Step | None, name: str) -> list[Step]:
    """The steps of a sequence, those of its sequences among them; the step itself where it is none. `name` is the key
    of a sequence's steps: normalizers, pretokenizers or decoders."""
    if step is None:
        return []
    return [inner for each in step[name] for inner in flat_steps(each, name)] if step["type"] == "Sequence" else [step]


def merge_pairs(model: Step) -> list[tuple[str, str]]:
    """The two halves of each merge of a BPE, in the order of their rank. Older files have them as one text."""
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in pairs]
