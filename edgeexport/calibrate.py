"""Calibration: run the canonical decoder over texts, one layer at a time, and choose each weight's integers by what it
is fed.

One layer's weights and the statistics of its inputs are in memory; the activations at the border to the next layer are
on disk. After each layer its codes and that border are complete, and a build that is killed goes on from there. Inputs
are those of the original model, not of its quantised beginning, so that layers do not depend on each other's codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeexport import errors, threads
from edgeexport.borders import Borders
from edgeexport.canonical.dialect import linears
from edgeexport.core import Array, CanonicalModel, Codes, Format, Progress, Provenance, QuantPlan, TensorRef
from edgeexport.memory import give_back
from edgeexport.quant import codes, search
from edgeexport.quant.calibration import GROUP, Method
from edgeexport.quant.codes import CodeStore, Entry

if TYPE_CHECKING:
    import torch

    from edgeexport.canonical.streaming import Rows, StreamedGraph, Values
    from edgeexport.quant.gptq import Factor

ROWS = {"search": 1 << 20, "gptq": 1 << 22}
"""Elements of a weight that a thread works on at once: GPTQ's steps, one for each column, want many rows."""

THREADS = 2
"""Rows do not depend on each other: each thread chooses those of its own, alone, so that none waits for another at
every step."""

TOGETHER = 256
"""Rows whose products are added up at once."""


Calls = Callable[[], Sequence[Mapping[str, Array]]]


@dataclass(frozen=True)
class Task:
    """What is to be calibrated: a decoder's graph, the plan, and which weights, by name."""

    model: CanonicalModel
    plan: QuantPlan
    method: Method
    names: frozenset[str]
    device: str = "cpu"


def wanted(model: CanonicalModel, plan: QuantPlan) -> frozenset[str]:
    """The weights of a decoder that a calibration chooses integers for: multiplications, and a table that is one too,
    in 4 bits, but for those that keep the checkpoint's own."""
    multiplied = {str(item.weight.name) for item in linears(model.graph.graph)}
    looked_up = {name for name, kind in plan.classes.items() if kind == "embedding"}
    return frozenset(
        name
        for name in multiplied | looked_up
        if name in plan.formats and search.takes(plan.formats[name]) and name not in plan.carried
    )


def run(
    task: Task,
    calls: Calls,
    rows: Rows,
    folder: Path,
    progress: Progress,
) -> CodeStore:
    """Codes of the task's weights in `folder`, which may hold what a killed run left there and is nobody else's
    (`Cache.workplace`). `calls` makes the decoder's calls, each a sequence of its own from position 0, and is asked
    where nothing is done yet; `rows` give the checkpoint's weights by the graph's names.

    Raises: UsageError `output-not-writable`; CheckpointError for weights that cannot be stored.
    """
    return _Run(task, calls, rows, folder, progress).run()


