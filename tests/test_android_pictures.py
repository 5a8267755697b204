"""The native loader with a small glm4v: pictures spliced into a prompt, M-RoPE, and what of both can be taken back."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from bundles import rehash
from native import answers, device_rows, edgeexport_run, programs
from sharing import alone, shared
from test_glm4v import CASES, checkpoint_of, target_of

from edgeexport import build, open_bundle
from edgeexport.core import Array, Verdict
from edgeexport.parity.examples import drawing
from edgeexport.session.image_file import Image

STEPS = 12
CASE = CASES["plain"]
PICTURES = [Image(drawing(*size)) for size in CASE.pictures]


@pytest.fixture(scope="module")
def loader() -> Path:
    return programs("plain", ["edgeexport-run"])


def seeing(factory: pytest.TempPathFactory) -> Path:
    """A bundle that sees, with pictures in its golden vectors, made by the first worker of this run that needs it."""
    folder = shared(factory, "android", "glm4v")
    found = folder / "out" / "model-tiny"
    with alone(folder):
        if not found.exists():
            model = checkpoint_of(CASE, folder / "model")
            build(str(model), str(target_of(CASE, folder)), folder / "out", parity="L5")
    return found


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seeing(tmp_path_factory)


def prompt_of(pictures: int) -> list[int]:
    """Text before, between and behind pictures, with each placeholder once."""
    config = CASE.config
    shown = [config["image_start_token_id"], config["image_token_id"], config["image_end_token_id"]]
    return [5, 6, 7, *[token for i in range(pictures) for token in (*shown, 8 + i, 30)]]


def python_logits(bundle: Path, prompts: Sequence[Sequence[int]], pictures: int, keep: int) -> list[Array]:
    """What Python's session gives for the same: the logits of each token of each answer."""
    with open_bundle(bundle).session(threads=2) as session:
        features = [session.encode_image(each) for each in PICTURES[:pictures]]
        assert session.inputs is not None
        rows = []
        for i, prompt in enumerate(prompts):
            session.truncate(keep if i else 0)
            whole = prompt if i else session.inputs.expand(prompt, features)
            rows.append(session.prefill(whole, () if i else features).copy())
            for _ in range(STEPS - 1):
                rows.append(session.decode(int(rows[-1].argmax())).copy())
    return rows


@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_its_tokens_and_logits_are_pythons(pictures: int, loader: Path, bundle: Path, tmp_path: Path) -> None:
    shown: list[object] = []
    for i, each in enumerate(PICTURES[:pictures]):
        (tmp_path / f"{i}").write_bytes(each.array.tobytes())
        shown += ["--picture", tmp_path / f"{i}", each.height, each.width]
    prompt = prompt_of(pictures)
    # again from behind the last picture on, then from a place amid the first one, where text does not go on
    features = 6 * pictures
    prompts, keep = [prompt, [40, 41, 42]], len(prompt) - pictures + features - 1
    for at in (keep, 6):
        logits = tmp_path / "logits"
        found = answers(
            loader, bundle, tmp_path, prompts, *shown, "--max-tokens", STEPS, "--logits", logits, "--keep", at
        )
        wanted = np.stack(python_logits(bundle, prompts, pictures, at))
        np.testing.assert_allclose(np.fromfile(logits, np.float32).reshape(wanted.shape), wanted, rtol=0, atol=1e-4)
        assert [token for each in found["answers"] for token in each["tokens"]] == wanted.argmax(1).tolist()
        assert found["bundle"] == "model, tiny, fp32"


def test_golden_pictures_are_replayed(loader: Path, bundle: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    rows = device_rows(loader, bundle, tmp_path, report)
    manifest = open_bundle(bundle).manifest
    title = f"{manifest.model.name}, {manifest.target.name}, {manifest.quantisation}"
    assert json.loads(report.read_text())["bundle_title"] == title
    assert [row.output for row in rows] == [
        f"{what} on onnxruntime cpu" for what in ("opens", *["golden text"] * 2, *["golden picture"] * 2)
    ]
    assert {row.verdict for row in rows} == {Verdict.PASS}
    assert all(row.metrics["max_abs"] == 0 for row in rows if row.level == "L4")  # the same runtime, the same machine


def mixed(bundle: Path) -> None:
    """Another model's eyes."""
    file = bundle / "vision.onnx.data"
    weights = np.fromfile(file, np.float32)
    np.random.default_rng(0).shuffle(weights)
    weights.tofile(file)


def recoloured(bundle: Path) -> None:
    """One colour of each pixel a step brighter."""
    (file,) = bundle.glob("golden/picture-*x56.bmp")
    data = bytearray(file.read_bytes())
    data[54::3] = bytes(min(255, value + 1) for value in data[54::3])
    file.write_bytes(data)


def cut(bundle: Path) -> None:
    (file,) = bundle.glob("golden/picture-*x56.bmp")
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "code"), [(mixed, "golden-mismatch"), (recoloured, "golden-mismatch"), (cut, "golden-unusable")]
)
def test_a_golden_picture_that_gives_something_else_is_refused(
    damage: Callable[[Path], None], code: str, loader: Path, bundle: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    damage(copy)
    rehash(copy)
    failed = [row for row in device_rows(loader, copy, tmp_path, tmp_path / "r.json") if row.verdict is Verdict.FAIL]
    assert failed and {row.output for row in failed} == {"golden picture on onnxruntime cpu"}
    if damage is not mixed:  # whose logits are judged from the report, by the bundle's gates
        assert f"[{code}]" in failed[0].note
    checked = subprocess.run(edgeexport_run(loader, copy, tmp_path, "--check"), capture_output=True, text=True)
    assert checked.returncode == 8 and checked.stderr.startswith(f"error[{code}]: ")
