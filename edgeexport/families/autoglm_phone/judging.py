"""How well a trained model answers the held-out questions, and how much of that comes from where."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from edgeexport.core import Array
from edgeexport.families.autoglm_phone.data import TASKS, Clip, Item, Picture, Split
from edgeexport.families.autoglm_phone.features import Features
from edgeexport.families.autoglm_phone.learning import Group, Learner
from edgeexport.families.autoglm_phone.prompts import IGNORED

BATCH = 20
ABLATED = 100
"""Items of each task that are answered again with a modality spoiled."""
PROBE_STEPS = 400

Spoil = Callable[[torch.Tensor], torch.Tensor]


def judge(learner: Learner, items: Sequence[Item], features: Features) -> dict[str, float]:
    """Part of each task's items whose answer, word for word and ended, is what greedy decoding gives.

    It is read off one pass over question and answer together: greedy decoding gives the answer exactly when each of its
    tokens has the largest logit after those before it.
    """
    return {task: float(np.mean(_right(learner, _of(items, task), features))) for task in TASKS}


def spoiled(learner: Learner, items: Sequence[Item], features: Features) -> dict[str, dict[str, float]]:
    """The same with a modality's features set to zero, or taken from another item, for tasks that have it."""
    table: dict[str, dict[str, float]] = {}
    for name in ("picture", "clip"):
        for how, change in (("zeroed", torch.zeros_like), ("shuffled", _rolled)):
            row = {}
            for task in TASKS:
                some = _of(items, task)
                some = [some[i] for i in np.random.default_rng(1).permutation(len(some))[:ABLATED]]
                if getattr(some[0], name) is not None:
                    row[task] = float(np.mean(_right(learner, some, features, {name: change})))
            table[f"{name} {how}"] = row
    return table


def _of(items: Sequence[Item], task: str) -> list[Item]:
    return [item for item in items if item.task == task]


def _rolled(aligned: torch.Tensor) -> torch.Tensor:
    return aligned.roll(1, 0)


def _right(
    learner: Learner, items: Sequence[Item], features: Features, spoils: Mapping[str, Spoil] | None = None
) -> list[bool]:
    """One value per item, all of one task."""
    learner.eval()
    right: list[bool] = []
    with torch.no_grad():
        for start in range(0, len(items), BATCH):
            some = items[start : start + BATCH]
            given = [name for name in ("picture", "clip") if getattr(some[0], name) is not None]
            parts = dict(zip(given, learner.aligned(some, features), strict=True))
            for name, spoil in (spoils or {}).items():
                parts[name] = spoil(parts[name])
            logits, wanted = learner.answers([Group(some, torch.cat(list(parts.values()), 1))])
            hits = (logits.argmax(-1) == wanted).tolist()
            for count in (learner.prompts.batch(some).labels != IGNORED).sum(1).tolist():
                right.append(all(hits[:count]))
                hits = hits[count:]
    return right


def probe(train: tuple[Split, Features], test: tuple[Split, Features]) -> dict[str, float]:
    """Held-out accuracy of a linear classifier on the mean of a tower's features: what the towers themselves know.

    For `joint` it is the product of the digits' and the words' figures: both must be right.
    """
    found = {
        "digit": _probe(*(_table(data.digits, features.pictures) for data, features in (train, test))),
        "scene": _probe(*(_table(data.scenes, features.pictures) for data, features in (train, test))),
        "word": _probe(*(_table(data.clips, features.clips) for data, features in (train, test))),
    }
    return {**found, "joint": found["digit"] * found["word"]}


Table = tuple[torch.Tensor, list[str]]


def _table(things: Sequence[Picture] | Sequence[Clip], features: Mapping[Any, Array]) -> Table:
    means = [features[each].astype(np.float32).mean(0) for each in things]
    return torch.from_numpy(np.stack(means)), [each.label for each in things]


def _probe(train: Table, test: Table) -> float:
    names = sorted(set(train[1]))
    middle, spread = train[0].mean(0), train[0].std(0) + 1e-3
    x, y = (train[0] - middle) / spread, torch.tensor([names.index(label) for label in train[1]])
    linear = nn.Linear(x.shape[1], len(names))
    optimizer = torch.optim.AdamW(linear.parameters(), 1e-3, weight_decay=1e-2)
    for _ in range(PROBE_STEPS):
        loss = nn.functional.cross_entropy(linear(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        best = linear((test[0] - middle) / spread).argmax(1)
    return float(np.mean([names[i] == label for i, label in zip(best.tolist(), test[1], strict=True)]))