class _Run:
    """One calibration on its way through the stages."""

    def __init__(self, task: Task, calls: Calls, rows: Rows, folder: Path, progress: Progress) -> None:
        from edgeexport.canonical.streaming import StreamedGraph

        self.task, self.rows, self.folder, self.progress = task, rows, folder, progress
        self.borders = Borders(folder, task.model)
        self.state = self.borders.resume()
        if "groups" not in self.state:
            self.state = self._begun(_grouped(calls()))
        self.graph: StreamedGraph = StreamedGraph(task.model, tapped=True, slots=self.state["slots"])
        self.entries: dict[str, Entry] = {}
        self.stages = task.model.stages
        self.read_by = _readers(task.model, self.stages, task.names)

    def _begun(self, groups: Sequence[Sequence[Mapping[str, Array]]]) -> dict[str, Any]:
        """Leave the calls on disk, before the first stage: they are not needed in memory, nor made again."""
        for number, calls in enumerate(groups):
            self.borders.save(0, number, [self.borders.values(call) for call in calls])
        slots = max(tokens_of(call) for calls in groups for call in calls)
        return self.borders.finish(0, groups=len(groups), slots=slots)

    def run(self) -> CodeStore:
        """All stages that are not done yet."""
        done = self.state["done"]
        self.entries = codes.load_index(self.folder) if done else {}
        total = 1 + max((self.stages.index(stage) for stage in self.read_by), default=-1)
        for index in range(done, total):
            stage = self.stages[index]
            gathered = self._advance(index, stage)
            while gathered:  # the sums of one input go before the factor of the next comes
                names, inputs = gathered.popitem()
                self._choose(names, inputs)
            codes.save_index(self.folder, self.entries)
            self.state = self.borders.finish(index + 1, **self.state)
            give_back()
            self.progress(index + 1, total)
        for name in sorted(self.task.names - self.entries.keys()):  # looked up, and never multiplied
            self._choose((name,), None)
        codes.save_index(self.folder, self.entries)
        self.borders.clear()
        return CodeStore(self.folder, self.entries)

    def _advance(self, index: int, stage: str) -> dict[tuple[str, ...], _Inputs]:
        """Take every group through a stage; what its multiplications were fed, by the weights that read the same."""
        asked = self._readers_of_each_input(stage)
        first = {names[0]: names for names in asked}
        gathered: dict[tuple[str, ...], _Inputs] = {}

        def tap(name: str, x: Array) -> None:
            if name in first:
                names = first[name]
                if names not in gathered:
                    gathered[names] = _Inputs(x.shape[-1], self.task)
                gathered[names].add(x)

        last = index == len(self.stages) - 1
        for number in range(self.state["groups"]):
            values = self.borders.load(index, number)
            self.graph.advance(stage, each_token(values) if last else values, self.rows, tap if asked else None)
            if not last:
                self.borders.save(index + 1, number, values)
            del values
            give_back()
        return gathered

    def _readers_of_each_input(self, stage: str) -> list[tuple[str, ...]]:
        """The weights to choose at this stage, those that read the same values together."""
        wanted = self.read_by.get(stage, ())
        found: dict[Any, list[str]] = {}
        for item in linears(self.task.model.graph.graph):
            if (name := str(item.weight.name)) in wanted and name not in found.get(item.input, ()):
                found.setdefault(item.input, []).append(name)
        return [tuple(names) for names in found.values()]

    def _choose(self, names: Sequence[str], inputs: _Inputs | None) -> None:
        """Find the integers of weights that read the same, and write them."""
        import torch

        from edgeexport.quant.gptq import Factor

        width = self.task.model.weights[names[0]].shape[1]
        strength = inputs.strength() if inputs is not None else torch.ones(width, device=self.task.device)
        products = inputs.products() if inputs is not None else None
        factor = Factor(products) if products is not None else None
        for name in names:
            count, fmt = self.task.model.weights[name].shape[0], self.task.plan.formats[name]
            step = max(1, min(ROWS["search" if factor is None else "gptq"] // width, -(-count // THREADS)))
            cuts = [(start, min(count, start + step)) for start in range(0, count, step)]
            lost = nearest = 0.0

            def parts(found: Iterable[_Part]) -> Iterator[Codes]:
                nonlocal lost, nearest
                for part in found:
                    lost, nearest = lost + part.lost, nearest + part.nearest
                    yield part.codes

            file = f"{len(self.entries):05}.codes"
            how: Provenance = "gptq" if factor is not None else "searched"
            with workers() as pool:
                found = pool.map(partial(self._chosen, name, strength, factor), cuts)
                entry = codes.save(self.folder, file, fmt, parts(found), how)
            self.entries[name] = replace(entry, share=lost / nearest if nearest else 1.0)

    def _chosen(self, name: str, strength: torch.Tensor, factor: Factor | None, cut: tuple[int, int]) -> _Part:
        """The integers of some rows."""
        from edgeexport.quant.gptq import gptq

        weight = floats(self.rows, name, *cut, self.task.plan.formats[name], self.task.device)
        grid = search.search(weight, strength, self.task.plan.formats[name])
        integers = search.nearest(weight, grid)
        lost = nearest = float((weight - search.meaning(integers, grid)).square().sum(0) @ strength)
        if factor is not None:
            integers, lost = gptq(weight, factor, grid)
        return _Part(search.to_codes(integers, grid), lost, nearest)


def floats(read: Rows, name: str, start: int, stop: int, fmt: Format, device: str) -> torch.Tensor:
    """Rows of a weight as float32, to be stored as `fmt`. Raises: CheckpointError `nonfinite-weight`,
    `weight-too-large`."""
    import torch

    rows = read(name, start, stop)
    if not np.isfinite(rows).all():
        row, column = (int(each) for each in np.argwhere(~np.isfinite(rows))[0])
        raise errors.nonfinite_weight(name, (start + row, column), float(rows[row, column]))
    if float(np.abs(rows).max(initial=0.0)) > 7 * 65504.0:
        row = int(np.abs(rows).max(axis=1).argmax())
        raise errors.weight_too_large(name, start + row, float(np.abs(rows[row]).max()), fmt.name)
    return torch.from_numpy(np.ascontiguousarray(rows)).to(device)


@dataclass(frozen=True)
class _Part:
    """Codes of some rows, the error that they make of products and the one that the nearest integers would make."""

    codes: Codes
    lost: float
    nearest: float


@contextmanager
def workers() -> Iterator[ThreadPoolExecutor]:
    """Threads each of which computes alone: torch's own wait for each other at every operation."""
    import torch

    before = torch.get_num_threads()
    try:
        with threads.pool(THREADS, torch.set_num_threads, 1) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)  # what threads to come begin with


class _Inputs:
    """Sums over what a multiplication is fed: of squares or, for GPTQ, of all products of two channels."""

    def __init__(self, width: int, task: Task) -> None:
        import torch

        whole = task.method == "gptq"
        self._sum = torch.zeros((width, width) if whole else (width,), device=task.device)
        self._rows = 0
        self._waiting: list[Array] = []

    def add(self, x: Array) -> None:
        """float32 [.., width]."""
        self._waiting.append(np.array(x.reshape(-1, x.shape[-1]), np.float32))
        if sum(map(len, self._waiting)) >= TOGETHER:
            self._flush()

    def _flush(self) -> None:
        """Add what waits."""
        import torch

        if not self._waiting:
            return
        rows = torch.from_numpy(np.concatenate(self._waiting)).to(self._sum.device)
        self._waiting.clear()
        if self._sum.ndim == 2:
            self._sum.addmm_(rows.T, rows)
        else:
            self._sum += rows.square().sum(0)
        self._rows += len(rows)

    def strength(self) -> torch.Tensor:
        """The mean square of each channel, float32 [width]."""
        self._flush()
        return (self._sum.diagonal() if self._sum.ndim == 2 else self._sum) / max(1, self._rows)

    def products(self) -> torch.Tensor | None:
        """The mean products [width, width], in the place of the sums; None where only squares were added."""
        self._flush()
        return self._sum.div_(max(1, self._rows)) if self._sum.ndim == 2 else None


def _grouped(calls: Sequence[Mapping[str, Array]]) -> list[list[Mapping[str, Array]]]:
    """Calls in groups of about `GROUP` tokens."""
    groups: list[list[Mapping[str, Array]]] = [[]]
    size = 0
    for call in calls:
        tokens = tokens_of(call)
        if groups[-1] and size + tokens > GROUP:
            groups.append([])
            size = 0
        groups[-1].append(call)
        size += tokens
    return groups


def tokens_of(call: Mapping[str, Array]) -> int:
    """Tokens of one call: [1,T] ids, [1,T,hidden] embeddings, [3,1,T] positions."""
    return next(int(array.shape[1]) for name, array in call.items() if name in ("input_ids", "inputs_embeds"))


def each_token(values: Sequence[Values]) -> list[Values]:
    """Each token of each call as a call of its own: the last stage keeps a call's last token alone."""
    found: list[Values] = []
    for known in values:
        hidden = next(value for value, array in known.items() if _is_hidden(value, array))
        count = known[hidden].shape[1]
        found += [{**known, hidden: known[hidden][:, t : t + 1]} for t in range(count)]
    return found


def _is_hidden(value: Any, array: Array) -> bool:
    return array.ndim == 3 and array.dtype == np.float32 and not value.is_graph_input()


def _readers(model: CanonicalModel, stages: Sequence[str], names: frozenset[str]) -> dict[str, list[str]]:
    """The weights to choose by the stage that multiplies by them; by the last, where several do."""
    from edgeexport.canonical.trace import STAGE

    stage_of = {str(item.weight.name): item.node.metadata_props.get(STAGE, "") for item in linears(model.graph.graph)}
    found: dict[str, list[str]] = {}
    for name, stage in stage_of.items():
        if name in names and stage in stages:
            found.setdefault(stage, []).append(name)
    return found


def rows_of(model: CanonicalModel, read: Callable[[TensorRef, int, int], Array]) -> Rows:
    """The checkpoint's rows by the graph's names."""
    return lambda name, start, stop: read(model.weights[name], start, stop).reshape(-1, *model.weights[name].shape[1:])
