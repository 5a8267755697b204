"""The whole walk to Core ML on tiny random models, and the two known miscompilations let through on purpose."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import with_tokenizer
from graphs import write_checkpoint
from test_coreml import plain_norm, stale, use

from edgeexport import build, errors, families, open_bundle
from edgeexport.backends import coreml_lints
from edgeexport.bundle.verify import verify
from edgeexport.core import LEVELS, Verdict

pytest.importorskip("coremltools")

CONTEXT = 96
WALKS = [
    ("llama", "fp16"),
    ("qwen3", "int8"),
    ("glm4", "int4-b32"),
    *(("glm4v", scheme) for scheme in ("fp16", "int8", "int4-b32")),
    ("glm46v", "int4-b32"),
    ("autoglm_phone", "int8"),
]


NEURAL_ENGINE = [("qwen2", "palette4"), ("glm4v", "palette4"), ("autoglm_phone", "palette4")]


@pytest.fixture(scope="module")
def small_target(tmp_path_factory: pytest.TempPathFactory) -> str:
    """ios-coreml for screens of 56 x 84 pixels and prompts in pieces of 8."""
    return small("ios-coreml", 8, tmp_path_factory.mktemp("targets"))


def small(target: str, prefill: int, folder: Path) -> str:
    text = (Path(__file__).parent.parent / "targets" / f"{target}.toml").read_text()
    for key, value in (("screens", [[56, 84], [84, 56]]), ("max_pixels", 56 * 84), ("prefill", prefill)):
        text, found = re.subn(rf"^{key} = .*$", f"{key} = {value}", text, flags=re.MULTILINE)
        assert found == 1
    path = folder / "small.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(("family", "scheme"), WALKS)
def test_a_model_walks_to_a_bundle(family: str, scheme: str, small_target: str, tmp_path: Path) -> None:
    walks(family, scheme, small_target, tmp_path)


@pytest.mark.parametrize(("family", "scheme"), NEURAL_ENGINE)
def test_a_model_walks_to_the_neural_engine(family: str, scheme: str, tmp_path: Path) -> None:
    from edgeexport.backends.coreml_interpreter import Interpreter

    bundle = walks(family, scheme, small("ios-coreml-ane", 32, tmp_path), tmp_path)
    kinds = {step.kind for step in Interpreter(bundle / "decoder.mlpackage").function("prefill").steps}
    assert "conv" in kinds and "linear" not in kinds


def test_a_cache_that_the_neural_engine_would_pad_is_refused(tmp_path: Path) -> None:
    checkpoint = with_tokenizer(write_checkpoint(tmp_path / "llama", families.find("llama").tiny))
    with pytest.raises(errors.LoweringError, match="cache-not-aligned") as caught:
        build(str(checkpoint), "ios-coreml-ane", tmp_path / "out", context=40)
    assert "--context 64" in caught.value.findings[0].fix


def walks(family: str, scheme: str, target: str, tmp_path: Path) -> Path:
    """Build a tiny model, climb the ladder, and use the bundle."""
    checkpoint = with_tokenizer(write_checkpoint(tmp_path / family, families.find(family).tiny))
    result = build(str(checkpoint), target, tmp_path / "out", quant=scheme, context=CONTEXT)
    assert {row.level for row in result.results} == set(LEVELS)
    assert not [row for row in result.results if row.verdict in (Verdict.FAIL, Verdict.NOT_RUN)]
    assert "coreml-interpreted" in {finding.code for finding in result.findings}
    assert result.size < 2.5 * result.ideal_bytes + 400_000  # the program itself, which at this size is most of it

    bundle = open_bundle(result.bundle)
    assert verify(result.bundle).golden is Verdict.PASS
    decoder = bundle.manifest.component("decoder")
    assert decoder is not None and decoder.kv is not None and decoder.kv.dtype == "float16"
    assert {signature.name for signature in decoder.signatures} == {"decode", "prefill"}
    with bundle.session() as session:
        tokens = np.arange(3, 23)
        whole = session.prefill(tokens).copy()
        session.reset()
        session.prefill(tokens[:13])
        for token in tokens[13:]:
            last = session.decode(int(token))
        np.testing.assert_allclose(last, whole, atol=0.02)
    return result.bundle


def failed(checkpoint: Path, target: str, out: Path) -> set[str]:
    """The levels that a build fails at."""
    with pytest.raises(errors.ParityError) as caught:
        build(str(checkpoint), target, out, quant="fp16", context=CONTEXT)
    assert not out.exists() or not list(out.iterdir())
    return {word for finding in caught.value.findings for word in re.findall(r"L\d", finding.what + finding.where)}


def let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coreml_lints, "unsafe", lambda model: [])


def test_a_stale_cache_fails_the_build_even_without_the_lint(
    small_target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_through(monkeypatch)
    use(monkeypatch, "TensorScatter", stale)
    monkeypatch.setenv("EDGEEXPORT_CACHE_DIR", str(tmp_path / "cache"))
    checkpoint = with_tokenizer(write_checkpoint(tmp_path / "llama", families.find("llama").tiny))
    assert failed(checkpoint, small_target, tmp_path / "out") == {"L4"}


def test_an_overflowing_norm_fails_the_build_even_without_the_lint(
    small_target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model whose residual stream has numbers of a few hundred, as real ones do."""
    let_through(monkeypatch)
    checkpoint = with_tokenizer(write_checkpoint(tmp_path / "llama", families.find("llama").tiny))
    loud(checkpoint / "model.safetensors")
    build(str(checkpoint), small_target, tmp_path / "good", quant="fp16", context=CONTEXT)
    use(monkeypatch, "RMSNormalization", plain_norm)
    monkeypatch.setenv("EDGEEXPORT_CACHE_DIR", str(tmp_path / "cache"))
    assert failed(checkpoint, small_target, tmp_path / "out") == {"L4"}


def loud(weights: Path) -> None:
    """One number of every embedding becomes 400; the norms mute it and raise the others to what they were."""
    from safetensors.numpy import load_file, save_file

    tensors: dict[str, Any] = {name: array.copy() for name, array in load_file(weights).items()}
    tensors["model.embed_tokens.weight"][:, 7] = 400
    for name, array in tensors.items():
        if name.endswith("norm.weight"):
            array *= 50
            array[7] = 0
    save_file(tensors, weights)
