"""The original's answers beside the artifact's: what is shown is what greedy decoding of the original says."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edgeexport.core import Array, Example
from edgeexport.parity.answers import compare

VOCAB, STOP = 11, 3


class Model:
    """A model whose next token is worked out from all tokens before; counts how often it is asked."""

    def __init__(self, seed: int, margin: float = 5.0) -> None:
        self.seed, self.margin, self.asked = seed, margin, 0

    def row(self, tokens: Sequence[int]) -> Array:
        rng = np.random.default_rng([self.seed, *(int(token) for token in tokens)])
        row = rng.uniform(0, 1, VOCAB)
        row[rng.integers(VOCAB)] += self.margin
        return row.astype(np.float32)

    def judge(self, examples: Sequence[Example], firsts: Sequence[int]) -> list[Array]:
        self.asked += 1
        return [
            np.stack([self.row(each.tokens[: at + 1]) for at in range(first, len(each.tokens))])
            for each, first in zip(examples, firsts, strict=True)
        ]

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        answer: list[int] = []
        while len(answer) < count and (not answer or answer[-1] != STOP):
            answer.append(int(self.row([*prompt, *answer]).argmax()))
        return answer


def along(model: Model, prompt: Sequence[int], answer: Sequence[int]) -> Array:
    whole = Example(np.array([*prompt, *answer[:-1]], np.int64))
    return model.judge([whole], [len(prompt) - 1])[0]


@given(
    st.integers(0, 50), st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=4), min_size=1, max_size=3)
)
def test_the_original_is_followed_to_its_end(seed: int, prompts: list[list[int]]) -> None:
    model, other = Model(seed), Model(seed + 1000)
    answers = [[*other.greedy(prompt, 4), *range(12)][:12] for prompt in prompts]
    logits = [along(model, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    examples = [Example(np.array(prompt, np.int64)) for prompt in prompts]
    names = [str(k) for k in range(len(prompts))]
    for each, prompt in zip(
        compare(names, examples, answers, logits, model.judge, {STOP}, 0.1, 12), prompts, strict=True
    ):
        wanted = model.greedy(prompt, 12)
        assert list(each.original) == wanted
        assert each.whole == (list(each.artifact) == wanted)
        same = next((i for i, (a, b) in enumerate(zip(each.artifact, wanted, strict=False)) if a != b), each.agree)
        assert each.agree == same


def test_equal_answers_cost_no_pass_and_stop_where_the_model_stops() -> None:
    model, prompt = Model(5), [1, 2]
    answer = model.greedy(prompt, 12)
    logits = along(model, prompt, answer)
    asked = model.asked
    found = compare(["a"], [Example(np.array(prompt, np.int64))], [answer], [logits], model.judge, {STOP}, 0.1)[0]
    assert found.whole and found.agree == len(answer) and not found.near_tie and model.asked == asked


def test_where_the_original_hardly_prefers_its_token_is_near_a_tie() -> None:
    model, prompt = Model(5, margin=0.0), [1, 2]
    answer = model.greedy(prompt, 6)
    answer[2] = (answer[2] + 1) % VOCAB
    logits = along(model, prompt, answer)
    for tie, near in ((0.0, False), (1.1, True)):
        found = compare(["a"], [Example(np.array(prompt, np.int64))], [answer], [logits], model.judge, set(), tie)[0]
        assert (found.agree, found.whole, found.near_tie) == (2, False, near)


def test_few_passes_show_the_beginning() -> None:
    model, prompt = Model(8), [4]
    answer = [0] * 8
    found = compare(
        ["a"],
        [Example(np.array(prompt, np.int64))],
        [answer],
        [along(model, prompt, answer)],
        model.judge,
        {STOP},
        0.1,
        1,
    )[0]
    assert list(found.original) == model.greedy(prompt, 8)[: len(found.original)]
