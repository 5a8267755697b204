"""The session and the generation loop over a small model in numpy; sampling against transformers' own processors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeexport import errors
from edgeexport.session import session as sessions
from edgeexport.session.generate import Sampling, candidate_probabilities, draw, generate, penalised_logits
from edgeexport.session.session import Session

VOCAB, CONTEXT = 50, 32


class NumpyRunner:
    """Logits depend on every token in the cache and on its place, as a language model's do."""

    def __init__(self, vocab: int = VOCAB, context: int = CONTEXT) -> None:
        self.vocab, self.context, self.runtime_seconds = vocab, context, 0.0
        self.cache = np.full(context, -1, np.int64)
        self.logits = np.zeros(vocab, np.float32)
        self.table = np.random.default_rng(7).normal(size=(vocab, vocab)).astype(np.float32)
        self.steps: list[int] = []
        self.closed = 0

    def step(self, tokens: NDArray[np.int64], position: int, rope: object = None) -> NDArray[np.float32]:
        assert tokens.dtype == np.int64 and tokens.flags.c_contiguous
        self.steps.append(len(tokens))
        self.cache[position : position + len(tokens)] = tokens
        seen = self.cache[: position + len(tokens)]
        self.logits[:] = np.cos(np.arange(len(seen))) @ self.table[seen]
        return self.logits

    def close(self) -> None:
        self.closed += 1


def logits_of(tokens: list[int]) -> NDArray[np.float32]:
    return NumpyRunner().step(np.array(tokens, np.int64), 0).copy()


def code_of(error: pytest.ExceptionInfo[errors.EdgeExportError]) -> str:
    return error.value.findings[0].code


def test_prefill_then_decode_equals_one_prefill() -> None:
    with Session(NumpyRunner()) as session:
        session.prefill([3, 1, 4])
        session.decode(1)
        logits = session.decode(np.int64(5))
        assert session.position == 5
        np.testing.assert_array_equal(logits, logits_of([3, 1, 4, 1, 5]))


@pytest.mark.parametrize("length", [1, 4, 5, 8, 9, 31])
def test_long_prompts_are_fed_in_pieces(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "PREFILL_CHUNK", 4)
    runner = NumpyRunner()
    session = Session(runner)
    session.decode(9)
    tokens = [index % VOCAB for index in range(length)]
    np.testing.assert_array_equal(session.prefill(tokens), logits_of([9, *tokens]))
    assert sum(runner.steps) == length + 1 and max(runner.steps) <= 4
    assert session.position == length + 1


@given(st.lists(st.tuples(st.sampled_from(["prefill", "decode", "truncate", "reset"]), st.integers(0, 40))))
@settings(max_examples=60, deadline=None)
def test_any_order_of_calls_equals_a_fresh_cache(calls: list[tuple[str, int]]) -> None:
    session, held = Session(NumpyRunner()), list[int]()
    for call, number in calls:
        before = session.position
        try:
            if call == "prefill":
                added = [(number + index) % VOCAB for index in range(number % 7)]
                logits = session.prefill(added)
                held += added
            elif call == "decode":
                logits = session.decode(number)
                held.append(number)
            else:
                session.reset() if call == "reset" else session.truncate(number)
                del held[0 if call == "reset" else number :]
                logits = logits_of(held) if held else None
        except errors.UsageError:
            assert session.position == before
            continue
        assert session.position == len(held) <= CONTEXT
        if held:
            np.testing.assert_array_equal(logits, logits_of(held))


def test_a_full_cache_is_refused_and_keeps_its_position() -> None:
    session = Session(NumpyRunner())
    session.prefill(np.zeros(30, np.int32))
    with pytest.raises(errors.UsageError) as error:
        session.prefill([1, 2, 3])
    assert code_of(error) == "context-full" and session.position == 30
    session.prefill([1, 2])
    with pytest.raises(errors.UsageError) as error:
        session.decode(1)
    assert code_of(error) == "context-full" and session.position == 32


@pytest.mark.parametrize(
    "tokens",
    [[], [-1], [VOCAB], [1.0], [True], [[1, 2]], [[1], [2, 3]], ["a"], [2**70], [None], np.array(3),
     np.array([2**63], np.uint64)],
)  # fmt: skip
def test_bad_prompts_are_refused(tokens: object) -> None:
    session = Session(NumpyRunner())
    with pytest.raises(errors.UsageError) as error:
        session.prefill(tokens)  # type: ignore[arg-type]
    assert code_of(error) == "bad-token" and session.position == 0 and session.runner.steps == []  # type: ignore[attr-defined]


@pytest.mark.parametrize("token", [-1, VOCAB, 1.0, True, "a", None, 2**70, [1]])
def test_bad_tokens_are_refused(token: object) -> None:
    with pytest.raises(errors.UsageError) as error:
        Session(NumpyRunner()).decode(token)  # type: ignore[arg-type]
    assert code_of(error) == "bad-token"


@pytest.mark.parametrize("length", [-1, 4, 1.0, True, None, "1"])
def test_bad_truncations_are_refused(length: object) -> None:
    session = Session(NumpyRunner())
    session.prefill([1, 2, 3])
    with pytest.raises(errors.UsageError) as error:
        session.truncate(length)  # type: ignore[arg-type]
    assert code_of(error) == "bad-truncate" and session.position == 3


