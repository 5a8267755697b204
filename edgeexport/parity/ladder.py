"""Climb the parity ladder: run what was written, and compare it with the model it was made from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeexport import errors
from edgeexport.bundle.golden import kl_divergence
from edgeexport.core import LEVELS, Array, Dim, Example, ParityResult, StandIn, TensorRef, TensorSpec, Verdict
from edgeexport.families.decoder import unread_tensors
from edgeexport.parity import gates
from edgeexport.parity.compare import margins, max_abs, rms, snr_db
from edgeexport.parity.evidence import (
    DECODE_STEPS,
    DECODER,
    Answered,
    Evidence,
    Outcome,
    Part,
    Script,
    Subject,
    Watch,
)
from edgeexport.quant.stats import WeightStats, compare_rows
from edgeexport.threads import pool

if TYPE_CHECKING:
    from edgeexport.parity.reference import Reference

RUN = ("L4", "L5")
"""The levels that run the artifacts."""
LOADED = 256 << 20
"""Bytes of artifacts up to which L1 runs them where no level above does: more would cost a build without the ladder
several times its memory."""
ROW_BLOCK = 1 << 20
"""Elements of a weight compared at a time."""


@dataclass
class Climb:
    """What was measured so far."""

    results: list[ParityResult] = field(default_factory=list)
    drift: list[dict[str, Any]] = field(default_factory=list)
    weights: list[dict[str, Any]] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)
    """What was asked, and both answers."""
    golden: dict[str, dict[str, Array]] = field(default_factory=dict)
    """Golden vectors by the name of what was asked."""
    golden_gates: dict[str, float] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        return any(result.verdict is Verdict.FAIL for result in self.results)


def climb(subject: Subject, level: str, watch: Watch) -> Climb:
    """Every level up to `level`, in order; the first level that fails ends the climb and the rest reads NOT_RUN."""
    state = Climb()
    wanted = LEVELS[: LEVELS.index(level) + 1]
    evidence = Evidence(subject, watch, runs=bool({*wanted} & {*RUN}))
    rungs: Mapping[str, Callable[[Evidence, Climb], None]] = {
        "L1": _opens,
        "L2": _graph,
        "L3": _weights,
        "L4": _lowering,
        "L5": _behaviour,
    }
    for rung, climb_rung in rungs.items():
        if rung not in wanted:
            state.results += [_not_run(part, rung, f"--parity {level} ends below it") for part in subject.parts]
        elif state.failed:
            state.results += [_not_run(part, rung, "a level below failed") for part in subject.parts]
        else:
            climb_rung(evidence, state)
    if subject.stand_in is not None:
        _mark(state, subject.stand_in, subject.parts)
    return state


def _mark(state: Climb, stand_in: StandIn, parts: Iterable[str]) -> None:
    """Say of the rows of the levels that run artifacts what ran in their place, and that these did not."""
    ran = {row.level for row in state.results if row.level in RUN and row.verdict is not Verdict.NOT_RUN}
    for k, row in enumerate(state.results):
        if row.level in ran and row.verdict is not Verdict.NOT_RUN:
            note = f"{stand_in.runs}; {row.note}" if row.note else stand_in.runs
            state.results[k] = replace(row, note=note, stand_in=True)
    state.results += [_not_run(part, level, stand_in.why) for level in sorted(ran) for part in parts]


def _opens(evidence: Evidence, state: Climb) -> None:
    """L1: the runtime opens each artifact and runs it; its inputs and outputs are those that the canonical graph
    promises."""
    for name, part in evidence.subject.parts.items():
        for model in part.models:
            found = part.read_signature(model.variant)
            promised = {spec.name: spec for spec in (*model.inputs, *model.outputs)}
            wrong = sorted(found.keys() ^ promised.keys())
            wrong += [name for name in found.keys() & promised.keys() if not _fits(found[name], promised[name])]
            metrics = {"names": len(found), "differing": len(wrong), "nodes": len(model.graph.graph)}
            stand_in = evidence.subject.stand_in
            opens = stand_in.opens if stand_in is not None else "the runtime opens it"
            note = f"differing: {', '.join(wrong[:3])}" if wrong else f"dialect verified; {opens}"
            title = f"signatures {model.variant}".rstrip()
            state.results.append(_row(name, "L1", title, metrics, {"differing": 0}, not wrong, note))
    if not state.failed:
        state.results += _runs(evidence)


def _runs(evidence: Evidence) -> list[ParityResult]:
    """L1: a prefill, a second chunk and single tokens give numbers, in the runtime as the artifacts ship. A runtime
    may open a file whose shapes its kernels refuse."""
    subject = evidence.subject
    if subject.stand_in is not None:
        return []  # what it refuses, the levels that run it show
    if subject.loads > LOADED and not evidence.runs:
        why = f"the runtime would load {subject.loads / 1e9:.1f} GB; --parity L4 runs it"
        return [ParityResult(name, "L1", "runs", {}, {}, Verdict.NOT_RUN, why) for name in subject.parts]
    try:
        shipped = evidence.shipped
    except errors.BundleError as problem:
        note = f"the runtime refused it: {' '.join(problem.findings[0].why.split())[:300]}"
        return [ParityResult("model", "L1", "runs", {}, {}, Verdict.FAIL, note)]
    found = []
    for name in subject.parts:
        given = list(shipped.logits.values()) if name == DECODER else shipped.made.get(name, [])
        if not given:
            found.append(ParityResult(name, "L1", "runs", {}, {}, Verdict.NOT_RUN, "no prompt of the ladder uses it"))
            continue
        strange = sum(int(np.size(array) - np.isfinite(array).sum()) for array in given)
        calls = sum(map(len, given)) if name == DECODER else len(given)
        metrics = {"calls": calls, "nonfinite": strange}
        found.append(_row(name, "L1", "runs", metrics, {"nonfinite": 0}, not strange))
    return found


def _fits(found: TensorSpec, promised: TensorSpec) -> bool:
    """Same dtype and rank, and the same size wherever both name one."""
    sizes = zip(found.shape, promised.shape, strict=False)
    same = all(isinstance(a, Dim) or isinstance(b, Dim) or a == b for a, b in sizes)
    return found.dtype == promised.dtype and len(found.shape) == len(promised.shape) and same


def _graph(evidence: Evidence, state: Climb) -> None:
    """L2: the canonical graphs against the original model, both over the checkpoint's weights in float32."""
    subject = evidence.subject
    oracle, graph = evidence.probed
    limit = gates.gate(subject.overrides, "L2", "features", gates.GRAPH_FEATURES)
    for name, part in subject.parts.items():
        if name == DECODER:
            continue
        probes = [each for each in subject.probe.models if each.component == name] if subject.probe else []
        title = ", ".join(["features", *(model.variant for model in probes or part.models if model.variant)])
        state.results.append(_features_row(name, "L2", title, oracle, graph, "max_abs", limit))
        if probes and subject.probe is not None:
            grids = ", ".join(model.variant for model in part.models)
            why = f"{subject.probe.work / 1e12:.0f} trillion operations at this level; L4 and L5 run this grid"
            state.results.append(ParityResult(name, "L2", f"features, {grids}", {}, {}, Verdict.NOT_RUN, why))
    limit = gates.gate(subject.overrides, "L2", "max_abs", gates.GRAPH_MAX_ABS)
    for sequence in evidence.probing:
        want, got = oracle.logits[sequence.name], graph.logits[sequence.name]
        worst = max_abs(want, got)
        metrics = {"max_abs": worst, "steps": len(want), "logit_max": float(np.abs(want).max())}
        state.results.append(
            _row(DECODER, "L2", _title("logits", sequence), metrics, {"max_abs": limit}, worst <= limit)
        )
        if sequence in evidence.sequences:
            state.golden[sequence.name] = _golden(sequence, want)
    state.drift = _drift(oracle.hidden, graph.hidden)
    state.golden_gates["kl"] = gates.gate(subject.overrides, "L5", "kl", gates.REFERENCE_KL[_grade(subject.decoder)])


