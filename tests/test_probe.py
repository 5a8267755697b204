"""A picture too costly for L2: a smaller one stands in for it, and what was not asked is not in the bundle."""

from __future__ import annotations

from pathlib import Path

import pytest
from factories import with_tokenizer
from graphs import write_checkpoint

from edgeexport import build, families, open_bundle, steps
from edgeexport.core import Verdict


@pytest.mark.parametrize(("level", "golden"), [("L3", set()), ("L5", {"picture"})])
def test_a_small_picture_stands_in_at_l2(
    level: str, golden: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "PROBE_WORK", 0)
    monkeypatch.setattr(steps, "PROBE_SCREEN", (56, 84))
    checkpoint = with_tokenizer(write_checkpoint(tmp_path / "model", families.find("glm4v").tiny))
    text = (Path(__file__).parent.parent / "targets" / "host-ort.toml").read_text()
    target = tmp_path / "small.toml"
    target.write_text(text.replace("[[2400, 1080]]", "[[84, 84]]").replace("max_pixels = 401408", "max_pixels = 7056"))

    result = build(str(checkpoint), str(target), tmp_path / "out", quant="fp32", context=96, parity=level)

    rows = {(row.component, row.output): row.verdict for row in result.results if row.level == "L2"}
    assert rows[("vision", "features, 4x6")] is rows[("decoder", "logits (picture)")] is Verdict.PASS
    assert rows[("vision", "features, 6x6")] is Verdict.NOT_RUN
    assert not [row for row in result.results if row.verdict is Verdict.FAIL]
    assert {case.name for case in open_bundle(result.bundle).manifest.golden.shown} == golden
