"""What a walk through a decoder's stages leaves on disk, so that one that was killed goes on after the last stage that
was done: the values that cross the border to the next one, and a state that says how far it came."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeexport import errors
from edgeexport.core import Array, CanonicalModel
from edgeexport.quant.codes import write_whole

if TYPE_CHECKING:
    from edgeexport.canonical.streaming import Values

WORK = "work"
STATE = "state.json"


class Borders:
    """The borders of one walk, in a folder that nobody else works in."""

    def __init__(self, folder: Path, model: CanonicalModel) -> None:
        self.folder = folder
        graph = model.graph.graph
        self._by_name = {str(value.name): value for node in graph for value in node.outputs}
        self._by_name |= {str(value.name): value for value in graph.inputs}

    def resume(self) -> dict[str, Any]:
        """The state that was filed last, with `done`, the stages that are; that of a walk that begins where there is
        none."""
        try:
            state = json.loads((self.folder / STATE).read_text())
            return {**state, "done": int(state["done"])}
        except (OSError, ValueError, KeyError, TypeError):
            shutil.rmtree(self.folder / WORK, ignore_errors=True)
            return {"done": 0}

    def finish(self, done: int, /, **state: Any) -> dict[str, Any]:
        """File that so many stages are done, and remove the border before; returns what `resume` would. Raises:
        UsageError `output-not-writable`."""
        state["done"] = done
        write_whole(self.folder, STATE, json.dumps(state))
        shutil.rmtree(self.folder / WORK / str(done - 1), ignore_errors=True)
        return state

    def clear(self) -> None:
        """Remove what a walk that is over needs no more."""
        shutil.rmtree(self.folder / WORK, ignore_errors=True)
        (self.folder / STATE).unlink(missing_ok=True)

    def values(self, call: Mapping[str, Array]) -> Values:
        """A call's inputs as the values that cross the border before the first stage."""
        return {self._by_name[name]: array for name, array in call.items()}

    def save(self, index: int, number: int, values: Sequence[Values]) -> None:
        """The border before stage `index`, of one group of calls. Raises: UsageError `output-not-writable`."""
        place = self.folder / WORK / str(index)
        arrays = {f"{call} {value.name}": array for call, known in enumerate(values) for value, array in known.items()}
        try:
            place.mkdir(parents=True, exist_ok=True)
            np.savez(place / f"{number}.npz", allow_pickle=False, **arrays)
        except OSError as problem:
            raise errors.output_not_writable(self.folder, str(problem)) from problem

    def load(self, index: int, number: int) -> list[Values]:
        """What `save` wrote."""
        found: dict[int, Values] = {}
        with np.load(self.folder / WORK / str(index) / f"{number}.npz", allow_pickle=False) as held:
            for key in held.files:
                call, _, name = key.partition(" ")
                found.setdefault(int(call), {})[self._by_name[name]] = held[key]
        return [found[call] for call in sorted(found)]