def _weights(evidence: Evidence, state: Climb) -> None:
    """L3: what the files hold against the checkpoint, tensor by tensor, and every tensor used."""
    subject = evidence.subject
    used: set[str] = set()
    for component, part in subject.parts.items():
        groups: dict[tuple[str, str], list[tuple[float, float, str, bool]]] = {}
        weights = part.models[0].weights
        used |= {ref.name for ref in weights.values()}
        with evidence.watch(f"Comparing stored weights of {component}") as progress, pool(2) as workers:
            compared = workers.map(lambda ref: _compare_weight(subject, ref), weights.values())
            for done, (name, stats) in enumerate(zip(weights, compared, strict=True)):
                fmt = part.plan.formats[name]
                floor = gates.gate(subject.overrides, "L3", "min_snr_db", gates.snr_floor(fmt))
                good = (
                    stats.nonfinite == 0 and stats.snr_db >= floor and stats.added_zero_share <= gates.MAX_ADDED_ZEROS
                )
                kind = part.plan.classes[name]
                groups.setdefault((kind, fmt.name), []).append((stats.snr_db, stats.added_zero_share, name, good))
                figures = {"snr_db": stats.snr_db, "zero_share": stats.zero_share}
                state.weights.append({"tensor": name, "class": kind, "format": fmt.name, **figures})
                progress(done + 1, len(weights))
        bits = {fmt.name: fmt for fmt in part.plan.formats.values()}
        for (group, fmt_name), found in sorted(groups.items()):
            snr, _, worst_name, _ = min(found)
            bad = [name for *_, name, good in found if not good]
            gate = {"min_snr_db": gates.gate(subject.overrides, "L3", "min_snr_db", gates.snr_floor(bits[fmt_name]))}
            metrics = {"min_snr_db": snr, "added_zeros": max(share for _, share, *_ in found), "tensors": len(found)}
            note = f"failing: {', '.join(bad[:3])}" if bad else f"least at {worst_name}"
            state.results.append(_row(component, "L3", f"{group} {fmt_name}", metrics, gate, not bad, note))
    left = unread_tensors(subject.tensors, used, subject.unused, subject.checkpoint_rows)
    spare = subject.tensors.keys() - used - subject.unused
    metrics = {"used": len(used), "left_over": len(left), "not_read": len(subject.unused) + len(spare) - len(left)}
    note = f"no part of the model reads {', '.join(left[:3])}" if left else "every tensor of the checkpoint is used"
    state.results.append(_row("model", "L3", "coverage", metrics, {"left_over": 0}, not left, note))


