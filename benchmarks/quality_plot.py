"""Draw KL against bits a weight from what `quality.py --json` wrote, as docs/quantisation.svg.

python benchmarks/quality_plot.py dist/quality.json [docs/quantisation.svg]
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 420, 64, 190, 40, 46
KINDS = (
    ("ours", "#1f6feb", lambda name: not name.startswith("llama.cpp")),
    ("llama.cpp", "#b35900", lambda name: name.startswith("llama.cpp")),
)
TITLES = {"gguf": "SmolLM2-135M from its GGUF (Q4_1)", "bf16": "SmolLM2-135M with noise, from bfloat16"}


def drawn(rows: Sequence[Mapping[str, Any]], title: str, top: int) -> Iterator[str]:
    """One panel: a point and its name for each row, KL on a log scale."""
    shown = [row for row in rows if row["kl"] > 0]
    low, high = min(row["bits"] for row in shown) - 0.1, max(row["bits"] for row in shown) + 0.1
    least = math.floor(math.log10(min(row["kl"] for row in shown)) * 2) / 2
    most = math.ceil(math.log10(max(row["kl"] for row in shown)) * 2) / 2
    right, bottom = WIDTH - RIGHT, top + HEIGHT - BOTTOM

    def x(bits: float) -> float:
        return LEFT + (bits - low) / (high - low) * (right - LEFT)

    def y(kl: float) -> float:
        return bottom - (math.log10(kl) - least) / (most - least) * (bottom - top - TOP)

    yield f'<text x="{LEFT}" y="{top + 22}" font-size="15" font-weight="bold">{escape(title)}</text>'
    for exponent in range(math.ceil(least), math.floor(most) + 1):
        for step in (1, 2, 5):
            kl = step * 10.0**exponent
            if least <= math.log10(kl) <= most:
                yield f'<line x1="{LEFT}" x2="{right}" y1="{y(kl):.1f}" y2="{y(kl):.1f}" stroke="#ddd"/>'
                yield f'<text x="{LEFT - 6}" y="{y(kl) + 4:.1f}" text-anchor="end">{kl:g}</text>'
    for half in range(math.ceil(low * 2), math.floor(high * 2) + 1):
        yield f'<text x="{x(half / 2):.1f}" y="{bottom + 18}" text-anchor="middle">{half / 2:g}</text>'
    yield f'<text x="{(LEFT + right) / 2}" y="{bottom + 36}" text-anchor="middle">bits a weight</text>'
    yield f'<text x="{LEFT - 6}" y="{top + TOP - 6}" text-anchor="end">KL, nats</text>'
    taken: list[float] = []
    for row in sorted(shown, key=lambda each: each["kl"]):
        colour = next(colour for _, colour, fits in KINDS if fits(row["case"]))
        at = y(row["kl"])
        label = at if not taken else min(at, taken[-1] - 12)
        taken.append(label)
        point = f"{x(row['bits']):.1f}", f"{at:.1f}"
        yield f'<circle cx="{point[0]}" cy="{point[1]}" r="4" fill="{colour}"/>'
        ends = f'x1="{point[0]}" y1="{point[1]}" x2="{right + 6}" y2="{label:.1f}"'
        yield f'<line {ends} stroke="{colour}" opacity="0.25"/>'
        yield f'<text x="{right + 8}" y="{label + 3:.1f}" font-size="10" fill="{colour}">{escape(row["case"])}</text>'


def main() -> int:
    """The command line."""
    if len(sys.argv) not in (2, 3):
        print(__doc__, file=sys.stderr)
        return 2
    found = json.loads(Path(sys.argv[1]).read_text())
    out = Path(sys.argv[2] if len(sys.argv) == 3 else "docs/quantisation.svg")
    panels = [
        line
        for number, (source, rows) in enumerate(found.items())
        for line in drawn(rows, TITLES[source], number * HEIGHT)
    ]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT * len(found)}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
    )
    out.write_text("\n".join([head, *panels, "</svg>"]) + "\n")
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
