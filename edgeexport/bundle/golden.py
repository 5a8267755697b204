"""Golden vectors: replay what the reference was asked, compare what the artifact answers.

golden/text.safetensors, and one file for each other modality, hold `tokens` int64 [P+N], `prefill` int64 [1] (P),
`reference_logits` float32 [N+1, V] of the original model after the prefill of tokens[:P] and after each of the N tokens
that follow, and optionally `artifact_logits` float32 [N+1, V], what this artifact computed where it was built. What
else they hold is described in conformance.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeexport import errors
from edgeexport.bundle import conformance
from edgeexport.bundle.gate_bounds import bounded, bounded_max_abs
from edgeexport.bundle.manifest import Gates, GoldenMedium
from edgeexport.session import media as media_files
from edgeexport.session.audio import read_wav
from edgeexport.session.image_file import read_image

if TYPE_CHECKING:
    from edgeexport.bundle.bundle import Bundle
    from edgeexport.session.inputs import Features
    from edgeexport.session.session import Session

MAX_BYTES = 1 << 30
"""Golden vectors are read whole; a few steps of the largest vocabulary take a hundredth of this."""


@dataclass(frozen=True)
class Vectors:
    """The contents of one file, checked against each other. `prepared` is what conformance.py speaks of."""

    prompt: NDArray[np.int64]
    answer: NDArray[np.int64]
    reference: NDArray[np.float32]
    artifact: NDArray[np.float32] | None
    prepared: Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Comparison:
    """A comparison that passed: `metric` is "max_abs" or "kl", over `steps` rows of logits."""

    metric: str
    value: float
    gate: float
    steps: int


def replay(bundle: Bundle, threads: int | None = None) -> Comparison:
    """Run the bundle over its golden vectors, of every modality that has some, in a session of its own.

    Raises golden-mismatch when a gate is missed, golden-unusable when there is nothing to compare, and what opening
    the session raises.
    """
    golden = bundle.manifest.golden
    if golden.file is None:
        raise errors.golden_unusable(bundle.path, golden.not_run)
    if golden.chat is not None:
        data = bundle.read(golden.chat, conformance.MAX_BYTES)
        conformance.check_chat(data, bundle.chat_template(), bundle.tokenizer())
    found = []
    limits = bounded(bundle.manifest)
    with bundle.session(threads) as session:
        for file, media in ((golden.file, ()), *((case.file, case.media) for case in golden.shown)):
            where = bundle.path / file
            vectors = read_vectors(bundle.read(file, MAX_BYTES), where)
            features = _encoded(session, bundle, media, vectors, where)
            found.append(compare(answered_logits(session, vectors, where, features), vectors, limits, where))
    worst = max(found, key=lambda comparison: comparison.value)
    return Comparison(worst.metric, worst.value, worst.gate, sum(comparison.steps for comparison in found))


def _encoded(
    session: Session, bundle: Bundle, shown: Sequence[GoldenMedium], vectors: Vectors, where: Path
) -> list[Features]:
    """What the bundle's own encoders make of the pictures and sounds, from the files on; checked half-way.

    Raises golden-mismatch.
    """
    inputs = session.inputs
    if inputs is None or not shown:
        return []
    given = []
    for medium in shown:
        data = bundle.read(medium.file, media_files.MAX_BYTES)
        image = medium.kind == "image"
        given.append(inputs.prepare_image(read_image(data)) if image else inputs.prepare_audio(read_wav(data)))
    conformance.check_prepared(vectors.prepared, conformance.prepared(inputs.contract, vectors.prompt, given), where)
    return [inputs.encode(each) for each in given]


def read_vectors(data: bytes, path: Path) -> Vectors:
    """The vectors in the bytes of the file `path`. Raises golden-unusable."""
    import safetensors
    import safetensors.numpy

    try:
        tensors = safetensors.numpy.load(data)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise errors.golden_unusable(path, f"it cannot be read: {error}") from error
    prefill = _tensor(tensors, "prefill", np.dtype(np.int64), 1, path)
    tokens = _tensor(tensors, "tokens", np.dtype(np.int64), 1, path)
    reference = _tensor(tensors, "reference_logits", np.dtype(np.float32), 2, path)
    artifact = None
    if "artifact_logits" in tensors:
        artifact = _tensor(tensors, "artifact_logits", np.dtype(np.float32), 2, path)
        if artifact.shape != reference.shape:
            raise errors.golden_unusable(path, "artifact_logits and reference_logits differ in shape")
    if len(prefill) != 1 or not 1 <= prefill[0] <= len(tokens):
        raise errors.golden_unusable(path, f"prefill is {prefill.tolist()}, with {len(tokens)} tokens")
    split = int(prefill[0])
    if len(reference) != len(tokens) - split + 1:
        raise errors.golden_unusable(path, f"{len(reference)} rows of logits for {len(tokens) - split + 1} calls")
    prepared = {
        name: tensor for name, tensor in tensors.items() if name.startswith("input.") or name == "rope_positions"
    }
    return Vectors(tokens[:split], tokens[split:], reference, artifact, prepared)


def answered_logits(
    session: Session, vectors: Vectors, where: object, features: Sequence[Features] = ()
) -> NDArray[np.float32]:
    """Logits [N+1, V] of the session, which is fed as the reference was. Raises golden-mismatch."""
    expected = vectors.reference.shape
    if session.vocab != expected[1]:
        raise errors.golden_mismatch(where, f"the artifact has {session.vocab} logits, the reference {expected[1]}")
    logits = np.empty(expected, np.float32)
    session.reset()
    logits[0] = session.prefill(vectors.prompt, features)
    for row, token in enumerate(vectors.answer, start=1):
        logits[row] = session.decode(int(token))
    return logits


def compare(logits: NDArray[np.float32], vectors: Vectors, gates: Gates, where: object) -> Comparison:
    """Compare with the artifact's own logits if they and a gate for them are there, else with the reference's.

    `logits` is [N+1, V]. Raises golden-mismatch, and golden-unusable when no gate fits what the file holds.
    """
    if vectors.artifact is not None and gates.max_abs is not None:
        metric, gate = "max_abs", bounded_max_abs(gates.max_abs, vectors.artifact)
        steps = max_abs_difference(logits, vectors.artifact)
        value = float(steps.max())
    elif gates.kl is not None:
        metric, gate = "kl", gates.kl
        steps = kl_divergence(vectors.reference, logits)
        value = float(steps.mean())
    else:
        raise errors.golden_unusable(where, "there is no gate for the logits in the file, so nothing was compared")
    # a NaN is never below a gate
    if not value <= gate:
        worst = int(np.argmax(steps))
        raise errors.golden_mismatch(where, f"{metric} is {value:.6g}, the gate is {gate:g}; worst at step {worst}")
    return Comparison(metric, value, gate, len(steps))


def max_abs_difference(one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float64]:
    """Largest absolute difference in each row of [N, V]; NaN where a value is not finite."""
    with np.errstate(invalid="ignore"):
        difference: NDArray[np.float64] = np.abs(one.astype(np.float64) - other).max(axis=1)
    return difference


def kl_divergence(reference: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float64]:
    """KL(softmax(reference) || softmax(other)) in nats, for each row of [N, V]; NaN where a value is not finite."""
    with np.errstate(invalid="ignore"):
        of_reference, of_other = _log_softmax(reference), _log_softmax(other)
        divergence: NDArray[np.float64] = (np.exp(of_reference) * (of_reference - of_other)).sum(axis=1)
    return divergence


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    logged: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return logged


def _tensor(tensors: Mapping[str, Any], name: str, dtype: np.dtype[Any], rank: int, path: Path) -> NDArray[Any]:
    if name not in tensors:
        raise errors.golden_unusable(path, f"{name} is missing")
    tensor: NDArray[Any] = tensors[name]
    if tensor.dtype != dtype or tensor.ndim != rank or tensor.size == 0:
        raise errors.golden_unusable(path, f"{name} is {tensor.dtype.name} {list(tensor.shape)}")
    return tensor
