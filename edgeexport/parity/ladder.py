"""Climb the parity ladder: run what was written, and compare it with the model it was made from.

The artifact is run first and closed; then the canonical graph and the oracle stream their weights. So the peak is the
largest of the three, not their sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from edgeexport import errors
from edgeexport.bundle.golden import kl_divergence
from edgeexport.core import (
    LEVELS,
    Array,
    CanonicalModel,
    Dim,
    ParityResult,
    QuantPlan,
    TensorRef,
    TensorSpec,
    Verdict,
)
from edgeexport.parity import gates
from edgeexport.parity.compare import margins, max_abs, rms
from edgeexport.parity.streaming import Call, Rows, StreamedGraph, Trail
from edgeexport.quant.stats import WeightStats, compare_rows
from edgeexport.session.runner import DecoderRunner

DECODE_STEPS = 8
"""Decode calls of the numeric levels, after a prefill and a second chunk that meets a filled cache."""

ROW_BLOCK = 1 << 20
"""Elements of a weight compared at a time."""


class OpenRunner(Protocol):
    """Opens the artifact that was written; `exact` asks for float32 activations where the runtime can."""

    def __call__(self, *, exact: bool = False) -> DecoderRunner: ...


@dataclass(frozen=True)
class Subject:
    """One decoder with everything that the ladder compares."""

    model: CanonicalModel
    plan: QuantPlan
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorRef]
    unused: frozenset[str]
    checkpoint_rows: Rows
    """By checkpoint name."""
    stored_rows: Rows
    """By checkpoint name: what the artifact's files hold, read back and dequantised."""
    read_signature: Callable[[], Mapping[str, TensorSpec]]
    """Opens the artifact in its runtime without making it ready to run: inputs and outputs by name."""
    open_runner: OpenRunner
    prompts: Sequence[Array]
    answer_tokens: int
    overrides: Mapping[str, Any]


@dataclass
class Climb:
    """What was measured so far."""

    results: list[ParityResult] = field(default_factory=list)
    drift: list[dict[str, Any]] = field(default_factory=list)
    weights: list[dict[str, Any]] = field(default_factory=list)
    golden: dict[str, Array] = field(default_factory=dict)
    golden_gates: dict[str, float] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        return any(result.verdict is Verdict.FAIL for result in self.results)


Watch = Callable[[str], Any]
"""Given a title, a context manager that gives a Progress."""


def climb(subject: Subject, level: str, watch: Watch) -> Climb:
    """Every level up to `level`, in order; the first level that fails ends the climb and the rest reads NOT_RUN."""
    state = Climb()
    wanted = LEVELS[: LEVELS.index(level) + 1]
    evidence = _Evidence(subject, watch)
    rungs: Mapping[str, Callable[[_Evidence, Climb], None]] = {
        "L1": _opens,
        "L2": _graph,
        "L3": _weights,
        "L4": _lowering,
        "L5": _behaviour,
    }
    for rung, climb_rung in rungs.items():
        if rung not in wanted:
            state.results.append(_not_run(subject, rung, f"--parity {level} ends below it"))
        elif state.failed:
            state.results.append(_not_run(subject, rung, "a level below failed"))
        else:
            climb_rung(evidence, state)
    return state