def test_use_after_close_is_refused() -> None:
    runner = NumpyRunner()
    with Session(runner) as session:
        session.prefill([1])
    session.close()
    assert runner.closed == 1
    for call in (lambda: session.prefill([1]), lambda: session.decode(1), lambda: session.truncate(0), session.reset):
        with pytest.raises(errors.UsageError) as error:
            call()
        assert code_of(error) == "session-closed"


def test_greedy_tokens_equal_recomputation() -> None:
    answer = generate(Session(NumpyRunner()), [3, 1, 4], max_tokens=10)
    held = [3, 1, 4]
    for token in answer:
        assert token == int(np.argmax(logits_of(held)))
        held.append(token)
    assert len(held) == 13 and answer.finish_reason == "length"


def test_a_stop_id_ends_the_answer_and_is_not_part_of_it() -> None:
    tokens = list(generate(Session(NumpyRunner()), [3, 1, 4], max_tokens=10))
    stop = tokens[4]
    answer = generate(Session(NumpyRunner()), [3, 1, 4], max_tokens=10, stop_ids=(stop,))
    assert answer.finish_reason is None
    assert list(answer) == tokens[: tokens.index(stop)] and answer.finish_reason == "stop"


def test_a_full_context_ends_the_answer() -> None:
    session = Session(NumpyRunner())
    answer = generate(session, [1] * 29, max_tokens=100)
    assert len(list(answer)) == 4 and answer.finish_reason == "context" and session.position == CONTEXT


def test_on_token_sees_every_token_first() -> None:
    seen: list[int] = []
    for token in generate(Session(NumpyRunner()), [3], max_tokens=5, on_token=seen.append):
        assert seen[-1] == token
    assert len(seen) == 5


class FixedRunner(NumpyRunner):
    """Always the same logits."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__(vocab=len(logits))
        self.fixed = np.array(logits, np.float32)

    def step(self, tokens: NDArray[np.int64], position: int, rope: object = None) -> NDArray[np.float32]:
        return self.fixed


def test_ties_go_to_the_lowest_id() -> None:
    assert list(generate(Session(FixedRunner([0, 2, 2, 1])), [0], max_tokens=3)) == [1, 1, 1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_logits_are_an_error(bad: float) -> None:
    with pytest.raises(errors.BundleError) as error:
        list(generate(Session(FixedRunner([0, 1, bad, 1])), [0], max_tokens=3))
    assert code_of(error) == "nonfinite-logits"


def test_seeds_repeat_and_differ() -> None:
    def answer(seed: int) -> list[int]:
        session = Session(NumpyRunner())
        return list(generate(session, [3, 1], max_tokens=20, sampling=Sampling(temperature=3.0, seed=seed)))

    assert answer(1) == answer(1) != answer(2)


def test_evenly_spread_draws_follow_the_probabilities() -> None:
    logits = np.array([0.0, 1.0, 2.0, -1.0], np.float32)
    expected = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum()
    probabilities = candidate_probabilities(logits, Sampling(temperature=1.0))
    # an even grid of numbers instead of random ones: each share is then exact to one part of the grid
    counts = np.bincount([draw(probabilities, (index + 0.5) / 20_000) for index in range(20_000)], minlength=4)
    np.testing.assert_allclose(counts / 20_000, expected, rtol=0, atol=1 / 20_000)


def test_draw_never_gives_an_id_of_probability_zero() -> None:
    probabilities = np.array([0.0, 0.3, 0.0, 0.7, 0.0])
    assert draw(probabilities, 0.0) == 1
    assert draw(probabilities, np.nextafter(1.0, 0.0)) == 3


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 7])
@pytest.mark.parametrize("top_p", [0.1, 0.8, 1.0])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_probabilities_equal_those_of_transformers(
    temperature: float, top_k: int, top_p: float, penalty: float
) -> None:
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process

    logits = np.random.default_rng(1).normal(size=VOCAB).astype(np.float32) * 3
    prompt = [4, 4, 9, 30]
    processors = logits_process.LogitsProcessorList()
    processors.append(logits_process.RepetitionPenaltyLogitsProcessor(penalty))
    processors.append(logits_process.TemperatureLogitsWarper(temperature))
    if top_k:
        processors.append(logits_process.TopKLogitsWarper(top_k))
    processors.append(logits_process.TopPLogitsWarper(top_p))
    expected = processors(torch.tensor([prompt]), torch.tensor(logits)[None]).softmax(-1)[0].numpy()

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty)
    seen = np.isin(np.arange(VOCAB), prompt)
    penalised = penalised_logits(logits, seen, np.zeros(VOCAB, np.float32), sampling)
    np.testing.assert_allclose(candidate_probabilities(penalised, sampling), expected, atol=1e-6)


def test_frequency_penalty_counts_the_answer_only() -> None:
    session = Session(FixedRunner([1.0, 0.9, 0.0]))
    sampling = Sampling(frequency_penalty=0.25)
    assert list(generate(session, [0, 0, 0], max_tokens=4, sampling=sampling)) == [0, 1, 0, 1]


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1},
     {"repetition_penalty": 0.0}, {"frequency_penalty": float("inf")}, {"seed": -1}],
)  # fmt: skip
def test_bad_sampling_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(errors.UsageError) as error:
        Sampling(**options)  # type: ignore[arg-type]
    assert code_of(error) == "bad-sampling"


def test_an_answer_has_room_for_a_token() -> None:
    with pytest.raises(errors.UsageError):
        generate(Session(NumpyRunner()), [1], max_tokens=0)
