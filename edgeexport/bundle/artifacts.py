"""The artifacts of one model, open in their runtimes, each when it is first used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from edgeexport import backends
from edgeexport.core import Array
from edgeexport.session.runner import DecoderRunner, GraphRunner

Find = Callable[[str], tuple[Path, Any]]
"""The folder and the description (of a manifest, or an `Artifact`) of a component, by name; raises what is wrong."""


class OpenArtifacts:
    """`exact` asks for float32 activations where the runtime can. Raises what `find` and the runtime raise."""

    def __init__(self, find: Find, threads: int | None = None, *, exact: bool = False) -> None:
        self._find, self._threads, self._exact = find, threads, exact
        self._graphs: dict[tuple[str, str], GraphRunner] = {}

    @cached_property
    def decoder(self) -> DecoderRunner:
        """The decoder; it belongs to who asked for it, and `close` leaves it open."""
        folder, component = self._find("decoder")
        runner = backends.load_runner(component.backend)
        opened: DecoderRunner = runner.open_decoder(folder, component, threads=self._threads, exact=self._exact)
        return opened

    def run(self, component: str, variant: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Run a component without state."""
        graph = self._graphs.get((component, variant))
        if graph is None:
            folder, found = self._find(component)
            runner = backends.load_runner(found.backend)
            graph = runner.open_graph(folder, found, variant, threads=self._threads, exact=self._exact)
            self._graphs[component, variant] = graph
        return graph.run(inputs)

    def close(self) -> None:
        """Release the components without state. One that is run again is opened again."""
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()
