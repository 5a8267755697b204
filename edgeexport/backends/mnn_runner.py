"""Run a bundle's MNN-LLM directory on this computer, in MNN's own engine with its own cache."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeexport import errors
from edgeexport.backends.mnn_engine import ENGINE, described, load, open_module, value_of
from edgeexport.backends.mnn_names import (
    CONFIG,
    EMBEDS,
    LAST,
    LLM_CONFIG,
    LOGITS,
    MASK,
    POSITIONS,
    STEP,
    lookup_config,
    weight_file,
)
from edgeexport.backends.mnn_native import NativeLlm
from edgeexport.core import Array, Dim, TensorSpec


class MnnDecoder:
    """One decoder at batch 1, fed token ids, whose embeddings MNN looks up itself, or embeddings."""

    def __init__(self, folder: Path, component: Any, *, threads: int | None, exact: bool) -> None:
        inputs, outputs, _ = _signature(component, "")
        _refuse_other(folder, component, inputs, outputs)
        self.context, self.vocab = _fixed(inputs[component.state[0][0]], 2), _fixed(outputs[LOGITS], -1)
        self.runtime_seconds = 0.0
        self._folder = folder
        self._links = tempfile.TemporaryDirectory(prefix="edgeexport-mnn-")
        by_id = "input_ids" in inputs
        self._llm = load(
            folder, Path(self._links.name), threads, (CONFIG, LLM_CONFIG), exact=exact, looks_up=by_id
        )  # fmt: skip
        self._native = None if by_id else NativeLlm(self._llm)
        self._held = 0
        self._logits = np.zeros(self.vocab, np.float32)

    def step(self, fed: Array, position: int, rope: Array | None = None) -> npt.NDArray[np.float32]:
        """Write T tokens at cache slots position..; logits [V] of the last one, a view that the next step overwrites.

        `fed` is int64 [T], or float32 [T,hidden] where the graph takes embeddings; `rope` int64 [3,T] where it turns
        by M-RoPE. Raises: BundleError `artifact-does-not-open` when the engine fails.
        """
        started = time.perf_counter()
        # The engine keeps a copy of the graph for each length that it decodes, and one for prompts of any length.
        self._llm.set_context({**self._llm.get_context(), "gen_seq_len": int(len(fed) == 1)})
        made = self._of_ids(fed, position) if self._native is None else self._of_embeddings(fed, position, rope)
        if made.size % self.vocab or not made.size:
            raise errors.artifact_failed(str(self._folder), ENGINE, f"it gave {made.size} logits, not {self.vocab}")
        self._logits[:] = made[-self.vocab :]
        self._held = position + len(fed)
        self.runtime_seconds += time.perf_counter() - started
        return self._logits

    def close(self) -> None:
        """Let the weights and the cache go."""
        self._native = None
        del self._llm
        self._links.cleanup()

    def _of_ids(self, ids: Array, position: int) -> Array:
        """The engine's logits; with the first token of all it begins anew."""
        if position == 0:
            self._llm.reset()
        elif position < self._held:
            self._llm.erase_history(position, 0)  # from there to the end
        return _forward(self._llm, ids)

    def _of_embeddings(self, embeds: Array, position: int, rope: Array | None) -> Array:
        assert self._native is not None
        positions = np.arange(position, position + len(embeds))[None] if rope is None else rope
        made = self._native.forward(embeds, positions.astype(np.int32), self._held - position)
        if not made.size:
            raise errors.artifact_does_not_open(str(self._folder), ENGINE, "it gave no logits")
        return made


