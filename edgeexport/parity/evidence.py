"""What the parity ladder compares, and the runs that several of its levels read, each made once.

The artifact is run first and closed; then the canonical graph and the oracle stream their weights. So the peak is the
largest of the three, not their sum.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from edgeexport.canonical.streaming import Rows, StreamedGraph
from edgeexport.core import (
    Array,
    CanonicalModel,
    Example,
    OracleModel,
    Progress,
    Provenance,
    QuantPlan,
    StandIn,
    TensorRef,
    TensorSpec,
)
from edgeexport.memory import give_back
from edgeexport.session.inputs import Inputs, Run
from edgeexport.session.preprocess import Preprocess
from edgeexport.session.runner import Call, DecoderRunner
from edgeexport.session.session import Session
from edgeexport.threads import Stop, pool

DECODE_STEPS = 8
"""Decode calls of the numeric levels, after a prefill and a second chunk that meets a filled cache."""

LONGEST = 32
"""Tokens of a text that the numeric levels feed at most: each row costs a multiplication by the whole model."""

DECODER = "decoder"


Watch = Callable[[str], Any]
"""Given a title, a context manager that gives a Progress."""


class Opened(Protocol):
    """The artifacts of a model, on this machine, each opened when it is first used."""

    @property
    def decoder(self) -> DecoderRunner:
        """The decoder, which the caller closes."""

    def run(self, component: str, variant: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Run a component without state."""

    def close(self) -> None:
        """Release the components without state."""


class Open(Protocol):
    """Opens the artifacts that were written; `exact` asks for float32 activations where the runtime can."""

    def __call__(self, *, exact: bool = False) -> Opened: ...


@dataclass(frozen=True)
class Part:
    """One component: its canonical graph (one for each variant), and how its weights are stored."""

    models: tuple[CanonicalModel, ...]
    plan: QuantPlan
    read_signature: Callable[[str], Mapping[str, TensorSpec]]
    """Opens a variant's artifact in its runtime without making it ready to run: inputs and outputs by name."""
    half: bool = False
    """Whether the artifact computes in float16."""
    provenance: Provenance = "rounded"
    """Where most integers of 4 bits come from."""


@dataclass(frozen=True)
class Probe:
    """A smaller picture for L2, where the ones that were built would take too long: the same modules traced for a
    grid that is not shipped. `work` is what L2 would take with the shipped ones, in floating point operations."""

    models: tuple[CanonicalModel, ...]
    shown: Mapping[str, Example]
    work: float


@dataclass(frozen=True)
class Subject:
    """One model with everything that the ladder compares. `parts` end with the decoder."""

    parts: Mapping[str, Part]
    contract: Preprocess | None
    tensors: Mapping[str, TensorRef]
    unused: frozenset[str]
    checkpoint_rows: Rows
    """By checkpoint name."""
    stored_rows: Rows
    """By checkpoint name: what the artifacts' files hold, read back and dequantised."""
    open: Open
    oracle: Callable[[], OracleModel]
    prompts: Sequence[Example]
    """Texts that are fed as they are."""
    questions: Mapping[str, Example]
    """What a user would ask, as the model is asked it, by what people read."""
    decode: Callable[[Sequence[int]], str]
    """Tokens as text."""
    shown: Mapping[str, Example]
    """Prompts with pictures or sound, by a name for people."""
    answer_tokens: int
    stop_ids: frozenset[int]
    """Tokens that end an answer."""
    overrides: Mapping[str, Any]
    probe: Probe | None = None
    stand_in: StandIn | None = None
    loads: int = 0
    """Bytes of all artifacts."""
    smoothed: Callable[[str, int, Array], Array] = lambda name, start, rows: rows
    """Rows of a weight from `start` on, by checkpoint name, with what was moved between weights before they were
    rounded, none of which `checkpoint_rows` and `stored_rows` have."""

    @property
    def decoder(self) -> Part:
        return self.parts[DECODER]


