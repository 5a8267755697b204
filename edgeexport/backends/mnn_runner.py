"""Run a bundle's MNN-LLM directory on this computer, in MNN's own engine with its own cache."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeexport import errors
from edgeexport.backends.mnn_llm import WEIGHT_BYTES
from edgeexport.backends.mnn_names import CONFIG, LLM_CONFIG, LOGITS, STEP, TOKENIZER
from edgeexport.core import Array, Dim, TensorSpec

ENGINE = "MNN"
EXACT = {"precision": "high", "memory": "high"}
"""float32 throughout: weights are widened when they are loaded, and activations are not rounded to int8."""
FACTS = (
    "hidden_size",
    "layer_nums",
    "attention_mask",
    "attention_type",
    "key_value_shape",
    "tie_embeddings",
    "is_mrope",
)
SETTINGS = ("backend_type", "precision", "memory", "sampler_type", "max_all_tokens", "reuse_kv")
"""What the engine is told of a bundle's two files; no path among them."""
NO_TOKENIZER = "430 1\n0 1 0\n0\n1\nYQ==\n"
"""The engine does not load without one. This one knows a single token, and is never asked: the runner feeds ids."""


class MnnDecoder:
    """One decoder at batch 1, fed token ids: MNN looks the embeddings up itself."""

    def __init__(self, folder: Path, component: Any, *, threads: int | None, exact: bool) -> None:
        inputs, outputs, _ = _signature(component, "")
        self.context, self.vocab = _fixed(inputs[component.state[0][0]], 2), _fixed(outputs[LOGITS], -1)
        self.runtime_seconds = 0.0
        self._links = tempfile.TemporaryDirectory(prefix="edgeexport-mnn-")
        self._llm = _load(folder, Path(self._links.name), threads, exact=exact)
        self._held = 0
        self._logits = np.zeros(self.vocab, np.float32)

    def step(self, fed: Array, position: int, rope: Array | None = None) -> npt.NDArray[np.float32]:
        """Write T tokens, int64 [T], at cache slots position..; logits [V] of the last one, a view that the next step
        overwrites."""
        started = time.perf_counter()
        if position == 0:
            self._llm.reset()
        elif position < self._held:
            self._llm.erase_history(position, 0)  # from there to the end
        # The engine keeps a copy of the graph for each length that it decodes, and one for prompts of any length.
        self._llm.set_context({**self._llm.get_context(), "gen_seq_len": int(len(fed) == 1)})
        given = self._llm.forward([int(token) for token in fed])
        self._logits[:] = np.asarray(given.read(), np.float32).reshape(-1)[-self.vocab :]
        del given  # a value of the engine's must go before the engine does: MNN crashes else
        self._held = position + len(fed)
        self.runtime_seconds += time.perf_counter() - started
        return self._logits

    def close(self) -> None:
        """Let the weights and the cache go."""
        del self._llm
        self._links.cleanup()