class _Evidence:
    """Runs that several levels read, each made once."""

    def __init__(self, subject: Subject, watch: Watch) -> None:
        self.subject, self.watch = subject, watch
        prompt = max(subject.prompts, key=len)
        half = max(1, len(prompt) - 5)
        self.sequence = np.concatenate([prompt, np.resize(prompt[::-1], DECODE_STEPS)])
        self.calls = [Call(prompt[:half], 0)]
        if half < len(prompt):
            self.calls.append(Call(prompt[half:], half))
        self.prompt_calls = len(self.calls)
        self.calls += [Call(self.sequence[i : i + 1], i) for i in range(len(prompt), len(self.sequence))]

    @cached_property
    def oracle(self) -> Trail:
        """transformers' model: logits [calls, V], and the hidden states after each layer."""
        from edgeexport.parity.reference import Reference

        last = np.array([call.position + len(call.tokens) - 1 for call in self.calls])
        with self.watch("Running transformers' model"):
            reference = Reference(self.subject.config, self.subject.checkpoint_rows)
            answer = reference.answers([self.sequence], [int(last[0])])[0]
        return Trail(answer.logits[last - answer.first], reference.hidden(0, len(self.sequence)))

    @cached_property
    def shipped(self) -> Array:
        """Logits [calls, V] of the artifact as it ships."""
        return self.run_artifact(exact=False)

    def run_artifact(self, *, exact: bool) -> Array:
        """Logits [calls, V] of the artifact."""
        runner = self.subject.open_runner(exact=exact)
        try:
            return np.stack([runner.step(call.tokens, call.position).copy() for call in self.calls])
        finally:
            runner.close()

    def greedy(self) -> list[Array]:
        """The artifact's greedy continuation of every prompt: prompt and answer together."""
        runner = self.subject.open_runner()
        sequences = []
        try:
            with self.watch("Answering with the artifact") as progress:
                for done, prompt in enumerate(self.subject.prompts):
                    tokens = list(prompt)
                    logits = runner.step(prompt, 0)
                    for _ in range(self.subject.answer_tokens):
                        tokens.append(int(np.argmax(logits)))
                        if len(tokens) >= runner.context:
                            break
                        logits = runner.step(np.array(tokens[-1:], np.int64), len(tokens) - 1)
                    sequences.append(np.array(tokens, np.int64))
                    progress(done + 1, len(self.subject.prompts))
        finally:
            runner.close()
        return sequences


def _opens(evidence: _Evidence, state: Climb) -> None:
    """L1: the runtime opens the artifact, and its inputs and outputs are those that the canonical graph promises."""
    subject = evidence.subject
    found = subject.read_signature()
    promised = {spec.name: spec for spec in (*subject.model.inputs, *subject.model.outputs)}
    wrong = sorted(found.keys() ^ promised.keys())
    wrong += [name for name in found.keys() & promised.keys() if not _fits(found[name], promised[name])]
    metrics = {"names": len(found), "differing": len(wrong), "nodes": len(subject.model.graph.graph)}
    note = f"differing: {', '.join(wrong[:3])}" if wrong else "dialect verified; the runtime opens it"
    state.results.append(_row(subject, "L1", "signatures", metrics, {"differing": 0}, not wrong, note))


def _fits(found: TensorSpec, promised: TensorSpec) -> bool:
    """Same dtype and rank, and the same size wherever both name one."""
    sizes = zip(found.shape, promised.shape, strict=False)
    same = all(isinstance(a, Dim) or isinstance(b, Dim) or a == b for a, b in sizes)
    return found.dtype == promised.dtype and len(found.shape) == len(promised.shape) and same


def _graph(evidence: _Evidence, state: Climb) -> None:
    """L2: the canonical graph against transformers' model, both over the checkpoint's weights in float32."""
    subject = evidence.subject
    with evidence.watch("Running the canonical graph") as progress:
        trail = StreamedGraph(subject.model).run(evidence.calls, _by_name(subject, subject.checkpoint_rows), progress)
    limit = gates.gate(subject.overrides, "L2", "max_abs", gates.GRAPH_MAX_ABS)
    worst = max_abs(evidence.oracle.logits, trail.logits)
    metrics = {"max_abs": worst, "steps": len(evidence.calls), "logit_max": float(np.abs(evidence.oracle.logits).max())}
    state.results.append(_row(subject, "L2", "logits", metrics, {"max_abs": limit}, worst <= limit))
    state.drift = _drift(evidence.oracle.hidden, trail.hidden)
    state.golden = {
        "tokens": evidence.sequence,
        "prefill": np.array([len(evidence.sequence) - DECODE_STEPS], np.int64),
        "reference_logits": _golden_rows(evidence, evidence.oracle.logits),
    }
    state.golden_gates["kl"] = gates.gate(subject.overrides, "L5", "kl", gates.REFERENCE_KL[_kind(subject)])