@dataclass(frozen=True, eq=False)
class Script:
    """What the numeric levels feed: a prompt in two chunks, the second meeting a filled cache, then single tokens."""

    name: str
    example: Example
    cuts: tuple[int, ...]
    prompt_calls: int

    @classmethod
    def of(cls, name: str, prompt: Example) -> Script:
        """The tokens that follow the prompt are its own text backwards: no placeholder of a picture among them."""
        tokens = prompt.tokens
        placeholders = {int(token) for token in tokens} if not prompt.encoder_inputs else _text_tokens(tokens)
        text = np.array([token for token in tokens[::-1] if int(token) in placeholders], np.int64)
        half = max(1, len(tokens) - 5)
        starts = [0, *([half] if half < len(tokens) else [])]
        whole = np.concatenate([tokens, np.resize(text, DECODE_STEPS)])
        cuts = (*starts, *range(len(tokens), len(whole) + 1))
        return cls(name, replace(prompt, tokens=whole), cuts, len(starts))

    @property
    def last(self) -> Array:
        """The last token of each call."""
        return np.array(self.cuts[1:]) - 1


@dataclass
class Outcome:
    """What one way of running the model gave: logits [calls, V] of each sequence, what the components without state
    gave, in the order of their calls, and the decoder's hidden states of the first sequence."""

    logits: dict[str, Array] = field(default_factory=dict)
    made: dict[str, list[Array]] = field(default_factory=dict)
    hidden: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Answered:
    """A prompt with the artifact's greedy answer behind it, and the logits [V] from which each token was chosen, up to
    the one that ends the answer."""

    example: Example
    logits: Sequence[Array]


