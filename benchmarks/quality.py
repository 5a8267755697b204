"""How far 4-bit weights are from the model they were made of, ours and llama.cpp's in one run: KL, top-1, perplexity.

    python benchmarks/quality.py [--source gguf|bf16|both] [--peer] [--case NAME ...] [--text FILE] [--quick]
                                 [--json FILE]

Every row holds the weights as an artifact stores them, multiplied by float32 activations in transformers' own model, so
that formats are compared and not kernels. The text is benchmarks/heldout.txt, which no calibration has seen. `bf16` is
the packaged SmolLM2-135M with seeded noise of 2 % of each row's deviation, saved as bfloat16: weights that lie on no
lattice of 4 bits.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from edgeexport import calibrate, choosing, families, quant, sensitivity, steps, targets
from edgeexport.bundle.cache import Cache
from edgeexport.canonical.dialect import classes
from edgeexport.canonical.streaming import Rows, StreamedGraph
from edgeexport.checkpoint import WeightReader, open_checkpoint
from edgeexport.console import Console
from edgeexport.core import Array, CanonicalModel, Example, Format, QuantPlan, TensorRef, Traits
from edgeexport.job import Job
from edgeexport.parity import examples
from edgeexport.parity.answers import Compared, Judge, compare
from edgeexport.parity.compare import margins
from edgeexport.parity.reference import Reference
from edgeexport.quant import FORMATS, Scheme, budget, calibration
from edgeexport.quant.budget import Budget
from edgeexport.quant.calibration import Calibration, Method
from edgeexport.quant.schemes import INT8_CHANNEL
from edgeexport.quant.source import PlannedWeights
from edgeexport.session.tokenizer import Tokenizer

MODEL = "smollm2-135m"
NOISE, SEED = 0.02, 7
LENGTH, COUNT = 256, 8
NEAR = 1.0
"""Two logits that differ by less are near to each other."""
HERE = Path(__file__).parent
B32 = FORMATS["int4-b32"]
SYMMETRIC, POSITIVE, ZERO_POINTS = Traits(), Traits(positive_scales=True), Traits(shifts=("zero",))
CARRYING = Traits(shifts=("int8", "zero"), int8_blocks=True)
"""ONNX Runtime's."""


@dataclass(frozen=True)
class Case:
    """One way to store the decoder's matrices, and what the issue asks of it."""

    name: str
    table: Format
    method: Method = "gptq"
    value: Format | None = None
    traits: Traits = SYMMETRIC
    carried: bool = False
    bits: float = 0.0
    """Of a weight, that `--quant auto` chooses the formats within; 0 where they are the case's own."""
    kl: float = 0.0
    top1: float = 0.0


CASES = (
    Case("rounded, table int4", B32, "none"),
    Case("rounded, table int8", INT8_CHANNEL, "none"),
    Case("symmetric, table int4", B32, kl=0.20, top1=0.78),
    Case("v_proj int8, table int4", B32, value=INT8_CHANNEL, kl=0.16, top1=0.80),
    Case("table int8, search alone", INT8_CHANNEL, "search", kl=0.18, top1=0.78),
    Case("table int8, GPTQ", INT8_CHANNEL, kl=0.145, top1=0.82),
    Case("table int8, GPTQ, positive scales", INT8_CHANNEL, traits=POSITIVE, kl=0.17, top1=0.80),
    Case("table int8, GPTQ, zero points", INT8_CHANNEL, traits=ZERO_POINTS, kl=0.13, top1=0.82),
    Case("table and v_proj int8", INT8_CHANNEL, value=INT8_CHANNEL, kl=0.11, top1=0.835),
    Case("v_proj int8, table int4, zero points", B32, value=INT8_CHANNEL, traits=ZERO_POINTS),
    Case("table and v_proj int8, zero points", INT8_CHANNEL, value=INT8_CHANNEL, traits=ZERO_POINTS),
    Case("carried over, table int4", B32, traits=CARRYING, carried=True, kl=0.055, top1=0.88),
    Case("carried over, table int8", INT8_CHANNEL, traits=CARRYING, carried=True, kl=0.003, top1=0.96),
    Case("auto, nothing carried", INT8_CHANNEL, traits=CARRYING, bits=6.159, kl=0.06, top1=0.87),
    Case("auto, carried where it pays", INT8_CHANNEL, traits=CARRYING, carried=True, bits=6.159, kl=0.06, top1=0.87),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", choices=("gguf", "bf16", "both"), default="both")
    parser.add_argument("--case", action="append", help="part of a case's name; all of them by default")
    parser.add_argument("--text", type=Path, default=HERE / "heldout.txt")
    parser.add_argument("--work", type=Path, default=Path("dist/quality"), help="where the bf16 source is kept")
    parser.add_argument("--peer", action="store_true", help="llama.cpp's quantiser, too, in a venv of its own")
    parser.add_argument("--quick", action="store_true", help="no answers to questions, which take as long again")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    found: dict[str, list[dict[str, Any]]] = {}
    missed = 0
    for source in ("gguf", "bf16") if given.source == "both" else (given.source,):
        folder = MODEL if source == "gguf" else str(noisy_source(given.work / "smollm2-135m-bf16"))
        print(f"\n{source}: {folder}")
        print(
            f"{'case':42} {'bits':>6} {'KL':>8} {'asked':>6} {'top-1':>6} {'ppl':>7} {'answers':>8} near tie  seconds"
        )
        rows = found.setdefault(source, [])
        peer = given.work if given.peer else None
        for row in measured(folder, given.text, chosen(given.case, source), peer, given.quick):
            rows.append(row)
            asked = f"{row['asked_kl']:6.3f}" if row["asked_kl"] and source == "gguf" else " " * 6
            print(
                f"{row['case']:42} {row['bits']:6.3f} {row['kl']:8.4f} {asked} {row['top1']:6.3f} {row['ppl']:7.3f} "
                f"{row['answers']:6} /8 {row['near_tie']:8} {row['seconds']:8.1f}",
                flush=True,
            )
            for text in row["differing"]:
                print(f"    {text}")
            if source == "gguf" and row["asked_kl"]:
                missed += row["kl"] > row["asked_kl"] or row["top1"] < row["asked_top1"]
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1))
    print(f"\n{missed} rows miss what is asked" if missed else "\nevery row holds what is asked")
    return 1 if missed else 0