def _lowering(evidence: Evidence, state: Climb) -> None:
    """L4: the artifacts against the canonical graphs over the very weights that the artifacts store."""
    subject, shipped = evidence.subject, evidence.shipped
    rounds = any(_kind(part) != "float" for part in subject.parts.values())  # to float16, or to int8 by integer kernels
    exact = evidence.run_artifacts(exact=True) if rounds else shipped
    with evidence.watch("Running the dequantised graph") as progress:
        graph = evidence.run_graph(evidence.sequences, subject.stored_rows, progress)
    how = ", float32 activations" if rounds else ""
    why = "the lowering, apart from the rounding of activations" if rounds else ""
    features = gates.gate(subject.overrides, "L4", "features", gates.EXACT_FEATURES)
    for name in subject.parts:
        if name == DECODER:
            continue
        state.results.append(_features_row(name, "L4", f"features{how}", graph, exact, "max_abs", features, why))
        if _kind(subject.parts[name]) != "float":
            limit = gates.SHIPPED_FEATURES[_kind(subject.parts[name])]
            limit = gates.gate(subject.overrides, "L4", "shipped_features", limit)
            state.results.append(_features_row(name, "L4", "features, as shipped", graph, shipped, "rms", limit))
    limit = gates.gate(subject.overrides, "L4", "max_abs", gates.EXACT_MAX_ABS)
    change = 0.0
    for sequence in evidence.sequences:
        want = graph.logits[sequence.name]
        worst = max_abs(want, exact.logits[sequence.name])
        metrics = {"max_abs": worst, "steps": len(want)}
        title = _title(f"logits{how}", sequence)
        state.results.append(_row(DECODER, "L4", title, metrics, {"max_abs": limit}, worst <= limit, why))
        off = max_abs(want, shipped.logits[sequence.name])
        change = max(change, off)
        if rounds:
            kl = kl_divergence(want, shipped.logits[sequence.name])
            most, least = (table[_kind(subject.decoder)] for table in (gates.SHIPPED_KL, gates.SHIPPED_SNR_DB))
            most = gates.gate(subject.overrides, "L4", "kl", most)
            noise = snr_db(want, shipped.logits[sequence.name])
            middle = float(np.median(kl))
            metrics = {
                "median_kl": middle, "kl": float(kl.mean()), "snr_db": noise, "max_abs": off, "steps": len(want)
            }  # fmt: skip
            title = _title("logits, as shipped", sequence)
            # What a script lets follow a prompt is unlike anything a model saw, and one step of it may turn on a tie
            # (0.7 nats of autoglm-phone-mini's after a picture, the other nine 0.02): the mean is judged along answers.
            limits = {"median_kl": most, "min_snr_db": least}
            state.results.append(_row(DECODER, "L4", title, metrics, limits, middle <= most and noise >= least))
        golden = state.golden.setdefault(sequence.name, _golden(sequence, evidence.oracle.logits[sequence.name]))
        golden["artifact_logits"] = _golden_rows(sequence, shipped.logits[sequence.name])
    state.drift = _drift(evidence.oracle.hidden, graph.hidden)
    # Other processors' kernels round differently. Each is no further from the exact run than rounding moved this one,
    # so that two of them may differ by twice that.
    state.golden_gates["max_abs"] = max(gates.EXACT_MAX_ABS, 2 * change)


