"""How far an artifact is from its original along a text: KL, the share of equal best tokens, both perplexities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from edgeexport import errors
from edgeexport.bundle.golden import kl_divergence
from edgeexport.core import Array, Example, Progress, no_progress
from edgeexport.session.session import Session

WINDOW = 256
"""Tokens that follow each other; then the cache is emptied."""

LOGIT_BYTES = 256 << 20
"""Of logits that are held at once, by each of the two."""


@dataclass(frozen=True)
class TextResult:
    """Over `tokens` positions of a text: mean KL in nats from the original, the share of positions where both prefer
    the same token, and what each makes of the text itself."""

    tokens: int
    kl: float
    top1: float
    perplexity: float
    original_perplexity: float


Judge = Callable[[Sequence[Example], Sequence[int]], Sequence[Array]]
"""(examples, firsts) -> the original's logits [positions, V] of each from its token `first` on."""


def measure(tokens: Array, session: Session, judge: Judge, vocab: int, progress: Progress = no_progress) -> TextResult:
    """Along int64 `tokens`, in windows. Raises: UsageError `nothing-compared` for a text of fewer than two tokens."""
    length = min(WINDOW, session.context)
    windows = [tokens[at : at + length] for at in range(0, len(tokens), length)]
    windows = [each for each in windows if len(each) > 1]
    if not windows:
        raise errors.nothing_compared("the text", "it has fewer than two tokens")
    at_once = max(1, LOGIT_BYTES // (4 * vocab * length))
    kl, same, count, mine, original, followed = 0.0, 0, 0, 0.0, 0.0, 0
    for start in range(0, len(windows), at_once):
        group = windows[start : start + at_once]
        wanted = judge([Example(each) for each in group], [0] * len(group))
        for each, want in zip(group, wanted, strict=True):
            got = _along(session, each)
            kl += float(kl_divergence(want, got).sum())
            same += int((want.argmax(-1) == got.argmax(-1)).sum())
            count += len(each)
            original += _surprise(want, each)
            mine += _surprise(got, each)
            followed += len(each) - 1
            progress(count, len(tokens))
    return TextResult(
        count, kl / count, same / count, float(np.exp(mine / followed)), float(np.exp(original / followed))
    )


def _along(session: Session, tokens: Array) -> Array:
    """The artifact's logits [T, V] after each token."""
    session.reset()
    rows = [np.array(session.prefill(tokens[:1]))]
    rows += [np.array(session.decode(int(token))) for token in tokens[1:]]
    return np.stack(rows)


def _surprise(logits: Array, tokens: Array) -> float:
    """The sum of -log p of each token but the first."""
    rows = logits[:-1].astype(np.float64)
    moved = rows - rows.max(-1, keepdims=True)
    chosen = moved[np.arange(len(rows)), tokens[1:]]
    return float((np.log(np.exp(moved).sum(-1)) - chosen).sum())
