"""Measure what each matrix costs in 4 bits: the KL of the model's answers with that matrix alone rounded.

One walk through the canonical decoder over a few short sequences, stage by stage. Where a stage multiplies by a unit of
matrices (those that read the same values and are stored alike), the sequences go through it once more with these
rounded, and from there on beside the original ones, as one more variant of them. After the last stage each variant's
answers are compared with the original's. Other formats of a unit cost in proportion to the error of their products,
sum over k of E[x_k^2] (w_k - w'_k)^2, the measure of the weighted search: KL is quadratic in small errors.

The walk is resumed after the last whole stage, as a calibration is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from edgeexport.borders import Borders
from edgeexport.calibrate import each_token, floats, tokens_of, workers
from edgeexport.canonical.dialect import linears, stored
from edgeexport.core import Array, CanonicalModel, Format, Progress, TensorClass, Traits
from edgeexport.quant import search
from edgeexport.quant.budget import PROBE, Option, Unit
from edgeexport.quant.plan import is_value, options, resolve
from edgeexport.quant.schemes import FORMATS
from edgeexport.quant.weights import dequantize_codes, encode_rows

if TYPE_CHECKING:
    import torch

    from edgeexport.canonical.streaming import Rows, Values

ROWS = 1 << 20
"""Elements of a weight that a thread works on at once."""

SAMPLED = 1 << 23
"""Elements of a weight at most by which its formats are compared: rows from all over it."""

Name = tuple[str, bool]
"""A format's name, and whether it holds the checkpoint's integers."""


@dataclass(frozen=True)
class Task:
    """A decoder whose formats are to be chosen: its graph, each weight's class, what its runtime takes."""

    model: CanonicalModel
    classes: Mapping[str, TensorClass]
    traits: Traits

    def options(self, name: str) -> dict[Name, Format]:
        """The formats that a weight may get."""
        ref = self.model.weights[name]
        return options(name, self.classes[name], ref.shape, self.traits, ref.encoding)

    def probe(self, name: str) -> Format:
        """The format that is measured through the whole model, as wide blocks as the matrix's rows take."""
        fmt = resolve(FORMATS[PROBE], self.model.weights[name].shape[1])
        return replace(fmt, positive=self.traits.positive_scales and fmt.integer)


def units(task: Task) -> list[tuple[str, ...]]:
    """The matrices to choose formats for, those together that are stored alike: that multiply the same values and have
    the same formats to choose from, v_proj apart."""
    readers: dict[Any, dict[Any, list[str]]] = {}
    for item in linears(task.model.graph.graph):
        name = str(item.weight.name)
        if task.options(name):
            alike = (tuple(task.options(name)), is_value(name))
            found = readers.setdefault(item.input, {}).setdefault(alike, [])
            found += [name] if name not in found else []
    listed = [tuple(names) for groups in readers.values() for names in groups.values()]
    known = {name for names in listed for name in names}
    return listed + [(name,) for name in task.classes if task.options(name) and name not in known]


def by_gptq(units: Sequence[Unit], shares: Mapping[str, float]) -> list[Unit]:
    """The units as they are where GPTQ chooses the integers of 4 bits, that leaves such a share of each matrix's
    error."""

    def cost(option: Option) -> Option:
        known = [shares[name] for name in option.formats if name in shares]
        if option.carried or not known or not all(search.takes(FORMATS[each]) for each in option.formats.values()):
            return option
        return msgspec.structs.replace(option, kl=float(f"{option.kl * sum(known) / len(known):.3g}"))

    return [Unit(tuple(map(cost, unit.options))) for unit in units]


def measure(
    task: Task, calls: Sequence[Mapping[str, Array]], rows: Rows, folder: Path, progress: Progress
) -> list[Unit]:
    """Each unit's options. `calls` are the decoder's, each a sequence of its own from position 0; `folder` may hold
    what a killed run left there and is nobody else's (`Cache.workplace`).

    Raises: UsageError `output-not-writable`; CheckpointError for weights that cannot be stored.
    """
    return _Run(task, calls, rows, folder, progress).run()


