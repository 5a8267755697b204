"""A small glm4v in MNN's own engine against transformers: pictures, M-RoPE positions, and a live cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from graphs import oracle
from test_glm4v import CASES, STEPS, Case, Work, checkpoint_of, generated, most_pixels, original_features, processor

from edgeexport import build, open_bundle
from edgeexport.core import Verdict
from edgeexport.parity.examples import drawing
from edgeexport.session.image_file import Image


def target_of(case: Case, folder: Path) -> Path:
    """android-mnn for the pictures and the context of these models."""
    path = folder / "tiny-mnn.toml"
    path.write_text(
        'title = "test"\nplatform = "android"\nbackend = "mnn"\nartifact = ".mnn"\nprecision = "float32"\n'
        'quant = "fp16"\ncontext = 96\n'
        f"[shapes.vision]\nscreens = {[list(size) for size in case.screens]}\nmax_pixels = {most_pixels(case)}\n"
    )
    return path


def checkpoint_in_float16(case: Case, folder: Path) -> Path:
    """The case's weights as float16 holds them, so that the artifact rounds nothing."""
    from safetensors.numpy import load_file, save_file

    checkpoint = checkpoint_of(case, folder)
    weights = load_file(checkpoint / "model.safetensors")
    rounded = {name: weight.astype(np.float16).astype(np.float32) for name, weight in weights.items()}
    save_file(rounded, checkpoint / "model.safetensors", {"format": "pt"})
    return checkpoint


@pytest.mark.parametrize("name", ["plain", "tied, other grids"])
def test_pictures_text_and_a_live_cache_equal_transformers(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    checkpoint = checkpoint_in_float16(case, tmp_path / "model")
    result = build(str(checkpoint), str(target_of(case, tmp_path)), tmp_path / "out", parity="L4")
    assert not [row for row in result.results if row.verdict is Verdict.FAIL]
    pictures = [Image(drawing(*size)) for size in case.pictures]
    made = processor(checkpoint)(images=[each.array for each in pictures], return_tensors="pt")
    work = Work(
        case, checkpoint, result.bundle, oracle(checkpoint), pictures, made["pixel_values"], made["image_grid_thw"]
    )
    with open_bundle(result.bundle).session() as session:
        features = [session.encode_image(each) for each in pictures]
        tokens = work.prompt(session)
        logits = [session.prefill(tokens, features).copy()]
        for _ in range(STEPS):
            logits.append(session.decode(int(logits[-1].argmax())).copy())
        session.truncate(len(tokens) - 2)
        again = session.prefill(tokens[-2:]).copy()
    wanted = original_features(work)
    np.testing.assert_allclose(np.concatenate([each.values for each in features]), wanted, rtol=0, atol=1e-4)
    answer, expected = generated(work, tokens)
    assert [int(each.argmax()) for each in logits] == answer
    np.testing.assert_allclose(np.stack(logits), expected, rtol=0, atol=1e-3)
    np.testing.assert_allclose(again, logits[0], rtol=0, atol=1e-4)
