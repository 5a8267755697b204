"""MNN's own ops in the place of what stood for them in the converter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

Json = dict[str, Any]
PLACEHOLDER = "Placeholder"


@dataclass(frozen=True)
class MnnOp:
    """One op as MNN's schema writes it. `inputs` name what the placeholder is given ("in0", "in1", ...) or what an
    op before it made; `output` likewise, where "out" is what the placeholder stands for."""

    type: str
    inputs: tuple[str, ...]
    output: str
    main: Json
    main_type: str = ""


@dataclass(frozen=True)
class Held:
    """A tensor of the weight file that is read as a value: float32, or float16 that MNN widens, at `offset`."""

    offset: int
    shape: tuple[int, ...]
    bits: int = 32


@dataclass
class Placeholders:
    """What stands behind the names in the converted graph."""

    ops: dict[str, tuple[MnnOp, ...]] = field(default_factory=dict)
    values: dict[str, Held] = field(default_factory=dict)


def unknown_ops(converted: Json) -> list[str]:
    """Ops that the converter let through and that MNN does not have."""
    extra = {str(op["main"]["type"]) for op in converted["oplists"] if op["type"] == "Extra"}
    return sorted(extra - {PLACEHOLDER})


def rewrite(converted: Json, placeholders: Placeholders) -> Json:
    """MNN's graph with every placeholder replaced. The converter's random identifier goes too: the same input gives
    the same bytes."""
    names: list[str] = converted["tensorName"]
    ops: list[Json] = []
    for op in converted["oplists"]:
        if op["type"] == "Extra":
            ops += _replaced(op, placeholders, names)
        elif op["type"] == "Input" and op["name"] in placeholders.values:
            ops.append(_held(op, placeholders.values[op["name"]]))
        else:
            ops.append(op)
    kept = {key: value for key, value in converted.items() if key != "mnn_uuid"}
    return {**kept, "oplists": ops}


def _replaced(op: Json, placeholders: Placeholders, names: list[str]) -> list[Json]:
    key = next(each["s"] for each in op["main"]["attr"] if each["key"] == "name")
    indexes = {f"in{k}": index for k, index in enumerate(op.get("inputIndexes", []))}
    (indexes["out"],) = op["outputIndexes"]
    made = []
    for each in placeholders.ops[key]:
        if each.output not in indexes:
            indexes[each.output] = len(names)
            names.append(f"{key}/{each.output}")
        made.append(
            {
                "name": names[indexes[each.output]],
                "type": each.type,
                "main_type": each.main_type or each.type,
                "main": each.main,
                "inputIndexes": [indexes[name] for name in each.inputs],
                "outputIndexes": [indexes[each.output]],
                "defaultDimentionFormat": "NHWC",
            }
        )
    return made


def _held(op: Json, place: Held) -> Json:
    blob = {
        "dims": list(place.shape),
        "dataFormat": "NCHW",
        "dataType": "DT_HALF" if place.bits == 16 else "DT_FLOAT",
        "external": [place.offset, place.bits // 8 * int(np.prod(place.shape, dtype=np.int64))],
    }
    return {**op, "type": "Const", "main_type": "Blob", "main": blob}