class MnnGraph:
    """One artifact without state."""

    def __init__(self, folder: Path, component: Any, variant: str, *, threads: int | None, exact: bool) -> None:
        self._inputs, self._outputs, file = _signature(component, variant)
        graph = folder / file
        self._links = tempfile.TemporaryDirectory(prefix="edgeexport-mnn-")  # weights are read when they are first used
        with _hushed() as said:
            try:
                import _mnncengine._nn as native
                from MNN import expr
            except ImportError as problem:
                raise errors.missing_package("MNN", "mnn") from problem
            self._expr = expr
            settings = {"backend": "CPU", "numThread": threads or 1, **(EXACT if exact else {"memory": "low"})}
            manager = native.create_runtime_manager((settings,))
            here = Path(self._links.name)
            (here / "graph").symlink_to(graph.resolve())
            (here / "graph.weight").symlink_to((folder / f"{_named(component)}.mnn.weight").resolve())
            modes = (expr.Backend.CPU, expr.MemoryMode.Normal, expr.PowerMode.Normal, expr.PrecisionMode.Normal, 1)
            try:
                self._module = native.load_module_from_file(
                    manager, list(self._inputs), list(self._outputs), str(here / "graph"), False, True, False, *modes
                )
            except (SystemError, RuntimeError) as problem:
                raise errors.artifact_does_not_open(str(graph), ENGINE, said() or str(problem)) from problem

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Inputs and outputs by name."""
        given = [self._var(inputs[name]) for name in self._inputs]
        found = {}
        for (name, spec), value in zip(self._outputs.items(), self._module.onForward(given), strict=True):
            plain = self._expr.convert(value, self._expr.NCHW) if value.data_format != self._expr.NCHW else value
            found[name] = np.array(plain.read()).astype(spec.dtype)
        return found

    def close(self) -> None:
        """Let the runtime go."""
        del self._module
        self._links.cleanup()

    def _var(self, array: Array) -> Any:
        whole = array.dtype.kind == "i"
        kind = self._expr.int if whole else self._expr.float
        plain = np.ascontiguousarray(array, np.int32 if whole else np.float32)
        return self._expr.const(plain, list(plain.shape), self._expr.NCHW, kind)


def open_decoder(folder: Path, component: Any, *, threads: int | None = None, exact: bool = False) -> MnnDecoder:
    """Open a component of a bundle's manifest as a decoder; with `exact` nothing is rounded but what the file rounds.

    Raises: BundleError `artifact-does-not-open` with MNN's message; ToolError `missing-package`.
    """
    return MnnDecoder(folder, component, threads=threads, exact=exact)


def open_graph(
    folder: Path, component: Any, variant: str = "", *, threads: int | None = None, exact: bool = False
) -> MnnGraph:
    """Open a component without state, or one variant of it; `exact` as in `open_decoder`.

    Raises: BundleError `artifact-does-not-open`, `bundle-no-variant`; ToolError `missing-package`.
    """
    return MnnGraph(folder, component, variant, threads=threads, exact=exact)


def read_signature(folder: Path, component: Any, variant: str = "") -> dict[str, TensorSpec]:
    """Inputs and outputs as the runner takes and gives them, once MNN has loaded the files: a decoder's own are
    embeddings, positions and a mask, and its cache is inside; it must answer a token. Raises as `open_graph`.
    """
    inputs, outputs, _ = _signature(component, variant)
    if component.state:
        decoder = open_decoder(folder, component)  # as it ships: `exact` takes eight times the memory of int4
        decoder.step(np.zeros(1, np.int64), 0)
        decoder.close()
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


def _named(component: Any) -> str:
    return str(getattr(component, "name", "") or component.component)


def _fixed(spec: TensorSpec, axis: int) -> int:
    size = spec.shape[axis]
    assert isinstance(size, int), "a decoder's cache and its logits have fixed sizes"
    return size


def _load(folder: Path, here: Path, threads: int | None, *, exact: bool) -> Any:
    """MNN's engine over the files in `folder`, which are linked into the empty folder `here` beside a configuration.

    Raises: BundleError `artifact-does-not-open`; ToolError `missing-package`.
    """
    given, facts = _read(folder, CONFIG), _read(folder, LLM_CONFIG)
    files = {key: str(given.get(key, "")) for key in ("llm_model", "llm_weight")}
    for name in files.values():
        if Path(name).name != name or not (folder / name).is_file():
            raise errors.artifact_does_not_open(str(folder / CONFIG), ENGINE, f"there is no file {name!r} beside it")
    weights = folder / files["llm_weight"]
    if weights.stat().st_size != facts.get(WEIGHT_BYTES):
        raise errors.artifact_does_not_open(
            str(weights), ENGINE, "the weight file has not the size it was written with"
        )
    config = {key: given[key] for key in SETTINGS if key in given} | (EXACT if exact else {})
    config["thread_num"] = threads or os.cpu_count() or 1
    with _hushed() as said:
        try:
            import _mnncengine.llm as engine
        except ImportError as problem:
            raise errors.missing_package("MNN", "mnn") from problem
        for key, name in files.items():
            (here / key).symlink_to((folder / name).resolve())
            config[key] = key
        config["tokenizer_file"] = TOKENIZER
        (here / TOKENIZER).write_text(NO_TOKENIZER)
        (here / LLM_CONFIG).write_text(json.dumps({key: facts[key] for key in FACTS if key in facts}))
        (here / CONFIG).write_text(json.dumps(config))
        llm = engine.create(str(here / CONFIG), False)
        if not llm.load():
            raise errors.artifact_does_not_open(str(folder), ENGINE, said() or "it gave no reason")
        llm.generate_init(None, None)
    return llm


def _read(folder: Path, name: str) -> dict[str, Any]:
    """A configuration file. Raises: BundleError `artifact-does-not-open`."""
    try:
        found = json.loads((folder / name).read_text("utf-8"))
    except (OSError, ValueError) as problem:
        raise errors.artifact_does_not_open(str(folder / name), ENGINE, str(problem)) from problem
    if not isinstance(found, dict):
        raise errors.artifact_does_not_open(str(folder / name), ENGINE, "it is not a table of settings")
    return found


@contextmanager
def _hushed() -> Iterator[Any]:
    """What MNN prints goes to a file instead of the process' standard output; gives a function that reads its last
    lines."""
    sys.stdout.flush()
    native = ctypes.CDLL(None)
    native.fflush(None)
    kept = os.dup(1)
    with tempfile.TemporaryFile() as file:

        def said() -> str:
            native.fflush(None)
            file.seek(0)
            lines = file.read().decode("utf-8", "replace").splitlines()
            return " | ".join(line for line in lines if not line.startswith("The device supports"))

        os.dup2(file.fileno(), 1)
        try:
            yield said
        finally:
            native.fflush(None)
            os.dup2(kept, 1)
            os.close(kept)
