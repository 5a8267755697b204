"""The artifacts of one model, open in their runtimes, each when it is first used.

Runtimes are of others, and say what is wrong with an artifact in exceptions of every kind: here they become ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from edgeexport import backends, errors, supervise
from edgeexport.backends.foreign import described, foreign
from edgeexport.core import Array, TensorSpec
from edgeexport.session.runner import DecoderRunner, GraphRunner

Find = Callable[[str], tuple[Path, Any]]
"""The folder and the description (of a manifest, or an `Artifact`) of a component, by name; raises what is wrong."""


class OpenArtifacts:
    """`exact` asks for float32 activations where the runtime can. Raises what `find` raises, and BundleError
    `artifact-does-not-open`, `artifact-failed`, and what else a runner tells of its artifact."""

    def __init__(self, find: Find, threads: int | None = None, *, exact: bool = False) -> None:
        self._find, self._threads, self._exact = find, threads, exact
        self._graphs: dict[tuple[str, str], _Graph] = {}

    @cached_property
    def decoder(self) -> DecoderRunner:
        """The decoder; it belongs to who asked for it, and `close` leaves it open."""
        folder, component = self._find("decoder")
        runner = backends.load_runner(component.backend)
        size = size_of(folder, component)
        if not component.state:
            raise errors.artifact_does_not_open(str(folder), component.backend, "the manifest promises no KV cache")
        with supervise.opening(size), _translated(folder, component, errors.artifact_does_not_open):
            opened = runner.open_decoder(folder, component, threads=self._threads, exact=self._exact)
            return _Decoder(opened, folder, component, size)

    def run(self, component: str, variant: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Run a component without state."""
        graph = self._graphs.get((component, variant))
        if graph is None:  # finding it opens its files, and an embedding is asked for every token
            folder, found = self._find(component)
            runner, size = backends.load_runner(found.backend), size_of(folder, found)
            with supervise.opening(size), _translated(folder, found, errors.artifact_does_not_open):
                opened = runner.open_graph(folder, found, variant, threads=self._threads, exact=self._exact)
            graph = self._graphs[component, variant] = _Graph(opened, folder, found, size)
        rows = max((array.size // array.shape[-1] for array in inputs.values() if array.size), default=1)
        with supervise.calling(graph.size, rows), _translated(graph.folder, graph.component, errors.artifact_failed):
            return graph.runner.run(inputs)

    def close(self) -> None:
        """Release the components without state. One that is run again is opened again."""
        for graph in self._graphs.values():
            graph.runner.close()
        self._graphs.clear()


def read_signature(folder: Path, component: Any, variant: str) -> Mapping[str, TensorSpec]:
    """Inputs and outputs of an artifact as its runner sees them. Raises: BundleError `artifact-does-not-open`, and what
    else a runner tells of its artifact."""
    runner = backends.load_runner(component.backend)
    with supervise.opening(size_of(folder, component)), _translated(folder, component, errors.artifact_does_not_open):
        found: Mapping[str, TensorSpec] = runner.read_signature(folder, component, variant)
        return found


@dataclass(frozen=True)
class _Graph:
    """A runner's component without state, open, and the bytes of its files."""

    runner: GraphRunner
    folder: Path
    component: Any
    size: int


class _Decoder:
    """A runner's decoder, whose failures are ours."""

    def __init__(self, runner: DecoderRunner, folder: Path, component: Any, size: int) -> None:
        self._runner, self._folder, self._component, self._size = runner, folder, component, size
        self.context, self.vocab, self.runtime_seconds = int(runner.context), int(runner.vocab), 0.0
        if self.context < 1 or self.vocab < 1:
            raise ValueError(f"it has {self.context} slots and {self.vocab} logits")

    def step(self, fed: Array, position: int, rope: Array | None = None) -> Array:
        supervise.begin_call(self._size, len(fed))
        try:
            return self._runner.step(fed, position, rope)
        except (errors.EdgeExportError, ImportError):  # as `foreign` does, which costs more than a token may
            raise
        except Exception as problem:
            raise errors.artifact_failed(str(self._folder), self._component.backend, described(problem)) from problem
        finally:
            self.runtime_seconds = self._runner.runtime_seconds
            supervise.end()

    def close(self) -> None:
        self._runner.close()


def _translated(
    folder: Path, component: Any, error: Callable[[str, str, str], errors.BundleError]
) -> AbstractContextManager[None]:
    return foreign(lambda problem: error(str(folder), component.backend, problem))


def size_of(folder: Path, component: Any) -> int:
    """Bytes of a component's files."""
    total = 0
    for name in component.files:
        try:
            total += (folder / name).stat().st_size
        except OSError:
            continue  # whoever opens it says so
    return total
