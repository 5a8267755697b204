"""The real SmolLM2-135M as TensorRT-RTX engines: one file for four compute capabilities."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_tensorrt_pipeline import capabilities_of

from edgeexport import build
from edgeexport.core import Verdict

pytestmark = pytest.mark.real


@pytest.mark.parametrize("scheme", ["fp16", "int4-b128"])
def test_smollm2_becomes_an_engine(scheme: str, tmp_path: Path) -> None:
    made = build("smollm2-135m", "rtx-trt", tmp_path, quant=scheme, context=512, parity="L1", calibrate_method="none")
    assert {row.verdict for row in made.results if row.level == "L1"} == {Verdict.PASS}
    engine = made.bundle / "decoder.engine"
    assert capabilities_of(engine) == ["8.0", "8.6", "8.9", "12.0"]
    assert made.ideal_bytes < engine.stat().st_size < 1.4 * made.ideal_bytes  # measured 1.05 and 1.30, with kernels
