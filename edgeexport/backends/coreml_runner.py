"""Run a bundle's ML packages on this computer: interpreted, not by Apple's runtime, which only Apple's systems have.

Prompts are cut into the pieces that the function `prefill` takes; the last piece is padded, and what a padded token
writes into the cache is overwritten before any token may see it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeexport import errors
from edgeexport.backends.coreml import DECODE, LAST, PREFILL, STEP, count_of, function_name
from edgeexport.backends.coreml_interpreter import ROOM, Function, Interpreter
from edgeexport.backends.coreml_mil import Type, identifier
from edgeexport.backends.coreml_package import package_of
from edgeexport.core import Array, Dim, TensorSpec
from edgeexport.session.runner import refuse_other_signature

RUNTIME_NAME = "the interpreter of ML packages"
RUNTIME = "interpreted on this computer, not by Apple's runtime"
WIDER = {"int32": "int64", "float16": "float32"}
"""What the runner takes and gives for the package's own types, so that a session sees those of the canonical graph."""


class InterpretedDecoder:
    """One decoder at batch 1, in one package or in several that run one after the other."""

    def __init__(
        self, folder: Path, component: Any, packages: Sequence[Path], *, threads: int | None, exact: bool
    ) -> None:
        self._limit = _limit(threads)
        self._parts = [Interpreter(package, exact=exact, room=ROOM // len(packages)) for package in packages]
        for part in self._parts:
            _refuse_other(part, folder, component, (DECODE, PREFILL))
        self._states = [part.new_state(DECODE) for part in self._parts]
        one = [part.function(DECODE) for part in self._parts]
        self._fed = "input_ids" if "input_ids" in one[0].inputs else "inputs_embeds"
        self._piece = 1
        if PREFILL in self._parts[0].package.functions:
            self._piece = _sizes(self._parts[0].function(PREFILL).inputs[self._fed])[1]
        self.context = _sizes(next(kind for each in one for kind in each.states.values()))[2]
        self.vocab = _sizes(one[-1].outputs["logits"])[-1]
        self.runtime_seconds = 0.0

    def step(self, fed: Array, position: int, rope: Array | None = None) -> npt.NDArray[np.float32]:
        """Write T tokens at cache slots position..; logits [V] of the last one.

        `fed` is int64 [T], or float32 [T,hidden] where the graph takes embeddings; `rope` int64 [3,T] where it turns
        by M-RoPE.
        """
        started = time.perf_counter()
        logits = np.empty(0, np.float32)
        done = 0
        while done < len(fed):
            at, rest = position + done, len(fed) - done
            # A piece that would reach beyond the cache goes token by token: no slot may be written twice.
            several = rest > 1 and self._piece > 1 and at + self._piece <= self.context
            count = min(rest, self._piece) if several else 1
            turned = None if rope is None else rope[:, done : done + count]
            logits = self._run(fed[done : done + count], at, turned, several=several)
            done += count
        self.runtime_seconds += time.perf_counter() - started
        return logits

    def close(self) -> None:
        """Let the weights and the cache go."""
        self._states.clear()
        self._parts.clear()

    def _run(self, fed: Array, position: int, rope: Array | None, *, several: bool) -> npt.NDArray[np.float32]:
        size = self._piece if several else 1
        values = {self._fed: _padded(fed, 0, size)[None], "position": np.array([position], np.int32)}
        if rope is not None:
            values["rope_positions"] = _padded(rope, 1, size)[:, None]
        if several:
            values[LAST] = np.array([len(fed) - 1], np.int32)
        with self._limit():
            for part, state in zip(self._parts, self._states, strict=True):
                values |= part.run(values, state, PREFILL if several else DECODE)
        logits: npt.NDArray[np.float32] = values["logits"][0, 0]
        return logits


class InterpretedGraph:
    """One component without state, or one variant of it.

    Where the number of tokens is symbolic they are taken in pieces: without a state, a token's result is its own.
    """

    def __init__(self, folder: Path, component: Any, variant: str, *, threads: int | None, exact: bool) -> None:
        self._interpreter = Interpreter(_packages(folder, component, variant)[0], exact=exact)
        self._limit = _limit(threads)
        self._one, self._several = _functions(self._interpreter, variant)
        _refuse_other(self._interpreter, folder, component, (self._one.name, self._several.name))

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Inputs and outputs by name."""
        with self._limit():
            return self._run(inputs)

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        inputs = self._counted(inputs)
        if self._one is self._several:
            return self._interpreter.run(inputs, name=self._one.name)
        cut, joined = (
            _token_axes(one, several)
            for one, several in ((self._one.inputs, self._several.inputs), (self._one.outputs, self._several.outputs))
        )
        first = next(iter(cut))
        count, size = inputs[first].shape[cut[first]], _sizes(self._several.inputs[first])[cut[first]]
        pieces: dict[str, list[Array]] = {name: [] for name in joined}
        for start in range(0, count, size):
            stop = min(count, start + size)
            part = dict(inputs)
            for name, axis in cut.items():
                part[name] = _padded(inputs[name].take(range(start, stop), axis), axis, size)
            found = self._interpreter.run(part, name=self._several.name)
            for name, axis in joined.items():
                pieces[name].append(found[name].take(range(stop - start), axis))
        return {name: np.concatenate(pieces[name], axis) for name, axis in joined.items()}

    def _counted(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """With features padded to what the package takes, and their number. Raises: UsageError
        `mlpackage-bad-input`."""
        found = dict(inputs)
        for name in (name for name in inputs if count_of(name) in self._one.inputs):
            most, given = _sizes(self._one.inputs[name])[1], inputs[name].shape[1]
            if given > most:
                problem = f"it has {given} rows; the package takes {most}"
                raise errors.mlpackage_bad_input(self._interpreter.package.path, name, problem)
            found[name] = _padded(inputs[name], 1, most)
            found[count_of(name)] = np.array([given], np.int32)
        return found

    def close(self) -> None:
        """Let the weights go."""
        del self._interpreter


def open_decoder(
    folder: Path, component: Any, *, threads: int | None = None, exact: bool = False
) -> InterpretedDecoder:
    """Open a component of a bundle's manifest as a decoder. With `exact` nothing is rounded to float16.

    Raises: BundleError `mlpackage-damaged`, `mlpackage-op-unknown`.
    """
    return InterpretedDecoder(folder, component, _packages(folder, component, DECODE), threads=threads, exact=exact)


def open_graph(
    folder: Path, component: Any, variant: str = "", *, threads: int | None = None, exact: bool = False
) -> InterpretedGraph:
    """Open a component without state, or one variant of it; as `open_decoder`. Raises also `bundle-no-variant`."""
    return InterpretedGraph(folder, component, variant, threads=threads, exact=exact)


def read_signature(folder: Path, component: Any, variant: str = "") -> dict[str, TensorSpec]:
    """Inputs and outputs of a component as its runner takes and gives them, by the canonical graph's names.

    A state is the input and the output that it replaces. Where there is a function for one token and one for several,
    their number is symbolic. Raises: BundleError `mlpackage-damaged`, `bundle-no-variant`.
    """
    names = {
        identifier(spec.name): spec.name for each in component.signatures for spec in (*each.inputs, *each.outputs)
    }
    replaced = {identifier(past): present for past, present in component.state}
    parts = []
    for package in _packages(folder, component, variant):
        main, larger = _functions(Interpreter(package), variant)
        parts.append(((main.inputs, larger.inputs), (main.outputs, larger.outputs), (main.states, larger.states)))
    passed = {name for _, (made, _), _ in parts for name in made} & {name for (taken, _), *_ in parts for name in taken}
    own = {count_of(name) for (taken, _), *_ in parts for name in taken}
    found = {}
    for group, others in (pair for part in parts for pair in part):
        for name in group.keys() - passed - own:
            sizes = [
                size if size == other else Dim("T", 1, other)
                for size, other in zip(_sizes(group[name]), _sizes(others[name]), strict=True)
            ]
            kind, plain = group[name].element.name, names.get(name, name)
            for each in (plain, replaced[name]) if name in replaced else (plain,):
                found[each] = TensorSpec(each, WIDER.get(kind, kind), tuple(sizes))
    return found


def _limit(threads: int | None) -> Callable[[], AbstractContextManager[Any]]:
    """Makes contexts in which numpy multiplies with so many threads, one if nothing is said: its matrices are small,
    and waiting for a second thread on a busy computer made decoding five times as slow.

    Raises: ToolError `missing-package`.
    """
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError as problem:
        raise errors.missing_package("threadpoolctl", "coreml") from problem
    controller = ThreadpoolController()
    return lambda: controller.limit(limits=threads or 1, user_api="blas")


def _packages(folder: Path, component: Any, signature: str) -> list[Path]:
    """The packages that have a signature, in the order in which they run. Raises: BundleError `bundle-no-variant`."""
    files = {each.name: str(each.file) for each in component.signatures}
    wanted = signature or STEP
    for name in (wanted, DECODE):
        found = [file for each, file in files.items() if each == name or re.fullmatch(rf"{re.escape(name)}\.\d+", each)]
        if found:
            return [package_of(folder / file) for file in dict.fromkeys(found)]
    raise errors.bundle_no_variant(_named(component), signature, files)


def _refuse_other(interpreter: Interpreter, folder: Path, component: Any, functions: Iterable[str]) -> None:
    """Raises: BundleError `artifact-does-not-open` where one of these functions of a package is not as promised."""
    state = tuple((str(past), str(present)) for past, present in component.state)
    replaced = {identifier(past): present for past, present in state}
    for signature in component.signatures:
        name = function_name(re.sub(r"\.\d+$", "", signature.name))  # of the part of a decoder that is in several
        if name not in functions or package_of(folder / signature.file) != interpreter.package.path:
            continue
        function = interpreter.function(name)
        own = {identifier(spec.name): str(spec.name) for spec in (*signature.inputs, *signature.outputs)}
        inputs = [_spec(own.get(each, each), kind) for each, kind in {**function.inputs, **function.states}.items()]
        outputs = [_spec(own.get(each, each), kind) for each, kind in function.outputs.items()]
        outputs += [_spec(replaced.get(each, each), kind) for each, kind in function.states.items()]
        where, mine = interpreter.package.path, [pair for pair in state if identifier(pair[0]) in function.states]
        refuse_other_signature(where, RUNTIME_NAME, signature, (inputs, outputs), mine)


def _spec(name: str, kind: Type) -> TensorSpec:
    return TensorSpec(name, kind.element.name, kind.sizes)


def _named(component: Any) -> str:
    return str(getattr(component, "name", "") or component.component)


def _sizes(kind: Type) -> tuple[int, ...]:
    return kind.sizes


def _functions(interpreter: Interpreter, variant: str) -> tuple[Function, Function]:
    """The functions of one and of several tokens; the same one twice where shapes are fixed."""
    names = interpreter.package.functions
    one = interpreter.function(DECODE if DECODE in names else function_name(variant))
    return one, interpreter.function(PREFILL) if PREFILL in names else one


def _token_axes(one: Mapping[str, Type], several: Mapping[str, Type]) -> dict[str, int]:
    """The axis of the tokens, of those values that have one."""
    found = {}
    for name, kind in several.items():
        for axis, (size, single) in enumerate(zip(_sizes(kind), _sizes(one[name]), strict=True)):
            if size != single:
                found[name] = axis
    return found


def _padded(array: Array, axis: int, size: int) -> Array:
    """With zeros up to `size` along an axis."""
    widths = [(0, size - array.shape[i] if i == axis else 0) for i in range(array.ndim)]
    return np.pad(array, widths)
