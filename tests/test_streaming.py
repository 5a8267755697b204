"""Models whose weights come and go: the streamed canonical graph and the streamed oracle give transformers' logits."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from graphs import Traced, Zoo, reference_logits

from edgeexport import families
from edgeexport.canonical import streaming
from edgeexport.canonical.streaming import StreamedGraph
from edgeexport.checkpoint import WeightReader
from edgeexport.core import Array, Example
from edgeexport.parity import reference
from edgeexport.parity.reference import Reference
from edgeexport.session.runner import Call

TOKENS = np.array([3, 41, 7, 7, 19, 2, 60, 33, 5], np.int64)
CUTS = (0, 4, 6, 7, 8, 9)
"""A prompt, a second chunk that meets a filled cache, then single tokens."""
SMALL = 1 << 10
"""Bytes beyond which every matrix of a tiny model counts as large."""


@pytest.fixture(params=[None, SMALL], ids=["weights held whole", "weights in chunks"])
def large(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param is not None:
        monkeypatch.setattr(streaming, "LARGE_BYTES", request.param)
        monkeypatch.setattr(reference, "LARGE_BYTES", request.param)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("family", ["llama", "glm4"])
@pytest.mark.parametrize("threads", [0, 1])
def test_a_streamed_graph_gives_the_logits_of_transformers(family: str, threads: int, zoo: Zoo) -> None:
    found = zoo.traced(family)
    calls = [Call(TOKENS[start:stop], start).inputs() for start, stop in pairwise(CUTS)]
    with WeightReader() as reader:
        weights = found.model.weights
        trail = StreamedGraph(found.model, threads).run(calls, lambda name, a, b: reader.rows(weights[name], a, b))
    expected = reference_logits(zoo.oracle(family), TOKENS)[np.array(CUTS[1:]) - 1]
    np.testing.assert_allclose(trail.logits, expected, atol=1e-4)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("family", ["llama", "glm4"])
def test_the_streamed_oracle_gives_the_logits_of_transformers(family: str, zoo: Zoo) -> None:
    short = TOKENS[:5]
    answers = _asked(zoo.traced(family), [TOKENS, short], [0, 2])
    np.testing.assert_allclose(answers[0], reference_logits(zoo.oracle(family), TOKENS), atol=1e-4)
    np.testing.assert_allclose(answers[1], reference_logits(zoo.oracle(family), short)[2:], atol=1e-4)


def test_the_oracle_leaves_torch_with_the_threads_it_had(zoo: Zoo) -> None:
    before = torch.get_num_threads()
    _asked(zoo.traced("llama"), [TOKENS], [0], threads=1)
    assert torch.get_num_threads() == before


def test_a_chunk_of_a_large_weight_is_read_once_for_all_calls(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "LARGE_BYTES", SMALL)
    model = zoo.traced("glm4").model
    head = next(name for name in model.weights if name.endswith("lm_head.weight"))
    count, width = model.weights[head].shape
    read: list[tuple[int, int]] = []
    with WeightReader() as reader:

        def rows(name: str, start: int, stop: int) -> Array:
            if name == head:
                read.append((start, stop))
                assert (stop - start) * width * 4 <= SMALL
            return reader.rows(model.weights[name], start, stop)

        StreamedGraph(model).run([Call(TOKENS[start:stop], start).inputs() for start, stop in pairwise(CUTS)], rows)
    assert read[0][0] == 0 and read[-1][1] == count
    assert all(a[1] == b[0] for a, b in pairwise(read))


def _asked(found: Traced, sequences: list[Array], firsts: list[int], threads: int = 0) -> list[Array]:
    checkpoint = found.checkpoint
    oracle = families.find(checkpoint.model_type).oracle(checkpoint.config)
    with WeightReader() as reader:
        model = Reference(oracle, lambda name, a, b: reader.rows(checkpoint.tensors[name], a, b))
        answers = model.answers([Example(tokens) for tokens in sequences], firsts, threads)
    return [answer.logits for answer in answers]
