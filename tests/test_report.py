"""parity.json and parity.html: complete, deterministic, self-contained, and safe against hostile names."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from edgeexport.core import ParityResult, Verdict
from edgeexport.parity.charts import HEIGHT, WIDTH, drift_chart, snr_chart
from edgeexport.parity.report import LIMITS, SCHEMA, Extra, write_html, write_json

HOSTILE = "<script>alert(1)</script>&\"'"


def results() -> list[ParityResult]:
    return [
        ParityResult("decoder", "L1", "signatures", {}, {}, Verdict.PASS),
        ParityResult("decoder", "L2", "logits", {"max_abs": 2.1e-5, "steps": 8}, {"max_abs": 1e-3}, Verdict.PASS),
        ParityResult("decoder", "L3", "weights", {"min_snr_db": 18.2}, {"min_snr_db": 12.0}, Verdict.PASS),
        ParityResult("decoder", "L4", HOSTILE, {"max_abs": math.nan}, {"max_abs": 1e-3}, Verdict.FAIL, "NaN at step 3"),
        ParityResult("decoder", "L5", "tokens", {}, {}, Verdict.NOT_RUN, "stopped after L4"),
    ]


def extra() -> Extra:
    rng = np.random.default_rng(0)
    return {
        "model": "smollm2-135m",
        "target": "host-ort",
        "scheme": "int4-b32",
        "limits": ["Only texts in English."],
        "drift": [
            {
                "layer": f"layer {i}",
                "max_abs": 1e-6 * 1.2**i * rng.uniform(0.7, 1.4),
                "rms_error": 1e-7 * 1.2**i,
                "rms": 1 + i / 3,
            }
            for i in range(30)
        ],
        "weights": [
            {"tensor": "model.embed_tokens.weight", "class": "embedding", "format": "int8-b32", "snr_db": 44.1},
            *(
                {
                    "tensor": f"model.layers.{i}.mlp.{part}.weight",
                    "class": "linear",
                    "format": "int4-b32",
                    "snr_db": 21 + rng.normal() / 2,
                }
                for i in range(30)
                for part in ("gate_proj", "up_proj", "down_proj")
            ),
            {"tensor": "model.norm.weight", "class": "other", "format": "fp32", "snr_db": math.inf},
        ],
        "sizes": {"artifact_bytes": 90_123_456, "ideal_bytes": 89_999_000, "artifact_over_ideal": 1.0014},
    }


class Page(HTMLParser):
    """Collects the text and every tag; knows which tags stay open."""

    def __init__(self, html: bytes) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data

    def count(self, tag: str) -> int:
        return sum(found == tag for found, _ in self.tags)


def test_json_holds_every_row_and_is_strict() -> None:
    document = json.loads(write_json(results(), extra()), parse_constant=lambda text: pytest.fail(text))
    assert document["schema"] == SCHEMA and document["verdict"] == "FAIL" and document["model"] == "smollm2-135m"
    assert [set(row) for row in document["results"]] == [
        {"component", "level", "output", "metrics", "gate", "verdict", "note", "stand_in"}
    ] * 5
    assert document["results"][1]["metrics"] == {"max_abs": 2.1e-5, "steps": 8}
    assert document["results"][3]["metrics"] == {"max_abs": "NaN"} and document["weights"][-1]["snr_db"] == "Infinity"
    assert document["limits"] == [*LIMITS, "Only texts in English."]


def test_json_does_not_depend_on_order_or_numpy() -> None:
    plain = write_json(
        [ParityResult("d", "L2", "y", {"b": 0.5, "a": 2}, {}, Verdict.PASS)], {"model": "m", "target": "t"}
    )
    other = ParityResult("d", "L2", "y", {"a": np.int64(2), "b": np.float32(0.5)}, {}, Verdict.PASS)  # type: ignore[dict-item]
    assert write_json([other], {"target": "t", "model": "m"}) == plain
    assert write_html(results(), extra()) == write_html(results(), extra())


def test_html_is_one_page_without_scripts_or_outside_parts() -> None:
    html = write_html(results(), extra())
    page = Page(html)
    assert not page.open and page.count("html") == 1
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & {tag for tag, _ in page.tags}
    attributes = {name for _, attrs in page.tags for name in attrs}
    assert not {"src", "href"} & attributes and not [name for name in attributes if name.startswith("on")]
    assert b"url(" not in html and b"@import" not in html and not re.search(rb"https?://", html)
    assert HOSTILE in page.text and HOSTILE.encode() not in html


def test_html_shows_verdicts_metrics_plots_sizes_and_limits() -> None:
    page = Page(write_html(results(), extra()))
    badges = [str(attrs["class"]) for tag, attrs in page.tags if str(attrs.get("class", "")).startswith("badge")]
    assert badges[:6] == [f"badge {verdict}" for verdict in ("FAIL", "PASS", "PASS", "PASS", "FAIL", "NOT_RUN")]
    assert len(badges) == 6 + 5
    for text in ("2.1e-05", "0.001", "NaN at step 3", "stopped after L4", "85.9 MiB", "1.001", *LIMITS, "English"):
        assert text in page.text, text
    assert "stored exactly: 1 of 92 tensors" in page.text
    assert page.count("svg") == 2 and page.count("circle") == 2 * 30 + 91 and page.count("path") == 2


def test_html_without_anything() -> None:
    page = Page(write_html([], {}))
    assert "Nothing was compared" in page.text and page.count("svg") == 0 and "PASS" not in page.text


def test_drift_marks_stand_where_the_numbers_say() -> None:
    drift: list[dict[str, Any]] = [
        {"layer": str(i), "max_abs": 10.0 ** (i - 5), "rms_error": 10.0 ** (i - 5), "rms": 10.0} for i in range(4)
    ]
    chart = drift_chart(drift)
    assert chart is not None
    absolute, relative = chart.series
    for series in (absolute, relative):
        xs, ys = [mark.x for mark in series.marks], [mark.y for mark in series.marks]
        assert xs == sorted(xs) and ys == sorted(ys, reverse=True)
        assert all(0 <= x <= WIDTH for x in xs) and all(0 <= y <= HEIGHT for y in ys)
        steps = np.diff(ys)
        assert np.allclose(steps, steps[0], atol=0.2), "equal factors are equal distances"
    ticks = {tick.text: tick.at for tick in chart.y_ticks}
    assert ticks["1e-5"] == absolute.marks[0].y and ticks["1e-6"] == relative.marks[0].y


def test_what_cannot_be_drawn_is_said() -> None:
    chart = drift_chart(
        [
            {"layer": "a", "max_abs": 0.0, "rms_error": 0.0, "rms": 1.0},
            {"layer": "b", "max_abs": math.nan, "rms_error": math.nan, "rms": 1.0},
        ]
    )
    assert chart is not None and not chart.series
    assert chart.note == "no difference at all: a; not a finite number: b"
    assert drift_chart([]) is None and snr_chart([]) is None
    dead = snr_chart([{"tensor": "x", "format": "int4-b32", "snr_db": -math.inf}])
    assert dead is not None and dead.note == "no signal left: x"
    low = snr_chart([{"tensor": "a.3.b", "format": "int4-b32", "snr_db": -12.0}])
    assert low is not None and 0 <= low.series[0].marks[0].y <= HEIGHT