def _behaviour(evidence: Evidence, state: Climb) -> None:
    """L5: greedy answers of the artifacts, judged token by token by the two models they stand for."""
    from edgeexport.parity.reference import Reference

    subject, oracle, shipped = evidence.subject, evidence.oracle, evidence.shipped
    kind, grade = _kind(subject.decoder), _grade(subject.decoder)
    for name, part in subject.parts.items():
        if name != DECODER:
            limit = gates.gate(subject.overrides, "L5", "features", gates.REFERENCE_FEATURES[_kind(part)])
            title = "features, against the original"
            state.results.append(_features_row(name, "L5", title, oracle, shipped, "rms", limit))
    answered = evidence.greedy()
    prompts = {**subject.questions, **subject.shown}
    firsts = [len(prompt.tokens) - 1 for prompt in prompts.values()]
    tie = gates.gate(subject.overrides, "L5", "near_tie", gates.NEAR_TIE[kind])
    asked = [replace(each.example, tokens=each.example.tokens[:-1]) for each in answered]
    chosen = [each.example.tokens for each in answered]
    for level, title, rows in (
        ("L4", "tokens, against the stored weights", subject.stored_rows),
        ("L5", "tokens, against transformers", subject.checkpoint_rows),
    ):
        with evidence.watch(f"Judging {title.removeprefix('tokens, ')}"):
            reference = Reference(subject.oracle(), rows)
            answers = reference.answers(asked, firsts)
        agree, near, total = _agreement([a.logits for a in answers], chosen, firsts, tie)
        least = 1.0 if level == "L4" else gates.gate(subject.overrides, "L5", "top1", gates.REFERENCE_TOP1[grade])
        state.results.append(_tokens_row(level, title, agree, near, total, {"top1": least, "near_tie": tie}))
        most = gates.SHIPPED_KL[kind] if level == "L4" else gates.REFERENCE_KL[grade]
        against = title.removeprefix("tokens, ")
        for kinds, names in {"text": subject.questions, "pictures and sound": subject.shown}.items():
            along = [
                kl_divergence(answer.logits[: len(each.logits)], np.stack(each.logits))
                for name, each, answer in zip(prompts, answered, answers, strict=True)
                if name in names and each.logits
            ]
            if along:
                limit = gates.gate(subject.overrides, level, "kl", most)
                state.results.append(_along_row(level, f"logits of answers to {kinds}, {against}", along, limit))
    with evidence.watch("Answering with the original model"):
        _answers(subject, state, answered, [answer.logits for answer in answers], prompts, reference, tie, grade)


def _answers(
    subject: Subject, state: Climb, answered: Sequence[Answered], logits: Sequence[Array],
    prompts: Mapping[str, Example], reference: Reference, tie: float, grade: str,
) -> None:  # fmt: skip
    """L5: whole answers, the original's beside the artifact's."""
    from edgeexport.parity import answers

    def judge(examples: Sequence[Example], firsts: Sequence[int]) -> list[Array]:
        return [answer.logits for answer in reference.answers(examples, firsts)]

    mine = [each.example.tokens[len(prompt.tokens) :] for each, prompt in zip(answered, prompts.values(), strict=True)]
    size = sum(ref.stored_bytes for ref in subject.tensors.values())
    passes = answers.PASSES_OF_LARGE if size > answers.LARGE_BYTES else answers.PASSES
    compared = answers.compare(
        list(prompts), list(prompts.values()), mine, logits, judge, subject.stop_ids, tie, passes
    )
    for each in compared:
        state.answers.append(
            {
                "prompt": each.name,
                "original": subject.decode(each.original),
                "artifact": subject.decode(each.artifact),
                "agree": each.agree,
                "tokens": len(each.artifact),
                "whole": each.whole,
                "near_tie": each.near_tie,
            }
        )
    whole, near = sum(each.whole for each in compared), sum(each.near_tie for each in compared)
    decided = len(compared) - near
    least = gates.gate(subject.overrides, "L5", "answers", gates.REFERENCE_ANSWERS[grade])
    share = whole / decided if decided else 0.0
    note = f"{whole} of {decided} answers agree to the end; {near} part near a tie"
    metrics = {"share": share, "near_tie": near, "answers": len(compared)}
    row = _row(DECODER, "L5", "answers, against transformers", metrics, {"share": least}, share >= least, note)
    state.results.append(row if decided else replace(row, verdict=Verdict.AMBIGUOUS))