class _Run:
    """One measurement on its way through the stages."""

    def __init__(
        self, task: Task, calls: Sequence[Mapping[str, Array]], rows: Rows, folder: Path, progress: Progress
    ) -> None:
        from edgeexport.canonical.streaming import StreamedGraph

        self.task, self.calls, self.rows, self.progress = task, calls, rows, progress
        self.graph = StreamedGraph(task.model, tapped=True, slots=max(map(tokens_of, calls)))
        self.borders = Borders(folder, task.model)
        self.units = units(task)
        self.unit_of = {name: index for index, names in enumerate(self.units) for name in names}
        self.stages = task.model.stages
        self.multiplied, self.looked_up = _readers(task.model, self.unit_of)
        self.kl = [0.0] * len(self.units)
        self.errors: list[dict[str, float]] = [{} for _ in self.units]
        """By unit, the error of each format by name."""

    def run(self) -> list[Unit]:
        """All stages that are not done yet."""
        state = self.borders.resume()
        done = state["done"]
        variants: list[tuple[int, list[Values]]] = []
        if done:
            self.kl, self.errors = state["kl"], state["errors"]
            base = self.borders.load(done, 0)
            variants = [(index, self.borders.load(done, 1 + at)) for at, index in enumerate(state["variants"])]
        else:
            base = self.graph.begin(self.calls)
        for at in range(done, len(self.stages) - 1):
            stage = self.stages[at]
            made = self._vary(stage, base)
            for values in [base, *(values for _, values in variants)]:
                self.graph.advance(stage, values, self.rows)
            variants += made
            self.borders.save(at + 1, 0, base)
            for number, (_, values) in enumerate(variants):
                self.borders.save(at + 1, 1 + number, values)
            held = [index for index, _ in variants]
            self.borders.finish(at + 1, kl=self.kl, errors=self.errors, variants=held)
            self.progress(at + 1, len(self.stages))
        self._judge(base, variants)
        for index, names in enumerate(self.units):
            if not self.errors[index]:  # looked up, and never multiplied
                self._errors_of(names, None)
        self.progress(len(self.stages), len(self.stages))
        self.borders.clear()
        return [Unit(tuple(self._options(index))) for index in range(len(self.units))]

    def _vary(self, stage: str, base: Sequence[Values]) -> list[tuple[int, list[Values]]]:
        """The variants that begin at this stage, as they are after it."""
        begun = []
        strengths = self._strengths(stage, base) if self.multiplied.get(stage) else {}
        for index in self.multiplied.get(stage, ()):
            self._errors_of(self.units[index], strengths[self.units[index][0]])
            begun.append(index)
        made = []
        for index in [*begun, *self.looked_up.get(stage, ())]:
            strength = strengths.get(self.units[index][0])
            values = [dict(known) for known in base]
            self.graph.advance(stage, values, self._rounded(index, strength))
            made.append((index, values))
        return made

    def _judge(self, base: list[Values], variants: Sequence[tuple[int, list[Values]]]) -> None:
        """Take all through the last stage, which makes the logits, and add each variant's KL to its unit's."""
        last = self.stages[-1]
        tokens = each_token(base)
        strengths = self._strengths(last, tokens) if self.multiplied.get(last) else {}
        wanted = self._logits([dict(known) for known in tokens], self.rows)
        for index, values in variants:
            self.kl[index] += _divergence(wanted, self._logits(each_token(values), self.rows))
        for index in self.multiplied.get(last, ()):
            strength = strengths[self.units[index][0]]
            self._errors_of(self.units[index], strength)
            got = self._logits([dict(known) for known in tokens], self._rounded(index, strength))
            self.kl[index] += _divergence(wanted, got)

    def _logits(self, values: list[Values], rows: Rows) -> Array:
        """float32 [calls, V]."""
        self.graph.advance(self.stages[-1], values, rows)
        found = []
        for known in values:
            [logits] = [array for value, array in known.items() if value.is_graph_output() and value.name == "logits"]
            found.append(logits.reshape(-1))
        return np.stack(found)

    def _strengths(self, stage: str, base: Sequence[Values]) -> dict[str, torch.Tensor]:
        """The mean square of each channel that the stage's matrices are fed, float32 [width]."""
        import torch

        sums: dict[str, tuple[Array, int]] = {}

        def tap(name: str, x: Array) -> None:
            if name in self.unit_of:
                before, count = sums.get(name, (np.zeros(x.shape[-1]), 0))
                flat = x.reshape(-1, x.shape[-1]).astype(np.float64)
                sums[name] = before + (flat * flat).sum(0), count + len(flat)

        self.graph.advance(stage, [dict(known) for known in base], self.rows, tap)
        return {name: torch.from_numpy((total / count).astype(np.float32)) for name, (total, count) in sums.items()}

    def _rounded(self, index: int, strength: torch.Tensor | None) -> Rows:
        """The checkpoint's rows, but for those of one unit, which are as they would be stored in the probe's format."""
        names = self.units[index]

        def rows(name: str, start: int, stop: int) -> Array:
            if name not in names:
                return self.rows(name, start, stop)
            with workers() as pool:
                cuts = self._cuts(name, 0, start, stop)
                return np.concatenate(_over(pool, cuts, partial(self._stored, name, self.task.probe(name), strength)))

        return rows

    def _errors_of(self, names: Sequence[str], strength: torch.Tensor | None) -> None:
        """File the error of every format of a unit, its matrices' together."""
        index = self.unit_of[names[0]]
        with workers() as pool:
            for key, error in self._measured(pool, names, strength).items():
                self.errors[index][key] = error

    def _measured(
        self, pool: ThreadPoolExecutor, names: Sequence[str], strength: torch.Tensor | None
    ) -> dict[str, float]:
        found: dict[str, float] = {}
        for name in names:
            formats = {fmt.name: fmt for (_, own), fmt in self.task.options(name).items() if not own}
            formats["probe"] = self.task.probe(name)
            cuts = self._cuts(name, SAMPLED)
            share = sum(stop - start for start, stop in cuts) / self.task.model.weights[name].shape[0]
            parts = _over(pool, cuts, partial(self._errors_in, name, tuple(dict.fromkeys(formats.values())), strength))
            for key, fmt in formats.items():
                found[key] = found.get(key, 0.0) + sum(part[fmt] for part in parts) / share
        return found

    def _cuts(self, name: str, elements: int, start: int = 0, stop: int | None = None) -> list[tuple[int, int]]:
        """Cuts of rows to work on at once; every so many of them alone, where they hold more than `elements`."""
        rows, width = self.task.model.weights[name].shape
        stop, step = rows if stop is None else stop, max(1, ROWS // width)
        cuts = [(at, min(stop, at + step)) for at in range(start, stop, step)]
        return cuts[:: -(-(stop - start) * width // elements)] if elements else cuts

    def _stored(self, name: str, fmt: Format, strength: torch.Tensor | None, start: int, stop: int) -> Array:
        """Rows as they would be stored, float32."""
        return _rounded_to(fmt, floats(self.rows, name, start, stop, fmt, "cpu"), strength, name, start)

    def _errors_in(
        self, name: str, formats: Sequence[Format], strength: torch.Tensor | None, start: int, stop: int
    ) -> dict[Format, float]:
        """The error of some rows' products in each format; the rows are read once."""
        weight = floats(self.rows, name, start, stop, formats[0], "cpu")
        found = {}
        for fmt in formats:
            held = _rounded_to(fmt, weight, strength, name, start)
            lost = np.square(held - weight.numpy(), dtype=np.float64).sum(0)
            found[fmt] = float(lost @ strength.numpy().astype(np.float64) if strength is not None else lost.sum())
        return found

    def _options(self, index: int) -> list[Option]:
        """What may be chosen for a unit. A KL is rounded to three digits, so that what rounding makes of it on another
        number of threads chooses nothing else."""
        names = self.units[index]
        errors, kl = self.errors[index], self.kl[index]
        found = []
        for key, carried in self.task.options(names[0]):
            formats = {name: self.task.options(name)[key, carried] for name in names}
            size = sum(fmt.nbytes(self.task.model.weights[name].shape) for name, fmt in formats.items())
            cost = 0.0 if carried or not errors["probe"] else kl * errors[key] / errors["probe"]
            found.append(Option(dict.fromkeys(names, key), size, float(f"{cost:.3g}"), carried))
        return found


def _rounded_to(fmt: Format, weight: torch.Tensor, strength: torch.Tensor | None, name: str, first_row: int) -> Array:
    """float32 rows as they would be stored: by the search where it takes the format, else rounded."""
    import torch

    if not search.takes(fmt):
        return dequantize_codes(encode_rows(weight.numpy(), fmt, name=name, first_row=first_row), fmt)
    grid = search.search(weight, strength if strength is not None else torch.ones(weight.shape[1]), fmt)
    return np.asarray(search.meaning(search.nearest(weight, grid), grid).numpy())


def _readers(model: CanonicalModel, unit_of: Mapping[str, int]) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """The units that each stage multiplies by, and those that it looks up in."""
    from edgeexport.canonical.trace import STAGE

    multiplied: dict[str, list[int]] = {}
    looked_up: dict[str, list[int]] = {}

    def add(found: dict[str, list[int]], stage: str, name: str) -> None:
        if name in unit_of and unit_of[name] not in found.setdefault(stage, []):
            found[stage].append(unit_of[name])

    for item in linears(model.graph.graph):
        add(multiplied, item.node.metadata_props.get(STAGE, ""), str(item.weight.name))
    for node in model.graph.graph:
        table = stored(node.inputs[0]) if node.op_type == "Gather" else None
        if table is not None:
            add(looked_up, node.metadata_props.get(STAGE, ""), str(table.name))
    return multiplied, looked_up


def _over(pool: ThreadPoolExecutor, cuts: Sequence[tuple[int, int]], work: Callable[[int, int], Any]) -> list[Any]:
    """What `work` makes of each cut of rows, in order."""
    return [work(*cuts[0])] if len(cuts) == 1 else list(pool.map(lambda cut: work(*cut), cuts))


def _divergence(wanted: Array, got: Array) -> float:
    """Mean KL in nats of next-token distributions from the wanted ones, by float32 logits [T, V]. Rounding adds some
    1e-7; one matrix in 4 bits costs 1e-4 and more."""
    import torch

    p, q = (torch.log_softmax(torch.from_numpy(each), -1) for each in (wanted, got))
    return max(0.0, float((p.exp() * (p - q)).sum(-1).double().mean()))
