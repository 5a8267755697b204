"""The generation loop: choose the next token, feed it, stop for a stated reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgeexport import errors
from edgeexport.session.inputs import Features
from edgeexport.session.session import Session, Tokens, checked_tokens

FinishReason = Literal["stop", "length", "context"]
"""A stop id was chosen; `max_tokens` were given; the cache is full."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The default is greedy: the largest logit, ties to the lowest id.

    `repetition_penalty` divides positive and multiplies negative logits of all tokens seen so far (CTRL,
    arXiv:1909.05858); `frequency_penalty` is subtracted once per occurrence in the answer. Then temperature, the
    `top_k` largest (0: all), and the smallest set of largest probabilities that reaches `top_p`.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise errors.bad_sampling("temperature", self.temperature, "0 (greedy) and above")
        if not 0 < self.top_p <= 1:
            raise errors.bad_sampling("top_p", self.top_p, "above 0, up to 1")
        if self.top_k < 0:
            raise errors.bad_sampling("top_k", self.top_k, "0 (all) and above")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise errors.bad_sampling("repetition_penalty", self.repetition_penalty, "above 0; 1 is none")
        if not math.isfinite(self.frequency_penalty):
            raise errors.bad_sampling("frequency_penalty", self.frequency_penalty, "any finite number; 0 is none")
        if self.seed < 0:
            raise errors.bad_sampling("seed", self.seed, "0 and above")


GREEDY = Sampling()


class Generation(Iterator[int]):
    """The tokens of one answer, computed as they are asked for.

    A stop id ends the answer and is not part of it. `finish_reason` is None until the answer has ended.
    """

    def __init__(self, steps: Callable[[Generation], Iterator[int]]) -> None:
        self.finish_reason: FinishReason | None = None
        self._steps = steps(self)

    def __next__(self) -> int:
        return next(self._steps)


def generate(
    session: Session,
    tokens: Tokens,
    *,
    features: Sequence[Features] = (),
    max_tokens: int,
    stop_ids: Collection[int] = (),
    sampling: Sampling = GREEDY,
    on_token: Callable[[int], None] | None = None,
) -> Generation:
    """Feed the prompt `tokens` [T], with the features of its pictures and sounds, behind the session's position, then
    iterate over the answer's token ids.

    The last token of an answer is not in the cache yet, so an answer may be one token longer than the free slots.
    `on_token` is called with each token before it is handed out.
    Raises bad-token, context-full, nonfinite-logits, session-closed, bad-sampling.
    """
    if max_tokens < 1:
        raise errors.bad_sampling("max_tokens", max_tokens, "1 and above")
    prompt = checked_tokens(tokens, session.vocab)
    choose = _Chooser(sampling, prompt, session.vocab)
    stops = frozenset(stop_ids)

    def steps(generation: Generation) -> Iterator[int]:
        logits = session.prefill(prompt, features)
        for count in range(1, max_tokens + 1):
            token = choose(logits, session.position)
            if token in stops:
                generation.finish_reason = "stop"
                return
            if count == max_tokens:
                generation.finish_reason = "length"
            elif session.position == session.context:
                generation.finish_reason = "context"
            if on_token is not None:
                on_token(token)
            yield token
            if generation.finish_reason is not None:
                return
            logits = session.decode(token)

    return Generation(steps)


class _Chooser:
    """Chooses tokens for one answer; keeps the counts that the penalties need."""

    def __init__(self, sampling: Sampling, prompt: NDArray[np.int64], vocab: int) -> None:
        self.sampling = sampling
        self.random = np.random.Generator(np.random.PCG64(sampling.seed))
        self.penalised = sampling.repetition_penalty != 1.0 or sampling.frequency_penalty != 0.0
        self.seen = np.zeros(vocab, bool)
        self.seen[prompt] = True
        self.counts = np.zeros(vocab, np.float32)

    def __call__(self, logits: NDArray[np.float32], position: int) -> int:
        # argmax gives the first of equal values, and the first NaN if there is one
        best = int(np.argmax(logits))
        if not math.isfinite(logits[best]):
            raise errors.nonfinite_logits(position)
        if self.penalised:
            logits = penalised_logits(logits, self.seen, self.counts, self.sampling)
            best = int(np.argmax(logits))
        if self.sampling.temperature > 0:
            best = draw(candidate_probabilities(logits, self.sampling), self.random.random())
        self.seen[best] = True
        self.counts[best] += 1
        return best


def penalised_logits(
    logits: NDArray[np.float32], seen: NDArray[np.bool_], counts: NDArray[np.float32], sampling: Sampling
) -> NDArray[np.float32]:
    """Logits [V] after the penalties; `seen` [V] marks ids of prompt and answer, `counts` [V] those of the answer."""
    factor = np.float32(sampling.repetition_penalty)
    repeated = np.where(logits < 0, logits * factor, logits / factor)
    penalised: NDArray[np.float32] = np.where(seen, repeated, logits)
    penalised -= counts * np.float32(sampling.frequency_penalty)
    return penalised


def candidate_probabilities(logits: NDArray[np.float32], sampling: Sampling) -> NDArray[np.float64]:
    """Probabilities [V] float64 after temperature, top_k and top_p; ids that were cut off have 0."""
    scaled = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-scaled, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    weights = np.exp(scaled[order] - scaled[order[0]])
    weights /= weights.sum()
    before = np.cumsum(weights) - weights
    kept = before < sampling.top_p
    probabilities = np.zeros(len(logits), np.float64)
    probabilities[order[kept]] = weights[kept] / weights[kept].sum()
    return probabilities


def draw(probabilities: NDArray[np.float64], uniform: float) -> int:
    """The id whose slice of the cumulated probabilities holds `uniform`, a number in 0..1 (1 excluded)."""
    cumulated = np.cumsum(probabilities)
    chosen = int(np.searchsorted(cumulated, uniform * cumulated[-1], side="right"))
    # rounding may put the product on the very end, where only ids of probability 0 are left
    return min(chosen, int(np.flatnonzero(probabilities)[-1]))
