"""Run a bundle's `.tflite` files in LiteRT on this machine; a decoder's KV cache is one buffer for input and output."""

from __future__ import annotations

import atexit
import functools
import mmap
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeexport import errors
from edgeexport.backends.litert_cache import weight_cache
from edgeexport.backends.litert_names import COUNT, DECODE, STEP, canonical_name, canonical_spec, length_of, window_of
from edgeexport.core import Array, TensorSpec
from edgeexport.plainfile import open_plain
from edgeexport.session.runner import refuse_other_signature

IDENTIFIER = b"TFL3"
"""Bytes 4 to 8 of every file."""

WORTH_PADDING = 8
"""A piece of a prompt is padded where it fills at least this share, one eighth, of a prefill signature; a shorter one
goes token by token. On SmolLM2 a prefill of 64 costs as much as 4 to 14 decodes, by scheme."""


class _Model:
    """One open file."""

    def __init__(self, path: Path, threads: int | None = None, *, exact: bool = False, run: bool = True) -> None:
        self._model = _open_exact(path, threads) if exact else _open(path, threads, run=run)
        self.signatures: list[str] = list(self._model.get_signature_list())
        self.seconds = 0.0

    def specs(self, signature: str) -> tuple[list[TensorSpec], list[TensorSpec]]:
        """Inputs and outputs of a signature."""
        inputs = self._model.get_input_tensor_details(signature)
        outputs = self._model.get_output_tensor_details(signature)
        return _specs(inputs), _specs(outputs)

    def refuse_other(self, path: Path, promised: Iterable[Any], state: tuple[tuple[str, str], ...] = ()) -> None:
        """Raises: BundleError `artifact-does-not-open` where a signature is not as promised, or there is another."""
        described = {str(each.name): each for each in promised}
        lost = sorted(described.keys() - set(self.signatures))
        if lost:
            raise errors.artifact_does_not_open(str(path), "LiteRT", f"it has no signature {', '.join(lost)}")
        for name, each in described.items():
            refuse_other_signature(path, "LiteRT", each, self.specs(name), state)
        self.signatures = [name for name in self.signatures if name in described]

    def buffer(self, signature: str, name: str, *, output: bool) -> Any:
        """Memory of the runtime for an input or output."""
        if output:
            return self._model.create_output_buffer_by_name(signature, name)
        return self._model.create_input_buffer_by_name(signature, name)

    def run(self, signature: str, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        """One call; buffers by name."""
        started = time.perf_counter()
        self._model.run_by_name(signature, inputs, outputs)
        self.seconds += time.perf_counter() - started

    def close(self) -> None:
        """Let the runtime go, which says farewell when the last of its objects is gone: no buffer may outlive this."""
        with _quiet():
            self._model.close()
            del self._model


def _specs(details: Mapping[str, Any]) -> list[TensorSpec]:
    return [
        TensorSpec(name, np.dtype(each["dtype"]).name, tuple(int(size) for size in each["shape"]))
        for name, each in details.items()
    ]


def _sizes(spec: TensorSpec) -> tuple[int, ...]:
    """A shape that the runtime has told: numbers alone."""
    return tuple(size for size in spec.shape if isinstance(size, int))


class Call:
    """One signature with its buffers: some shared with other calls, the rest its own."""

    def __init__(self, model: _Model, signature: str, shared: Mapping[str, Any]) -> None:
        self._model, self._signature = model, signature
        inputs, outputs = model.specs(signature)
        self.inputs = {spec.name: np.zeros(_sizes(spec), spec.dtype) for spec in inputs if spec.name not in shared}
        """Filled by whoever calls; caches apart."""
        self.outputs = {spec.name: spec for spec in outputs if spec.name not in shared}
        self._into, self._from = (
            {spec.name: shared.get(spec.name) or model.buffer(signature, spec.name, output=k == 1) for spec in side}
            for k, side in enumerate((inputs, outputs))
        )

    def run(self) -> None:
        """Read `inputs` and write the outputs."""
        for name, array in self.inputs.items():
            self._into[name].write(array)
        self._model.run(self._signature, self._into, self._from)

    def output(self, name: str) -> Array:
        """An output of the last run."""
        spec = self.outputs[name]
        size = int(np.prod(_sizes(spec), dtype=np.int64))
        array: Array = self._from[name].read(size, np.dtype(spec.dtype)).reshape(_sizes(spec))
        return array


class LiteRtDecoder:
    """One decoder at batch 1. Every buffer is allocated here, once."""

    GROWS = True
    """Whether the runtime gives whole caches, in the place of those it was given."""

    def __init__(self, path: Path, component: Any, *, threads: int | None, exact: bool) -> None:
        self._model = _Model(path, threads, exact=exact)
        state = tuple((str(past), str(present)) for past, present in component.state)
        self._model.refuse_other(path, component.signatures, state if self.GROWS else ())
        inputs, outputs = self._model.specs(DECODE)
        shapes = {spec.name: spec for spec in (*inputs, *outputs)}
        self.vocab = _sizes(shapes["logits"])[-1]
        self.context = _sizes(shapes[state[0][0]])[2]
        with _quiet():  # the first write opens another environment of the runtime
            self._caches = {past: self._new_cache(past, _sizes(shapes[past])) for past, _ in state}
        calls = {name: Call(self._model, name, self._caches) for name in self._model.signatures if length_of(name)}
        self._calls = {
            length: sorted(
                ((window_of(name) or self.context, call) for name, call in calls.items() if length_of(name) == length),
                key=lambda each: each[0],
            )
            for length in map(length_of, calls)
        }
        """By length: for each window, the narrowest first, the signature that attends to so many slots."""
        self._fed = "embeddings" if "embeddings" in shapes else "tokens"
        self._pieces = sorted((length for length in self._calls if length > 1), reverse=True)

    @property
    def runtime_seconds(self) -> float:
        """Total seconds spent inside the runtime's calls so far."""
        return self._model.seconds

    def step(self, fed: Array, position: int, rope: Array | None = None) -> npt.NDArray[np.float32]:
        """Write T tokens at cache slots position..; logits [V] of the last one, a view the next step overwrites.

        The last token goes through `decode`, which alone gives logits; those before it in pieces of the prefill
        signatures' lengths.
        """
        start, last = 0, len(fed) - 1
        while start < last:
            length = self._piece(last - start, position + start)
            stop = min(start + length, last)
            self._run(length, fed[start:stop], position + start, None if rope is None else rope[:, start:stop])
            start = stop
        call = self._run(1, fed[last:], position + last, None if rope is None else rope[:, last:])
        logits: npt.NDArray[np.float32] = call.output("logits")[0, 0]
        return logits

    def close(self) -> None:
        """Let the runtime and the cache go."""
        with _quiet():
            self._calls.clear()
            self._caches.clear()
            self._model.close()

    def _new_cache(self, name: str, shape: tuple[int, ...]) -> Any:
        """A buffer of zeros for an input that is a cache."""
        cache = self._model.buffer(DECODE, name, output=False)
        cache.write(np.zeros(shape, np.float32))
        return cache

    def _piece(self, left: int, position: int) -> int:
        """Length of the signature for the next of `left` tokens: the longest that they fill or are worth padding for,
        and that ends inside the cache (behind it the runtime would move the whole piece to the front)."""
        for length in self._pieces:
            fits = position + length <= self.context
            if fits and (left >= length or (length == self._pieces[-1] and left * WORTH_PADDING >= length)):
                return length
        return 1

    def _run(self, length: int, fed: Array, position: int, rope: Array | None) -> Call:
        """One call. What pads it is written behind the tokens, where nothing attends to it before it is overwritten."""
        count = len(fed)
        call = next(call for window, call in self._calls[length] if position + count <= window)
        call.inputs[self._fed][0, :count] = fed
        call.inputs[self._fed][0, count:] = 0
        call.inputs["input_pos"][:] = np.arange(position, position + length)
        if rope is not None:
            call.inputs["rope_positions"][:, 0, :count] = rope
            call.inputs["rope_positions"][:, 0, count:] = 0
        call.run()
        return call


class LiteRtGraph:
    """One component without state. Where it has a signature for each of several lengths, its inputs are cut along
    their tokens; those of another free size are padded to the one that was built."""

    def __init__(self, path: Path, component: Any, signatures: list[str], *, threads: int | None, exact: bool) -> None:
        self._model = _Model(path, threads, exact=exact)
        self._model.refuse_other(path, [each for each in component.signatures if each.name in signatures])
        self._calls = {length_of(name): Call(self._model, name, {}) for name in signatures}

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Inputs and outputs by their canonical names. Raises: UsageError `too-many-features`."""
        call = next(iter(self._calls.values()))
        padded = {name.removesuffix(COUNT) for name in call.inputs if name.endswith(COUNT)}
        feeds = {name: inputs[canonical_name(name)] for name in call.inputs if not name.endswith(COUNT)}
        if 0 in self._calls:
            return self._run(0, feeds)
        total = next(array.shape[1] for name, array in feeds.items() if name not in padded)
        parts: list[dict[str, Array]] = []
        start = 0
        while start < total:
            length = next(size for size in sorted(self._calls, reverse=True) if size <= total - start)
            stop = start + length
            cut = {name: array if name in padded else array[:, start:stop] for name, array in feeds.items()}
            parts.append(self._run(length, cut))
            start = stop
        return {name: np.concatenate([part[name] for part in parts], 1) for name in parts[0]}

    def _run(self, length: int, feeds: Mapping[str, Array]) -> dict[str, Array]:
        call = self._calls[length]
        for name, array in feeds.items():
            buffer = call.inputs[name]
            if name + COUNT in call.inputs:
                if array.shape[1] > buffer.shape[1]:
                    raise errors.too_many_features(array.shape[1], buffer.shape[1])
                call.inputs[name + COUNT][0] = array.shape[1]
                buffer[:, array.shape[1] :] = 0
                buffer[:, : array.shape[1]] = array
            else:
                buffer[...] = array
        call.run()
        return {canonical_name(name): call.output(name) for name in call.outputs}

    def close(self) -> None:
        """Let the runtime go."""
        with _quiet():
            self._calls.clear()
            self._model.close()


def open_decoder(folder: Path, component: Any, *, threads: int | None = None, exact: bool = False) -> LiteRtDecoder:
    """Open a component of a bundle's manifest as a decoder.

    With `exact` the same weights are multiplied by float32 activations, many times slower: the kernels round
    activations to int8 else, and that rounding would hide a mistake of the lowering.

    Raises: BundleError `artifact-does-not-open` with the runtime's message.
    """
    return LiteRtDecoder(folder / file_of(component, DECODE), component, threads=threads, exact=exact)


def open_graph(
    folder: Path, component: Any, variant: str = "", *, threads: int | None = None, exact: bool = False
) -> LiteRtGraph:
    """Open a component without state, or one variant of it; `exact` as in `open_decoder`.

    Raises: BundleError `artifact-does-not-open`, `bundle-no-variant`.
    """
    names = _signatures(component, variant)
    return LiteRtGraph(folder / file_of(component, names[0]), component, names, threads=threads, exact=exact)


def read_signature(folder: Path, component: Any, variant: str = "") -> dict[str, TensorSpec]:
    """Inputs and outputs of an artifact as the runtime sees them, by the canonical names they stand for. Where two
    signatures disagree, or are not as the component describes them, both forms are in the answer.

    Raises: BundleError `artifact-does-not-open`, `bundle-no-variant`.
    """
    names = _signatures(component, variant)
    model = _Model(folder / file_of(component, names[0]), run=False)
    described = {signature.name: signature for signature in component.signatures}
    found: dict[str, TensorSpec] = {}
    try:
        for name in names:
            sides = model.specs(name)
            promised = described[name].inputs, described[name].outputs
            for k, specs in enumerate(sides):
                wanted = {spec.name: (spec.dtype, tuple(spec.shape)) for spec in promised[k]}
                for spec in specs:
                    if spec.name.endswith(COUNT):  # made by the runner
                        wanted.pop(spec.name, None)
                        continue
                    meant = canonical_spec(spec, length_of(name), output=k == 1)
                    agrees = wanted.pop(spec.name, None) == (spec.dtype, spec.shape)
                    same = found.setdefault(meant.name, meant) == meant
                    if not (agrees and same):
                        found[f"{name}/{spec.name}"] = spec
                found |= {f"{name}/{lost}": TensorSpec(lost, "", ()) for lost in wanted}
    finally:
        model.close()
    return found


def _signatures(component: Any, variant: str) -> list[str]:
    """Names of the signatures that make up a variant. Raises: BundleError `bundle-no-variant`."""
    names = [str(signature.name) for signature in component.signatures]
    over_tokens = [name for name in names if length_of(name)]
    if not variant and over_tokens:
        return over_tokens
    if (variant or STEP) not in names:
        raise errors.bundle_no_variant(component.name, variant, names)
    return [variant or STEP]


def file_of(component: Any, signature: str) -> str:
    """The file of a signature. Raises: BundleError `bundle-no-variant`."""
    files = {each.name: str(each.file) for each in component.signatures}
    if signature not in files:
        raise errors.bundle_no_variant(component.name, signature, files)
    return files[signature]


def _open(path: Path, threads: int | None, *, run: bool = True) -> Any:
    """The model on the processor; without `run` no weight is read or prepared.

    Raises: BundleError `artifact-does-not-open` with the runtime's message.
    """
    _refuse_damaged(path)
    from ai_edge_litert.compiled_model import CompiledModel
    from ai_edge_litert.cpu_kernel_mode import CpuKernelMode
    from ai_edge_litert.hardware_accelerator import HardwareAccelerator
    from ai_edge_litert.options import CpuOptions, Options

    _quiet_at_exit()
    mode = CpuKernelMode.DELEGATE if run else CpuKernelMode.BUILTIN
    cpu = CpuOptions(num_threads=threads or len(os.sched_getaffinity(0)), kernel_mode=mode)
    try:
        with _quiet(), weight_cache(path) if run else nullcontext("") as packed:
            cpu.xnnpack_weight_cache_path = str(packed)
            return CompiledModel.from_file(
                str(path), options=Options(hardware_accelerators=HardwareAccelerator.CPU, cpu_options=cpu)
            )
    except (RuntimeError, ValueError) as problem:
        raise errors.artifact_does_not_open(str(path), "LiteRT", str(problem)) from problem


def _refuse_damaged(path: Path) -> None:
    """The runtime trusts the offsets of a file, and dies of one that ends early.

    Raises: BundleError `artifact-does-not-open`; ToolError `missing-package`.
    """
    try:
        from ai_edge_litert import schema_py_generated as schema
    except ImportError as problem:
        raise errors.missing_package("ai-edge-litert", "tflite") from problem
    try:
        size = path.stat().st_size
        with open_plain(path, follow=True) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as held:
            if held[4:8] != IDENTIFIER:
                raise ValueError(f"it begins with {held[:8]!r}, not as a .tflite file")
            model = schema.Model.GetRootAs(held)
            buffers = [model.Buffers(k) for k in range(model.BuffersLength())]
            ends = [buffer.Offset() + buffer.Size() for buffer in buffers]
            del model, buffers
        if max(ends, default=0) > size:
            raise ValueError(f"its weights end at byte {max(ends)}, and it has {size}")
    except Exception as problem:  # what flatbuffers' readers run into over a damaged file is of any kind
        raise errors.artifact_does_not_open(str(path), "LiteRT", str(problem)) from problem


def _open_exact(path: Path, threads: int | None) -> Any:
    """The same with float32 activations, from a copy that is gone when this returns: the runtime has it mapped."""
    from edgeexport.backends.litert_exact import write_exact

    _refuse_damaged(path)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        write_exact(path, copy)
        return _open(copy, threads)


@contextmanager
def _quiet() -> Iterator[None]:
    """Within, what is written to the process's stderr is dropped: the runtime tells every accelerator it does not find,
    and offers no way to be asked for less. What goes wrong is in its exceptions."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        _drop_stderr()
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _drop_stderr() -> None:
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)


@functools.cache
def _quiet_at_exit() -> None:
    """The runtime's own environment says farewell when the process ends, after Python has."""
    atexit.register(_drop_stderr)