def _weights(evidence: _Evidence, state: Climb) -> None:
    """L3: what the files hold against the checkpoint, tensor by tensor, and every tensor used exactly once."""
    subject = evidence.subject
    groups: dict[tuple[str, str], list[tuple[float, float, str, bool]]] = {}
    names = {ref.name for ref in subject.model.weights.values()}
    with evidence.watch("Comparing stored weights") as progress, ThreadPoolExecutor(2) as pool:
        compared = pool.map(lambda ref: _compare_weight(subject, ref), subject.model.weights.values())
        for done, (name, stats) in enumerate(zip(subject.model.weights, compared, strict=True)):
            fmt = subject.plan.formats[name]
            floor = gates.gate(subject.overrides, "L3", "min_snr_db", gates.snr_floor(fmt))
            good = stats.nonfinite == 0 and stats.snr_db >= floor and stats.added_zero_share <= gates.MAX_ADDED_ZEROS
            kind = subject.plan.classes[name]
            groups.setdefault((kind, fmt.name), []).append((stats.snr_db, stats.added_zero_share, name, good))
            figures = {"snr_db": stats.snr_db, "zero_share": stats.zero_share}
            state.weights.append({"tensor": name, "class": kind, "format": fmt.name, **figures})
            progress(done + 1, len(subject.model.weights))
    for (group, fmt_name), found in sorted(groups.items()):
        snr, _, worst_name, _ = min(found)
        bad = [name for *_, name, good in found if not good]
        bits = {fmt.name: fmt for fmt in subject.plan.formats.values()}[fmt_name]
        gate = {"min_snr_db": gates.gate(subject.overrides, "L3", "min_snr_db", gates.snr_floor(bits))}
        metrics = {"min_snr_db": snr, "added_zeros": max(share for _, share, *_ in found), "tensors": len(found)}
        note = f"failing: {', '.join(bad[:3])}" if bad else f"least at {worst_name}"
        state.results.append(_row(subject, "L3", f"{group} {fmt_name}", metrics, gate, not bad, note))
    left = sorted(subject.tensors.keys() - names - subject.unused)
    metrics = {"used": len(names), "left_over": len(left), "not_read": len(subject.unused)}
    note = (
        f"no part of the model reads {', '.join(left[:3])}" if left else "every tensor of the checkpoint is used once"
    )
    state.results.append(_row(subject, "L3", "coverage", metrics, {"left_over": 0}, not left, note))


def _lowering(evidence: _Evidence, state: Climb) -> None:
    """L4: the artifact against the canonical graph over the very weights that the artifact stores."""
    subject = evidence.subject
    kind = _kind(subject)
    shipped = evidence.shipped
    rounds = kind != "float"  # integer kernels round activations too; float ones have nothing to set apart
    exact = evidence.run_artifact(exact=True) if rounds else shipped
    with evidence.watch("Running the dequantised graph") as progress:
        trail = StreamedGraph(subject.model).run(evidence.calls, _by_name(subject, subject.stored_rows), progress)
    limit = gates.gate(subject.overrides, "L4", "max_abs", gates.EXACT_MAX_ABS)
    worst = max_abs(trail.logits, exact)
    state.results.append(
        _row(
            subject, "L4", "logits, float32 activations" if rounds else "logits",
            {"max_abs": worst, "steps": len(exact)}, {"max_abs": limit}, worst <= limit,
            "the lowering, apart from the rounding of activations" if rounds else "",
        )
    )  # fmt: skip
    change = max_abs(trail.logits, shipped)
    if rounds:
        kl = float(kl_divergence(trail.logits, shipped).mean())
        most = gates.SHIPPED_KL[kind]
        metrics = {"kl": kl, "max_abs": change, "steps": len(shipped)}
        state.results.append(_row(subject, "L4", "logits, as shipped", metrics, {"kl": most}, kl <= most))
    state.drift = _drift(evidence.oracle.hidden, trail.hidden)
    state.golden["artifact_logits"] = _golden_rows(evidence, shipped)
    # Other processors' kernels round differently, by no more than rounding changed here.
    state.golden_gates["max_abs"] = max(gates.EXACT_MAX_ABS, change)