class MnnLookup:
    """A table of embeddings: MNN-LLM looks rows up in the file, as it does before a decoder, and its graph gives back
    what it is fed."""

    def __init__(self, folder: Path, component: Any) -> None:
        _, outputs, _ = _signature(component, "")
        ((self._name, spec),) = outputs.items()
        self._width = _fixed(spec, -1)
        self._links = tempfile.TemporaryDirectory(prefix="edgeexport-mnn-")
        name = lookup_config(_named(component))
        self._llm = load(folder, Path(self._links.name), 1, (name, name), exact=True, looks_up=True)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Inputs and outputs by name."""
        self._llm.reset()
        return {self._name: _forward(self._llm, inputs["input_ids"][0]).reshape(1, -1, self._width)}

    def close(self) -> None:
        """Let the engine go."""
        del self._llm
        self._links.cleanup()


def _forward(llm: Any, ids: Array) -> Array:
    """What the engine makes of token ids [T]: float32, flat."""
    given = llm.forward([int(token) for token in ids])
    made = np.array(given.read(), np.float32).reshape(-1)
    del given  # a value of the engine's must go before the engine does: MNN crashes else
    return made


class MnnGraph:
    """One artifact without state. The package's modules widen weights when they load them and compute in float32."""

    def __init__(self, folder: Path, component: Any, variant: str, *, threads: int | None) -> None:
        self._inputs, self._outputs, file = _signature(component, variant)
        self._links = tempfile.TemporaryDirectory(prefix="edgeexport-mnn-")
        weights = folder / weight_file(_named(component))
        here = Path(self._links.name)
        self._module = open_module(folder / file, weights, here, list(self._inputs), list(self._outputs), threads or 1)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Inputs and outputs by name."""
        from MNN import expr

        given = [value_of(inputs[name]) for name in self._inputs]
        found = {}
        for (name, spec), value in zip(self._outputs.items(), self._module.onForward(given), strict=True):
            plain = expr.convert(value, expr.NCHW) if value.data_format != expr.NCHW else value
            found[name] = np.array(plain.read()).astype(spec.dtype)
        return found

    def close(self) -> None:
        """Let the runtime go."""
        del self._module
        self._links.cleanup()


def open_decoder(folder: Path, component: Any, *, threads: int | None = None, exact: bool = False) -> MnnDecoder:
    """Open a component of a bundle's manifest as a decoder; with `exact` nothing is rounded but what the file rounds.

    Raises: BundleError `artifact-does-not-open` with MNN's message; ToolError `missing-package`.
    """
    return MnnDecoder(folder, component, threads=threads, exact=exact)


def open_graph(
    folder: Path, component: Any, variant: str = "", *, threads: int | None = None, exact: bool = False
) -> MnnGraph | MnnLookup:
    """Open a component without state, or one variant of it. It rounds no activation, `exact` or not.

    Raises: BundleError `artifact-does-not-open`, `bundle-no-variant`; ToolError `missing-package`.
    """
    if lookup_config(_named(component)) in component.files:
        return MnnLookup(folder, component)
    return MnnGraph(folder, component, variant, threads=threads)


def read_signature(folder: Path, component: Any, variant: str = "") -> dict[str, TensorSpec]:
    """Inputs and outputs as the runner takes and gives them, once MNN has opened the graph: a decoder's own are
    embeddings, positions and a mask, and its cache is inside. No weight is read. Raises as `open_graph`.
    """
    inputs, outputs, file = _signature(component, variant)
    if component.state:
        found = described(folder, (CONFIG, LLM_CONFIG))
        with tempfile.TemporaryDirectory(prefix="edgeexport-mnn-") as here:
            given = (EMBEDS, MASK, POSITIONS, LAST)
            open_module(folder / file, folder / found.files["llm_weight"], Path(here), given, (LOGITS,), 1)
    else:
        open_graph(folder, component, variant).close()
    return {**inputs, **outputs}


def _signature(component: Any, variant: str) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec], str]:
    """Inputs and outputs by name, and the file, of a component of a manifest, or of an artifact.

    Raises: BundleError `bundle-no-variant`.
    """
    files = {each.name: each for each in component.signatures}
    if (variant or STEP) not in files:
        raise errors.bundle_no_variant(_named(component), variant, files)
    signature = files[variant or STEP]
    return _specs(signature.inputs), _specs(signature.outputs), str(signature.file)


def _specs(given: Any) -> dict[str, TensorSpec]:
    found = {}
    for spec in given:
        sizes = tuple(size if isinstance(size, int | Dim) else Dim(str(size), 0, 0) for size in spec.shape)
        found[str(spec.name)] = TensorSpec(str(spec.name), str(spec.dtype), sizes)
    return found


def _refuse_other(
    folder: Path, component: Any, inputs: Mapping[str, TensorSpec], outputs: Mapping[str, TensorSpec]
) -> None:
    """MNN's engine has its own names, and its cache is inside: what it tells of the model is how many layers it has.
    It cuts logits to the promised number, so that one of another size is refused when they come.

    Raises: BundleError `artifact-does-not-open`.
    """
    layers = described(folder, (CONFIG, LLM_CONFIG)).facts.get("layer_nums")
    caches = [inputs.get(past) for past, _ in component.state]
    shapes = {spec.shape if spec is not None else () for spec in caches}
    shape = shapes.pop() if len(shapes) == 1 else ()
    problem = ""
    if layers != len(caches) / 2:
        problem = f"it has {layers!r} layers, the manifest promises caches for {len(caches) / 2:g}"
    elif not shape or not all(isinstance(size, int) and size > 0 for size in shape):
        problem = "the manifest promises caches that are not alike"
    elif LOGITS not in outputs:
        problem = "the manifest promises no logits"
    if problem:
        raise errors.artifact_does_not_open(str(folder), ENGINE, problem)


def _named(component: Any) -> str:
    return str(getattr(component, "name", "") or component.component)


def _fixed(spec: TensorSpec, axis: int) -> int:
    size = spec.shape[axis]
    assert isinstance(size, int), "a decoder's cache and its logits have fixed sizes"
    return size
