"""Heads of every width, turned whole or in part: a target refuses a model before a weight is read, or computes what
transformers computes. Kernels take multiples of 8 or of 16; published models have 100, 26 and 8 channels a head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import Zoo, reference_logits, written

from edgeexport import backends, targets

LLAMAS = {width: (("head_dim", width),) for width in (6, 8, 26, 72, 100)}
PARTLY = {width: (("head_dim", width), ("partial_rotary_factor", 0.5)) for width in (8, 16, 52, 100)}
"""glm4 turns half of each head."""
HEADS: dict[str, tuple[str, tuple[tuple[str, Any], ...]]] = {
    **{f"llama {width}": ("llama", changes) for width, changes in LLAMAS.items()},
    **{f"glm4 {width}": ("glm4", changes) for width, changes in PARTLY.items()},
}
NAMES = ("host-ort", "android-tflite", "android-mnn", "ios-coreml", "rtx-trt")
"""A target of each backend."""
EVERYWHERE = {"llama 26", "llama 100", "glm4 8"}
"""What every backend is asked; the others are for the one whose kernels take the fewest."""
CASES = [(name, heads) for heads in HEADS for name in NAMES if name == "host-ort" or heads in EVERYWHERE]
TOKENS = np.arange(3, 24)


def test_every_backend_has_its_target() -> None:
    others = {"litert-nnapi", "tensorrt-android", "tensorrt-kit"}  # the same lowerings, for other devices
    assert {targets.load(name).backend for name in NAMES} == set(backends.BACKENDS) - others


@pytest.mark.parametrize(("name", "heads"), CASES)
def test_a_width_is_refused_or_right(name: str, heads: str, zoo: Zoo, tmp_path: Path) -> None:
    family, changes = HEADS[heads]
    found = zoo.traced(family, "float32", changes)
    target = targets.load(name)
    backend, runner = backends.load(target.backend), backends.load_runner(target.backend)
    scheme = "fp16" if target.precision == "float16" else "fp32"
    plan = found.plan("fp16" if target.backend == "mnn" else scheme)  # it looks no table up in float32
    if findings := backend.check(found.model, target, plan):
        assert {finding.severity for finding in findings} == {"error"} and all(finding.fix for finding in findings)
        pytest.fail(f"no target refuses a width today: {findings[0]}")
    artifact = written(backend, [found.model], target, plan, tmp_path)
    decoder = runner.open_decoder(tmp_path, artifact, threads=1)
    got = [decoder.step(TOKENS[:16], 0).copy(), decoder.step(TOKENS[16:20], 16).copy()]
    got += [decoder.step(TOKENS[position : position + 1], position).copy() for position in range(20, len(TOKENS))]
    decoder.close()
    wanted = reference_logits(zoo.oracle(family, "float32", changes), TOKENS)[[15, 19, *range(20, len(TOKENS))]]
    half = scheme == "fp16" or target.backend == "mnn"
    apart = (2e-2 if half else 1e-4) * max(1.0, float(np.abs(wanted).max()))
    np.testing.assert_allclose(np.stack(got), wanted, rtol=0, atol=apart)
