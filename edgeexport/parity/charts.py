"""Where the marks of the report's two plots go: numbers in, SVG coordinates out. The template draws them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT = 760, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 34
MOST_DB = 10_000.0
"""Of no tensor: float64 itself has 6,000 from its largest number to its least."""
_LAYER = re.compile(r"\.(\d{1,4})\.")


@dataclass(frozen=True)
class Tick:
    """A label on an axis and its coordinate."""

    at: float
    text: str


@dataclass(frozen=True)
class Mark:
    """A point and the text shown when it is pointed at."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Series:
    """One line or cloud of points. `line` is the SVG path through the marks."""

    name: str
    marks: tuple[Mark, ...]

    @property
    def line(self) -> str:
        """The marks joined, as an SVG path."""
        return "M" + " L".join(f"{mark.x:.1f},{mark.y:.1f}" for mark in self.marks)


@dataclass(frozen=True)
class Chart:
    """A plot with its axes. `note` says what could not be drawn."""

    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    series: tuple[Series, ...]
    note: str = ""

    left, right, top, bottom = LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM
    width, height = WIDTH, HEIGHT


def drift_chart(drift: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Error per layer on a log scale, or None where there is nothing to draw.

    Rows of `layer`, `max_abs` (largest difference of the hidden state), `rms_error` and `rms` (root mean square of the
    difference and of the reference's hidden state); the relative error is rms_error / rms. Zeros and non-finite numbers
    have no place on a log scale and are named in the note.
    """
    lines: dict[str, list[tuple[int, float]]] = {"max abs error": [], "RMS of the error over the state's": []}
    exact: list[str] = []
    broken: list[str] = []
    for index, row in enumerate(drift):
        error, spread, scale = (float(row[name]) for name in ("max_abs", "rms_error", "rms"))
        if not (math.isfinite(error) and math.isfinite(spread) and math.isfinite(scale)) or error < 0:
            broken.append(str(row["layer"]))
        elif error == 0:
            exact.append(str(row["layer"]))
        else:
            lines["max abs error"].append((index, error))
            share = spread / scale if scale > 0 else 0.0
            if 0 < share < math.inf:
                lines["RMS of the error over the state's"].append((index, share))
    values = [value for points in lines.values() for _, value in points]
    note = "; ".join(
        [f"no difference at all: {', '.join(exact)}"] * bool(exact)
        + [f"not a finite number: {', '.join(broken)}"] * bool(broken)
    )
    if not values:
        return Chart((), (), (), note) if note else None
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    names = [str(row["layer"]) for row in drift]
    series = tuple(
        Series(
            name,
            tuple(
                Mark(
                    _x(index, len(names)), _y((math.log10(value) - low) / (high - low)), f"{names[index]}: {value:.3g}"
                )
                for index, value in points
            ),
        )
        for name, points in lines.items()
        if points
    )
    decades = range(low, high + 1, max(1, (high - low) // 6))
    y_ticks = tuple(Tick(_y((power - low) / (high - low)), f"1e{power}") for power in decades)
    return Chart(_x_ticks(names), y_ticks, series, note)


def snr_chart(weights: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Signal to noise of each quantised tensor over its layer, one cloud per format, or None without any.

    Rows of `tensor`, `format`, `snr_db`. Tensors outside the layers (embedding, lm_head) stand at the left edge.
    Tensors stored exactly (infinite SNR) are counted in the note; those with no signal left are named there.
    """
    exact, broken = 0, []
    points: dict[str, list[tuple[int, float, str]]] = {}
    for row in weights:
        snr, name = float(row["snr_db"]), str(row["tensor"])
        if snr == math.inf:
            exact += 1
        elif not abs(snr) < MOST_DB:
            broken.append(name)
        else:
            match = _LAYER.search(name)
            points.setdefault(str(row["format"]), []).append((int(match[1]) + 1 if match else 0, snr, name))
    note = "; ".join(
        [f"stored exactly: {exact} of {len(weights)} tensors"] * bool(exact)
        + [f"no signal left: {', '.join(broken)}"] * bool(broken)
    )
    flat = [point for group in points.values() for point in group]
    if not flat:
        return Chart((), (), (), note) if note else None
    layers = max(layer for layer, _, _ in flat) + 1
    low = math.floor(min(0.0, *(snr for _, snr, _ in flat)) / 10) * 10
    high = math.ceil(max(snr for _, snr, _ in flat) / 10 + 0.01) * 10
    series = tuple(
        Series(
            name,
            tuple(
                Mark(_x(layer, layers), _y((snr - low) / (high - low)), f"{tensor}: {snr:.1f} dB")
                for layer, snr, tensor in group
            ),
        )
        for name, group in sorted(points.items())
    )
    names = ["no layer", *(str(index) for index in range(layers - 1))]
    step = max(10, (high - low) // 60 * 10)
    y_ticks = tuple(Tick(_y((value - low) / (high - low)), f"{value} dB") for value in range(low, high + 1, step))
    return Chart(_x_ticks(names), y_ticks, series, note)


def _x(index: int, count: int) -> float:
    share = index / (count - 1) if count > 1 else 0.5
    return round(LEFT + 8 + share * (WIDTH - LEFT - RIGHT - 16), 1)


def _y(share: float) -> float:
    return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)


def _x_ticks(names: Sequence[str], most: int = 11) -> tuple[Tick, ...]:
    step = -(-len(names) // most)
    return tuple(Tick(_x(index, len(names)), names[index]) for index in range(0, len(names), step))
