"""Answers as a user would read them: the original model's beside the artifact's, and where they part.

The original's greedy answer is found without a cache: a pass over the artifact's answer tells the original's next token
at every place, up to the first where the two differ; from there on it takes one pass for each place where the rest of
the artifact's answer is a wrong guess. Equal answers cost nothing beyond the pass that judges them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgeexport.core import Array, Example
from edgeexport.parity.compare import margins

PASSES = 8
"""Of the original model over all prompts, at most; an answer that needs more is shown as far as it is known."""

PASSES_OF_LARGE = 2
"""The same where a pass streams more than `LARGE_BYTES` of weights."""

LARGE_BYTES = 8_000_000_000


@dataclass(frozen=True)
class Compared:
    """Two answers to one prompt, as tokens to their ends or to the ladder's limit. `agree` counts the tokens before
    they part, and `near_tie` says whether the original itself hardly preferred its token there; `whole` whether they do
    not part at all."""

    name: str
    original: tuple[int, ...]
    artifact: tuple[int, ...]
    agree: int
    whole: bool
    near_tie: bool


Judge = Callable[[Sequence[Example], Sequence[int]], Sequence[Array]]
"""(examples, firsts) -> the original's logits [positions, V] of each from its token `first` on."""


def compare(
    names: Sequence[str],
    prompts: Sequence[Example],
    answers: Sequence[Sequence[int] | Array],
    logits: Sequence[Array],
    judge: Judge,
    stop_ids: Collection[int],
    tie: float,
    passes: int = PASSES,
) -> list[Compared]:
    """Each prompt's two answers. `answers` are the artifact's tokens, `logits` the original's along them: row i is what
    token i is chosen from."""
    found: list[Compared] = []
    waiting: dict[int, list[int]] = {}
    for k, (answer, rows) in enumerate(zip(answers, logits, strict=True)):
        mine = _ended(answer, stop_ids)
        best = rows[: len(mine)].argmax(-1)
        apart = np.flatnonzero(best != np.array(mine))
        agree = int(apart[0]) if len(apart) else len(mine)
        near = bool(len(apart)) and bool(margins(rows[agree : agree + 1])[0] < tie)
        original = [*mine[:agree], int(best[agree])] if len(apart) else mine
        if len(apart) and len(original) < len(answer) and original[-1] not in stop_ids:
            waiting[k] = original
        found.append(Compared(names[k], tuple(original), tuple(mine), agree, not len(apart), near))
    for _ in range(passes):
        if not waiting:
            break
        asked = {k: [*known, *answers[k][len(known) :]][:-1] for k, known in waiting.items()}
        examples = [replace(prompts[k], tokens=_with(prompts[k].tokens, asked[k])) for k in asked]
        firsts = [len(prompts[k].tokens) - 1 + len(waiting[k]) for k in asked]
        for (k, known), rows in zip(list(waiting.items()), judge(examples, firsts), strict=True):
            best = [int(token) for token in rows.argmax(-1)]
            guess = asked[k][len(known) :]
            right = next((i for i, token in enumerate(guess) if token != best[i]), len(guess))
            known += best[: right + 1]
            ended = _ended(known, stop_ids)
            if len(ended) < len(known) or ended[-1] in stop_ids or len(known) >= len(answers[k]):
                del waiting[k]
            found[k] = replace(found[k], original=tuple(ended))
    return found


def _ended(tokens: Sequence[int] | Array, stop_ids: Collection[int]) -> list[int]:
    """An answer up to the token that ends it."""
    whole = [int(token) for token in tokens]
    return whole[: next((i + 1 for i, token in enumerate(whole) if token in stop_ids), len(whole))]


def _with(prompt: Array, answer: Sequence[int]) -> Array:
    return np.concatenate([prompt, np.array(answer, np.int64)])