def chosen(parts: Sequence[str] | None, source: str) -> Iterator[Case]:
    """The cases of these names; nothing is carried over from a source that has no integers."""
    for case in CASES:
        if (not parts or any(part in case.name for part in parts)) and not (case.carried and source == "bf16"):
            yield case


def measured(
    model: str, text: Path, cases: Iterator[Case], peer: Path | None, quick: bool
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """A row for the original, then one for each case."""
    checkpoint = open_checkpoint(model)
    family = families.find(checkpoint.model_type)
    console = Console(quiet=True)
    job = Job(checkpoint, targets.load("host-ort"), "int4-b32", 2048, "L1", family)
    tokenizer = Tokenizer(job.tokenizer_files["tokenizer.json"])
    ids = np.array(tokenizer.encode(text.read_text("utf-8").replace("\n---\n", "\n")), np.int64)
    passages = [Example(ids[at : at + LENGTH]) for at in range(0, min(len(ids) - LENGTH, LENGTH * COUNT), LENGTH)]
    with WeightReader() as reader:
        part = steps.trace(job, Cache(), console)[0]
        weights, tensors = part.models[0].weights, checkpoint.tensors
        original = checkpoint_rows(reader, tensors)
        reference = logits(job, original, passages)
        questions = None if quick else Questions(job, original)
        first = figures(reference, reference, passages, 0.0, None)
        yield {
            "case": "original",
            "bits": bits_of_source(weights),
            **first,
            "answers": 8,
            "near_tie": 0,
            "differing": [],
        }
        kinds = classes(part.models[0].graph, weights, "decoder")
        for case in cases:
            started = time.perf_counter()
            scheme = Scheme(case.name, case.name, B32, case.table, case.table, INT8_CHANNEL, value=case.value)
            encodings = {name: ref.encoding for name, ref in weights.items()} if case.carried else {}
            plan = quant.plan(part.shapes(), kinds, scheme, case.traits, encodings)
            if case.bits:
                plan = chosen_plan(job, part, kinds, reader, case, encodings)
            own = replace(job, calibration=Calibration.of(case.method, None))
            done = choosing.calibrate(own, [replace(part, plan=plan)], reader, Cache(), console)[0]
            source = PlannedWeights(reader, weights, plan, codes=done.codes)
            by_ref = {ref.name: name for name, ref in weights.items()}
            row = judged(job, stored(source, by_ref, tensors), questions, reference, passages, case, started)
            yield {"case": case.name, "bits": bits(plan, weights), **row}
        if peer is not None:
            yield from peers(job, part.models[0], reader, peer, lambda rows, started: judged(
                job, rows, questions, reference, passages, None, started
            ))  # fmt: skip


def chosen_plan(
    job: Job, part: steps.Built, kinds: Mapping[str, Any], reader: WeightReader, case: Case,
    encodings: Mapping[str, str],
) -> QuantPlan:  # fmt: skip
    """The formats that `--quant auto` chooses within the case's bits of a weight."""
    matrices = {name: shape for name, shape in part.shapes().items() if len(shape) == 2}
    model = part.models[0]
    if not encodings:  # as of a checkpoint without integers of its own
        weights = {name: replace(ref, encoding="F32") for name, ref in model.weights.items()}
        model = replace(model, weights=weights)
    task = sensitivity.Task(model, kinds, case.traits)
    own = replace(job, calibration=Calibration.of(case.method, None))
    with TemporaryDirectory() as folder:
        units = choosing.priced(own, [part], task, reader, Path(folder), Console(quiet=True))
    choice = budget.choose(units, 0, Budget(size=int(case.bits * elements(matrices) / 8)))
    print(f"    expected KL {choice.expected_kl}: {budget.summary(choice)}", flush=True)
    return quant.plan(part.shapes(), kinds, "auto", case.traits, encodings, choice.tensors)


def judged(
    job: Job, rows: Rows, questions: Questions | None, reference: Sequence[Array], passages: Sequence[Example],
    case: Case | None, started: float,
) -> dict[str, Any]:  # fmt: skip
    """What these weights make of the text and of the questions."""
    seconds = time.perf_counter() - started
    row = figures(reference, logits(job, rows, passages), passages, seconds, case)
    whole, near, texts = questions.agreeing(rows) if questions is not None else (0, 0, [])
    return {**row, "answers": whole, "near_tie": near, "differing": texts}


def peers(
    job: Job, model: CanonicalModel, reader: WeightReader, work: Path, judge: Callable[[Rows, float], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """llama.cpp's own quantiser over the same weights, with and without the statistics of the same calibration."""
    import quality_peer

    work.mkdir(parents=True, exist_ok=True)
    tensors = job.checkpoint.tensors
    floats = {name: reader.read(ref) for name, ref in tensors.items()}
    source = work / f"{job.checkpoint.name}.gguf"
    quality_peer.write_source_gguf(floats, source)
    del floats
    strengths = importance(job, model, reader)
    for scheme in ("q4_0", "q4_k_m"):
        for statistics in (None, strengths):
            started = time.perf_counter()
            made = work / f"{job.checkpoint.name}.{scheme}.gguf"
            size = quality_peer.quantise(source, scheme, statistics, made)
            held = quality_peer.dequantised(made)
            row = judge(lambda name, start, stop, held=held: held[name][start:stop], started)  # type: ignore[misc]
            name = f"llama.cpp {scheme.upper()}{' + imatrix' if statistics else ''}"
            yield {"case": name, "bits": size, **row}


def importance(job: Job, model: CanonicalModel, reader: WeightReader) -> dict[str, Array]:
    """The mean square of what each multiplication is fed over the calibration's texts, by ggml's names."""
    import quality_peer

    graph = StreamedGraph(model, tapped=True, slots=calibration.LENGTH)
    own = replace(job, calibration=Calibration.of("search", None))
    values = graph.begin(choosing.calibration_calls(own, [], reader))
    sums: dict[str, list[Any]] = {}

    def tap(name: str, x: Array) -> None:
        held = sums.setdefault(name, [0, np.zeros(x.shape[-1])])
        held[0] += x.shape[1]
        held[1] += np.square(x, dtype=np.float64).sum((0, 1))

    rows = calibrate.rows_of(model, reader.rows)
    for stage in model.stages[:-1]:
        graph.advance(stage, values, rows, tap)
    return {
        quality_peer.ggml_name(model.weights[name].name): (total / count).astype(np.float32)
        for name, (count, total) in sums.items()
    }


def checkpoint_rows(reader: WeightReader, tensors: Mapping[str, TensorRef]) -> Rows:
    """The checkpoint's rows by its own names, read once."""
    held = {name: reader.read(ref) for name, ref in tensors.items()}
    return lambda name, start, stop: held[name][start:stop]


def stored(source: PlannedWeights, by_ref: Mapping[str, str], tensors: Mapping[str, TensorRef]) -> Rows:
    """Rows as an artifact stores them, by the checkpoint's names: read once, since a model this small fits."""
    held = {name: source.stored_rows(mine, 0, tensors[name].shape[0]) for name, mine in by_ref.items()}
    return lambda name, start, stop: held[name][start:stop]


def logits(job: Job, rows: Rows, passages: Sequence[Example]) -> list[Array]:
    """float32 [T, V] of each example, by transformers' unmodified model."""
    firsts = [0] * len(passages)
    answers = Reference(job.family.oracle(job.checkpoint.config), rows).answers(passages, firsts)
    return [answer.logits for answer in answers]


class Questions:
    """The ladder's questions, and the original's answers of 16 tokens to them."""

    def __init__(self, job: Job, original: Rows) -> None:
        files = job.tokenizer_files["tokenizer.json"]
        self._job, self._tokenizer = job, Tokenizer(files)
        vocab = job.family.geometry(job.checkpoint.config).vocab
        asked = examples.questions(files, job.chat_template, vocab, 2048)
        self._names, self._prompts = list(asked), list(asked.values())
        self._stop = frozenset(job.special_tokens.stop_ids)
        self._answers = [[0] * steps.ANSWER_TOKENS for _ in self._names]
        self._answers = [_padded(each.original) for each in self._greedy(original)]
        self._margins = [margins(rows) for rows in self._along(self._judge(original))]

    def agreeing(self, rows: Rows) -> tuple[int, int, list[str]]:
        """Answers that are the original's to the end, those that part where the original's two best tokens are near to
        each other, and what those that part say."""
        whole, near, texts = 0, 0, []
        decode = self._tokenizer.decode
        for k, each in enumerate(self._greedy(rows)):
            # the guess, "the artifact's", is the original's answer
            whole += each.whole
            near += not each.whole and bool(self._margins[k][each.agree] < NEAR)
            if not each.whole:
                texts.append(f"{each.name!r}: {decode(each.original)!r} for {decode(each.artifact)!r}")
        return whole, near, texts

    def _greedy(self, rows: Rows) -> list[Compared]:
        """The answers that a model of these weights gives, found by guessing the original's."""
        judge = self._judge(rows)
        passes = steps.ANSWER_TOKENS
        return compare(
            self._names, self._prompts, self._answers, self._along(judge), judge, self._stop, NEAR, passes
        )  # fmt: skip

    def _along(self, judge: Judge) -> list[Array]:
        """Logits along the guesses."""
        whole = [
            Example(np.concatenate([prompt.tokens, np.array(answer[:-1], np.int64)]))
            for prompt, answer in zip(self._prompts, self._answers, strict=True)
        ]
        return list(judge(whole, [len(prompt.tokens) - 1 for prompt in self._prompts]))

    def _judge(self, rows: Rows) -> Judge:
        reference = Reference(self._job.family.oracle(self._job.checkpoint.config), rows)
        return lambda shown, firsts: [answer.logits for answer in reference.answers(shown, firsts)]


def _padded(answer: Sequence[int]) -> list[int]:
    return [*answer, *[0] * (steps.ANSWER_TOKENS - len(answer))]


def figures(
    reference: Sequence[Array], got: Sequence[Array], passages: Sequence[Example], seconds: float, case: Case | None
) -> dict[str, Any]:
    """KL in nats from the original, share of positions with the same best token, perplexity."""
    import torch

    kl, same, loss, count = 0.0, 0, 0.0, 0
    for want, have, example in zip(reference, got, passages, strict=True):
        p, q = (torch.log_softmax(torch.from_numpy(each), -1) for each in (want, have))
        kl += float(torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True))
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        loss -= float(q[:-1].gather(1, torch.from_numpy(example.tokens[1:, None])).sum())
        count += len(want)
    return {
        "kl": kl / count, "top1": same / count, "ppl": float(np.exp(loss / (count - len(passages)))),
        "seconds": seconds,
        "asked_kl": case.kl if case else 0.0, "asked_top1": case.top1 if case else 0.0,
    }  # fmt: skip


def bits(plan: Any, weights: Mapping[str, Any]) -> float:
    """Bits of a weight, over all matrices, a tied table once."""
    matrices = {name: ref.shape for name, ref in weights.items() if len(ref.shape) == 2}
    return 8 * sum(plan.formats[name].nbytes(shape) for name, shape in matrices.items()) / elements(matrices)


def bits_of_source(weights: Mapping[str, Any]) -> float:
    matrices = {name: ref for name, ref in weights.items() if len(ref.shape) == 2}
    return 8 * sum(ref.nbytes for ref in matrices.values()) / elements({n: r.shape for n, r in matrices.items()})


def elements(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(int(np.prod(shape)) for shape in shapes.values())


def noisy_source(folder: Path) -> Path:
    """The packaged model, every matrix with noise, in bfloat16, as a folder that transformers would have written."""
    import torch
    from safetensors.torch import save_file

    if (folder / "config.json").exists():
        return folder
    checkpoint = open_checkpoint(MODEL)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(SEED)
    tensors = {}
    with WeightReader() as reader:
        for name, ref in checkpoint.tensors.items():
            rows = torch.from_numpy(reader.read(ref))
            if rows.ndim == 2:
                rows += NOISE * rows.std(1, keepdim=True) * torch.randn(rows.shape, generator=generator)
            tensors[name] = rows.to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name, data in checkpoint.read_tokenizer().items():
        (folder / name).write_bytes(data)
    config = {**checkpoint.config, "model_type": checkpoint.model_type, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


if __name__ == "__main__":
    sys.exit(main())