def _along_row(level: str, title: str, along: Sequence[Array], limit: float) -> ParityResult:
    """KL along the artifact's own answers, all steps of all of them together."""
    steps = np.concatenate(along)
    metrics = {"kl": float(steps.mean()), "steps": len(steps)}
    return _row(DECODER, level, title, metrics, {"kl": limit}, metrics["kl"] <= limit)


def _tokens_row(level: str, title: str, agree: int, near: int, total: int, gate: Mapping[str, float]) -> ParityResult:
    """`agree` of the tokens that are not `near` a tie; AMBIGUOUS where too few of them are left to judge."""
    decided = total - near
    share = agree / decided if decided else 0.0
    note = f"{agree} of {decided} decided tokens agree; {near} near a tie are set aside"
    metrics = {"top1": share, "ambiguous": near, "tokens": total}
    row = _row(DECODER, level, title, metrics, gate, share >= gate["top1"], note)
    enough = decided >= (1 if gate["top1"] == 1 else gates.FEWEST_DECIDED)
    return row if enough else replace(row, verdict=Verdict.AMBIGUOUS)


def _features_row(
    component: str, level: str, title: str, want: Outcome, got: Outcome, metric: str, limit: float, note: str = ""
) -> ParityResult:
    """A component's outputs, all calls together. Both metrics are relative to the outputs' own root mean square."""
    pairs = list(zip(want.made.get(component, []), got.made.get(component, []), strict=True))
    if not pairs:
        why = "no prompt of the ladder uses it"
        return ParityResult(component, level, title, {}, {}, Verdict.NOT_RUN, why)
    left, right = (np.concatenate([each[side].reshape(-1) for each in pairs]) for side in (0, 1))
    scale = rms(left) or 1.0
    found = max_abs(left, right) / max(1.0, scale) if metric == "max_abs" else rms(left - right) / scale
    metrics = {metric: found, "rms_of_features": scale, "values": left.size}
    return _row(component, level, title, metrics, {metric: limit}, found <= limit, note)


def _title(what: str, sequence: Script) -> str:
    return what if sequence.name == "text" else f"{what} ({sequence.name})"


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
        held = subject.stored_rows(ref.name, start, stop).reshape(want.shape)
        # rounding is as even as it is where it was done
        want, held = (subject.smoothed(ref.name, start, rows) for rows in (want, held))
        stats = stats.merge(compare_rows(want, held))
    return stats


def _golden(sequence: Script, reference: Array) -> dict[str, Array]:
    tokens = sequence.example.tokens
    return {
        "tokens": tokens,
        "prefill": np.array([len(tokens) - DECODE_STEPS], np.int64),
        "reference_logits": _golden_rows(sequence, reference),
    }


def _golden_rows(sequence: Script, logits: Array) -> Array:
    """The rows after the whole prompt and after each token that follows it."""
    return np.ascontiguousarray(logits[sequence.prompt_calls - 1 :], np.float32)


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


def _kind(part: Part) -> str:
    return gates.kind_of(_stored(part), half=part.half)


def _grade(part: Part) -> str:
    return gates.grade_of(_stored(part), part.provenance, half=part.half)


def _stored(part: Part) -> gates.Stored:
    return [(part.plan.classes[name], fmt) for name, fmt in part.plan.formats.items()]


def _row(
    component: str, level: str, output: str, metrics: Mapping[str, float | int],
    gate: Mapping[str, float | int], good: bool, note: str = "",
) -> ParityResult:  # fmt: skip
    finite = all(np.isfinite(value) or value == np.inf for value in metrics.values())
    verdict = Verdict.PASS if good and finite else Verdict.FAIL
    return ParityResult(component, level, output, dict(metrics), dict(gate), verdict, note)


def _not_run(component: str, level: str, why: str) -> ParityResult:
    return ParityResult(component, level, "-", {}, {}, Verdict.NOT_RUN, why)