class Evidence:
    """Runs that several levels read, each made once."""

    def __init__(self, subject: Subject, watch: Watch, *, runs: bool = True) -> None:
        """`runs` says whether a level asks for what the artifacts give, whatever they are."""
        self.subject, self.watch, self.runs = subject, watch, runs
        longest = max(subject.prompts, key=lambda prompt: len(prompt.tokens))
        text = Script.of("text", replace(longest, tokens=longest.tokens[:LONGEST]))
        shown = [Script.of(name, prompt) for name, prompt in subject.shown.items()]
        self.sequences = [text, *shown]
        """What the artifacts are asked."""
        self.probing = self.sequences
        """What L2 asks."""
        if subject.probe is not None:
            self.probing = [text, *(Script.of(name, prompt) for name, prompt in subject.probe.shown.items())]

    @cached_property
    def probed(self) -> tuple[Outcome, Outcome]:
        """The unmodified model and the canonical graph over the checkpoint's weights, asked what L2 asks.

        Both run at once, each on half of the cores: they read the same weights in the same order, and what one has
        read from the disk the other finds in memory.
        """
        threads = max(1, len(os.sched_getaffinity(0)) // 2)
        with (
            self.watch("Running the original model and the canonical graph") as progress,
            pool(1) as worker,
            Stop() as stop,
        ):
            oracle = worker.submit(self._run_oracle, self.probing, threads, stop)
            graph = self.run_graph(self.probing, self.subject.checkpoint_rows, progress, threads)
            return oracle.result(), graph

    @cached_property
    def oracle(self) -> Outcome:
        """The unmodified model, asked what the artifacts are asked."""
        if self.subject.probe is None:
            return self.probed[0]
        with self.watch("Running the original model"):
            return self._run_oracle(self.sequences)

    def _run_oracle(self, sequences: Sequence[Script], threads: int = 0, stop: Stop | None = None) -> Outcome:
        from edgeexport.parity.reference import Reference

        def rows(name: str, start: int, end: int) -> Array:
            if stop is not None:
                stop.check()
            return self.subject.checkpoint_rows(name, start, end)

        reference = Reference(self.subject.oracle(), rows)
        firsts = [int(sequence.last[0]) for sequence in sequences]
        answers = reference.answers([sequence.example for sequence in sequences], firsts, threads)
        outcome = Outcome(hidden=reference.hidden(len(sequences[0].example.tokens)))
        for sequence, answer in zip(sequences, answers, strict=True):
            outcome.logits[sequence.name] = answer.logits[sequence.last - answer.first]
        outcome.made = {name: reference.made(name) for name in self.subject.parts if name != DECODER}
        give_back()
        return outcome

    def run_graph(self, sequences: Sequence[Script], rows: Rows, progress: Progress, threads: int = 0) -> Outcome:
        """The canonical graphs over these weights (by checkpoint name). `threads` as in `StreamedGraph`."""
        outcome = Outcome()
        probes = self.subject.probe.models if self.subject.probe is not None else ()

        def run(component: str, variant: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
            models = (*self.subject.parts[component].models, *probes)
            model = next(each for each in models if each.component == component and each.variant == variant)
            outputs = StreamedGraph(model, threads).run([inputs], by_name(model, rows)).outputs[0]
            outcome.made.setdefault(component, []).extend(outputs.values())
            return outputs

        calls = [self._calls(sequence, run) for sequence in sequences]
        model = self.subject.decoder.models[0]
        flat = [call.inputs() for each in calls for call in each]
        trail = StreamedGraph(model, threads).run(flat, by_name(model, rows), progress)
        start = 0
        for sequence, each in zip(sequences, calls, strict=True):
            outcome.logits[sequence.name] = trail.logits[start : start + len(each)]
            start += len(each)
        first = len(sequences[0].example.tokens)
        outcome.hidden = {stage: states[:first].copy() for stage, states in trail.hidden.items()}
        give_back()
        return outcome

    @cached_property
    def shipped(self) -> Outcome:
        """The artifacts as they ship."""
        return self.run_artifacts(exact=False)

    def run_artifacts(self, *, exact: bool) -> Outcome:
        """The artifacts in their runtime: the decoder is opened when the others are closed, so that the peak is the
        larger one."""
        outcome = Outcome()
        opened = self.subject.open(exact=exact)

        def run(component: str, variant: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
            outputs = opened.run(component, variant, inputs)
            outcome.made.setdefault(component, []).extend(outputs.values())
            return outputs

        try:
            asked = {sequence.name: self._calls(sequence, run) for sequence in self.sequences}
        finally:
            opened.close()
        with closing(opened.decoder) as decoder:
            for name, calls in asked.items():
                outcome.logits[name] = np.stack(
                    [decoder.step(call.fed, call.position, call.rope).copy() for call in calls]
                )
        give_back()
        return outcome

    def greedy(self) -> list[Answered]:
        """The artifact's greedy continuation of every prompt, through the session that ships."""
        opened = self.subject.open()
        contract = self.subject.contract
        inputs = Inputs(contract, opened.run, opened.close) if contract else None
        prompts = [*self.subject.questions.values(), *self.subject.shown.values()]
        features = [[inputs.encode(each) for each in prompt.encoder_inputs] if inputs else [] for prompt in prompts]
        opened.close()  # the encoders' memory goes before the decoder's comes
        give_back()
        answered = []
        with Session(opened.decoder, inputs) as session, self.watch("Answering with the artifact") as progress:
            for done, (prompt, made) in enumerate(zip(prompts, features, strict=True)):
                session.reset()
                tokens = [int(token) for token in prompt.tokens]
                logits = session.prefill(prompt.tokens, made)
                chosen_from: list[Array] = []
                for _ in range(self.subject.answer_tokens):
                    tokens.append(int(np.argmax(logits)))
                    chosen_from.append(np.array(logits))
                    if len(tokens) >= session.context or _is_placeholder(contract, tokens[-1]):
                        break
                    logits = session.decode(tokens[-1])
                answer = tokens[len(prompt.tokens) :]
                whole = next((i + 1 for i, token in enumerate(answer) if token in self.subject.stop_ids), len(answer))
                answered.append(Answered(replace(prompt, tokens=np.array(tokens, np.int64)), chosen_from[:whole]))
                progress(done + 1, len(prompts))
        give_back()
        return answered

    def _calls(self, sequence: Script, run: Run) -> list[Call]:
        """The decoder's calls, what it is fed made by `run`."""
        tokens = sequence.example.tokens
        fed, rope = tokens, None
        if self.subject.contract is not None:
            inputs = Inputs(self.subject.contract, run)  # how a picture is joined does not depend on its grid
            features = [inputs.encode(each) for each in sequence.example.encoder_inputs]
            made = inputs.feed(tokens, features, 0)
            fed, rope = made.embeds, made.rope
        return [
            Call(fed[start:stop], start, None if rope is None else rope[:, start:stop])
            for start, stop in pairwise(sequence.cuts)
        ]


def _text_tokens(tokens: Array) -> set[int]:
    """Ids that do not follow themselves: a picture's placeholder does."""
    repeated = {int(a) for a, b in pairwise(tokens) if a == b}
    return {int(token) for token in tokens} - repeated or {int(tokens[0])}


def _is_placeholder(contract: Preprocess | None, token: int) -> bool:
    return contract is not None and token == contract.image_token_id


def by_name(model: CanonicalModel, rows: Rows) -> Rows:
    """From initializer names to checkpoint names; a kernel that is read as a matrix, as its rows."""

    def read(name: str, start: int, stop: int) -> Array:
        ref = model.weights[name]
        return rows(ref.name, start, stop).reshape(-1, *ref.shape[1:])

    return read