def _behaviour(evidence: _Evidence, state: Climb) -> None:
    """L5: greedy answers of the artifact, judged token by token by the two models it stands for."""
    from edgeexport.parity.reference import Reference

    subject = evidence.subject
    kind = _kind(subject)
    sequences = evidence.greedy()
    firsts = [len(prompt) - 1 for prompt in subject.prompts]
    tie = gates.gate(subject.overrides, "L5", "near_tie", gates.NEAR_TIE[kind])
    for level, title, rows in (
        ("L4", "tokens, against the stored weights", subject.stored_rows),
        ("L5", "tokens, against transformers", subject.checkpoint_rows),
    ):
        with evidence.watch(f"Judging {title.removeprefix('tokens, ')}"):
            answers = Reference(subject.config, rows).answers([s[:-1] for s in sequences], firsts)
        agree, near, total = _agreement([a.logits for a in answers], sequences, firsts, tie)
        decided = total - near
        share = agree / decided if decided else 0.0
        least = 1.0 if level == "L4" else gates.gate(subject.overrides, "L5", "top1", gates.REFERENCE_TOP1[kind])
        row = _row(
            subject, level, title, {"top1": share, "ambiguous": near, "tokens": total},
            {"top1": least, "near_tie": tie}, share >= least,
            f"{agree} of {decided} decided tokens agree; {near} near a tie are set aside",
        )  # fmt: skip
        state.results.append(row if decided else replace(row, verdict=Verdict.AMBIGUOUS))
    kl = float(kl_divergence(evidence.oracle.logits, evidence.shipped).mean())
    limit = gates.gate(subject.overrides, "L5", "kl", gates.REFERENCE_KL[kind])
    state.results.append(_row(subject, "L5", "logits, against transformers", {"kl": kl}, {"kl": limit}, kl <= limit))


def _agreement(
    logits: Sequence[Array], sequences: Sequence[Array], firsts: Sequence[int], tie: float
) -> tuple[int, int, int]:
    """(tokens that the judge would have chosen, tokens near a tie, all tokens), over every answered token."""
    agree = near = total = 0
    for judged, sequence, first in zip(logits, sequences, firsts, strict=True):
        chosen = sequence[first + 1 :]
        margin = margins(judged)
        decided = margin >= tie
        agree += int(((judged.argmax(-1) == chosen) & decided).sum())
        near += int((~decided).sum())
        total += len(chosen)
    if total == 0:
        raise errors.nothing_compared("L5", "the artifact answered no token")
    return agree, near, total


def _compare_weight(subject: Subject, ref: TensorRef) -> WeightStats:
    rows = ref.shape[0] if ref.shape else 1
    step = max(1, ROW_BLOCK // max(1, ref.elements // rows))
    stats = WeightStats()
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        want = subject.checkpoint_rows(ref.name, start, stop)
        stats = stats.merge(compare_rows(want, subject.stored_rows(ref.name, start, stop).reshape(want.shape)))
    return stats


def _by_name(subject: Subject, rows: Rows) -> Rows:
    """From initializer names to checkpoint names."""
    return lambda name, start, stop: rows(subject.model.weights[name].name, start, stop)


def _golden_rows(evidence: _Evidence, logits: Array) -> Array:
    """The rows after the whole prompt and after each token that follows it."""
    return np.ascontiguousarray(logits[evidence.prompt_calls - 1 :], np.float32)


def _drift(oracle: Mapping[str, Array], graph: Mapping[str, Array]) -> list[dict[str, Any]]:
    return [
        {
            "layer": name,
            "max_abs": max_abs(states, graph[name]),
            "rms_error": rms(states - graph[name]),
            "rms": rms(states),
        }
        for name, states in oracle.items()
        if name in graph
    ]


def _kind(subject: Subject) -> str:
    bits = [
        fmt.bits for name, fmt in subject.plan.formats.items() if subject.plan.classes[name] == "linear" and fmt.integer
    ]
    return gates.kind(min(bits, default=32))


def _row(
    subject: Subject, level: str, output: str, metrics: Mapping[str, float | int],
    gate: Mapping[str, float | int], good: bool, note: str = "",
) -> ParityResult:  # fmt: skip
    finite = all(np.isfinite(value) or value == np.inf for value in metrics.values())
    verdict = Verdict.PASS if good and finite else Verdict.FAIL
    return ParityResult(subject.model.component, level, output, dict(metrics), dict(gate), verdict, note)


def _not_run(subject: Subject, level: str, why: str) -> ParityResult:
    return ParityResult(subject.model.component, level, "-", {}, {}, Verdict.NOT_RUN, why)
