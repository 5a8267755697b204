"""What the ladder measured, for programs (parity.json) and for people (parity.html)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from edgeexport.core import LEVELS, ParityResult, Verdict, worst
from edgeexport.parity.charts import drift_chart, snr_chart
from edgeexport.units import format_bytes

SCHEMA = "edgeexport.parity/1"
LIMITS = (
    "Everything ran on the build host's processor. A phone or a board has other kernels, which may round differently.",
    "The prompts are few and short. Agreement on them does not prove agreement on every text or every length.",
    "Only greedy decoding at batch 1 was compared; sampling draws from the same logits but was not run.",
    "Nothing here says whether the model's answers are good: the ladder compares with the checkpoint, right or wrong.",
)
"""What holds for every report; a build adds its own."""
MEASURED = (
    "Rows whose note names a device ran there, over the golden vectors alone; all others ran on the build host's "
    "processor. Another device has other kernels, which may round differently."
)
"""Stands in for the first of `LIMITS` where devices have measured too."""

TITLES = {
    "L1": "the artifact opens, with the signatures it promises",
    "L2": "canonical graph against transformers",
    "L3": "stored weights against the checkpoint",
    "L4": "artifact against the dequantised canonical graph",
    "L5": "artifact against transformers: agreement, tokens",
}


class Extra(TypedDict, total=False):
    """What a report may hold beside the results. Must not depend on the machine or the time."""

    model: str
    target: str
    scheme: str
    limits: Sequence[str]
    drift: Sequence[Mapping[str, Any]]
    """Per layer, in order: `layer`, `max_abs`, `rms_error`, `rms` (see charts.drift_chart)."""
    weights: Sequence[Mapping[str, Any]]
    """Per stored tensor: `tensor`, `class`, `format`, `snr_db`, `zero_share` (see charts.snr_chart)."""
    answers: Sequence[Mapping[str, Any]]
    """`prompt`, `original` and `artifact` answers as text, `agree` of `tokens`, `whole`, `near_tie`."""
    sizes: Mapping[str, float | int]
    """Sizes and memory by name; a name that ends in _bytes is shown with a unit."""
    devices: Sequence[Mapping[str, Any]]
    """What measured beside the build host: `model`, `system`, `date`."""


def write_json(results: Sequence[ParityResult], extra: Extra) -> bytes:
    """parity.json: `schema`, `verdict`, `results`, `limits` and the rest of `extra`.

    The same input gives the same bytes: sorted keys, two spaces, ASCII. A number that is not finite becomes the string
    "NaN", "Infinity" or "-Infinity", since JSON has no such number and a NaN must not be lost.
    """
    document = {
        **extra,
        "schema": SCHEMA,
        "verdict": worst(results),
        "results": [
            {
                "component": result.component,
                "level": result.level,
                "output": result.output,
                "metrics": result.metrics,
                "gate": result.gate,
                "verdict": result.verdict,
                "note": result.note,
                "stand_in": result.stand_in,
            }
            for result in results
        ],
        "limits": _limits(extra),
    }
    return (json.dumps(_plain(document), sort_keys=True, indent=2, allow_nan=False) + "\n").encode("ascii")


def write_html(results: Sequence[ParityResult], extra: Extra) -> bytes:
    """parity.html: one page without scripts and without anything from outside, light and dark."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = _number
    template = environment.from_string(Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8"))
    verdict = worst(results)
    page = template.render(
        model=extra.get("model", "model"),
        target=extra.get("target", ""),
        scheme=extra.get("scheme", ""),
        verdict=verdict.value,
        headline=_headline(results, verdict),
        levels=[_level(level, results) for level in LEVELS],
        rows=[_row(result) for result in results],
        drift=drift_chart(extra.get("drift", ())),
        snr=snr_chart(extra.get("weights", ())),
        sizes=[(name.removesuffix("_bytes").replace("_", " "), _size(name, value)) for name, value in _sizes(extra)],
        answers=extra.get("answers", ()),
        limits=_limits(extra),
        devices=extra.get("devices", ()),
    )
    return page.encode("utf-8", "replace")  # half of a surrogate pair in a foreign text is no character


def _limits(extra: Extra) -> list[str]:
    first = MEASURED if extra.get("devices") else LIMITS[0]
    return [first, *LIMITS[1:], *extra.get("limits", ())]


def _sizes(extra: Extra) -> list[tuple[str, float | int]]:
    return sorted(extra.get("sizes", {}).items())


def _headline(results: Sequence[ParityResult], verdict: Verdict) -> str:
    counts = {kind: sum(result.verdict is kind for result in results) for kind in Verdict}
    parts = [f"{count} {kind.value.replace('_', ' ').lower()}" for kind, count in counts.items() if count]
    listed = ", ".join(parts) or "nothing was compared"
    claim = {
        Verdict.PASS: "The artifact computes what the checkpoint computes, as far as it was compared",
        Verdict.FAIL: "The artifact does not compute what the checkpoint computes",
        Verdict.AMBIGUOUS: "Nothing could be decided: every comparison was too close to call",
        Verdict.NOT_RUN: "The artifact was not run on this machine"
        if any(result.stand_in for result in results)
        else "Nothing was compared",
    }[verdict]
    return f"{claim}: {listed}."


def _level(level: str, results: Sequence[ParityResult]) -> dict[str, Any]:
    mine = [result for result in results if result.level == level]
    verdict = worst(mine)
    reasons = sorted({result.note for result in mine if result.verdict is Verdict.NOT_RUN and result.note})
    if not mine:
        reasons = ["not asked for"]
    return {
        "name": level,
        "title": TITLES[level],
        "verdict": verdict.value,
        "count": sum(result.verdict is not Verdict.NOT_RUN for result in mine),
        "reasons": reasons if verdict is Verdict.NOT_RUN else [],
    }


def _row(result: ParityResult) -> dict[str, Any]:
    names = list(dict.fromkeys([*result.gate, *result.metrics]))  # what is judged comes first
    return {
        "level": result.level,
        "component": result.component,
        "output": result.output,
        "verdict": result.verdict.value,
        "note": result.note,
        "metrics": [{"name": name, "value": result.metrics.get(name), "gate": result.gate.get(name)} for name in names],
    }


def _size(name: str, value: float | int) -> str:
    return format_bytes(value) if name.endswith("_bytes") else _number(value)


def _number(value: float | int | None) -> str:
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}"


def _plain(value: Any) -> Any:
    """Only what strict JSON has: numpy's scalars unwrapped, numbers that are not finite named."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
