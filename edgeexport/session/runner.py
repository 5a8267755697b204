"""What a backend offers to a session: one open decoder with its KV cache, and graphs that keep nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeexport import errors
from edgeexport.core import Array, Dim, TensorSpec


@dataclass(frozen=True)
class Call:
    """One call of a decoder: `fed` are token ids int64 [T], or embeddings float32 [T,hidden] where the model has its
    embedding apart; they go to cache slots `position`.. . `rope` int64 [3,T] is for decoders with M-RoPE."""

    fed: Array
    position: int
    rope: Array | None = None

    def inputs(self) -> dict[str, Array]:
        """The call as a graph's inputs by name, its cache apart."""
        named = {
            "input_ids" if self.fed.ndim == 1 else "inputs_embeds": self.fed[None],
            "position": np.array([self.position], np.int64),
        }
        return named if self.rope is None else {**named, "rope_positions": self.rope[:, None]}


def refuse_other_signature(
    where: Path,
    runtime: str,
    promised: Any,
    found: tuple[Iterable[TensorSpec], Iterable[TensorSpec]],
    state: Iterable[tuple[str, str]] = (),
) -> None:
    """What a runner asks before it uses an open artifact: that the inputs and outputs that its runtime has `found` are
    those that a signature of a manifest (or of an `Artifact`) `promised`, by name, dtype and shape, and that each cache
    of `state` comes out as it goes in. A cache may be float16 in the artifact: no session sees it.

    Raises: BundleError `artifact-does-not-open`.
    """
    caches = {str(name) for pair in state for name in pair}
    inputs, outputs = ({spec.name: spec for spec in side} for side in found)
    wrong: list[str] = []
    for wanted, held in ((promised.inputs, inputs), (promised.outputs, outputs)):
        specs = {str(spec.name): spec for spec in wanted}
        wrong += sorted(specs.keys() ^ held.keys())
        wrong += [name for name in sorted(specs.keys() & held.keys()) if not _fits(specs[name], held[name], caches)]
    wrong += [past for past, present in state if past in inputs and not _alike(inputs[past], outputs.get(present))]
    if wrong:
        problem = f"its inputs and outputs are not those that the manifest promises: {', '.join(wrong[:5])}"
        raise errors.artifact_does_not_open(str(where), runtime, problem)


def _fits(promised: Any, found: TensorSpec, caches: Set[str]) -> bool:
    halves = ("float16", "float32")
    same = found.dtype == promised.dtype or (found.name in caches and {found.dtype, str(promised.dtype)} <= {*halves})
    return (
        same
        and len(found.shape) == len(promised.shape)
        and all(_size_fits(a, b) for a, b in zip(promised.shape, found.shape, strict=True))
    )


def _size_fits(promised: Any, found: int | Dim) -> bool:
    if isinstance(found, Dim):  # free in the artifact: whatever is given must be a size
        return True
    return found == promised if isinstance(promised, int) else bool(promised.min <= found <= promised.max)


def _alike(past: TensorSpec, present: TensorSpec | None) -> bool:
    """Whether a cache can be put in the place of another: no free size, and all sizes equal."""
    fixed = all(isinstance(size, int) and size > 0 for size in past.shape)
    return present is not None and fixed and (past.dtype, past.shape) == (present.dtype, present.shape)


class DecoderRunner(Protocol):
    """One open decoder artifact with its KV cache, at batch 1."""

    context: int
    """Slots in the cache."""
    vocab: int
    """Number of logits."""
    runtime_seconds: float
    """Total seconds spent inside the runtime's call so far."""

    def step(self, fed: Array, position: int, rope: Array | None = None) -> NDArray[np.float32]:
        """Make one `Call`: write the keys and values of T tokens at cache slots position..position+T-1.

        Returns the logits [vocab] of the last token: a view that the next step overwrites.
        """
        ...

    def close(self) -> None:
        """Release the cache and the runtime."""
        ...


class GraphRunner(Protocol):
    """One open artifact without state: an encoder, an embedding table."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Inputs and outputs by the names and shapes of the component's signature."""
        ...

    def close(self) -> None:
        """Release the runtime."""
        ...
