"""The real SmolLM2-135M from the package index, through the command line, against transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeexport import open_bundle
from edgeexport.checkpoint import WeightReader, open_checkpoint
from edgeexport.core import Array
from edgeexport.parity import gates
from edgeexport.parity.compare import margins
from edgeexport.parity.examples import TEXTS

pytestmark = pytest.mark.real

MODEL = "smollm2-135m"
TOKENS = 32
CONTEXT = ("--context", "512")
"""As other tests build it: traced and calibrated once for all of them."""


def edgeexport(*arguments: str) -> dict[str, Any]:
    """The JSON document that a command prints."""
    command = [sys.executable, "-m", "edgeexport", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    document: dict[str, Any] = json.loads(done.stdout)
    return document


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bundles for this computer in float32 and int4, by scheme."""
    out = tmp_path_factory.mktemp("real")
    found = {}
    for scheme in ("fp32", "int4-b32"):
        folder = out / scheme
        edgeexport("build", MODEL, "--target", "host-ort", "--quant", scheme, *CONTEXT, "-o", str(folder))
        found[scheme] = folder / f"{MODEL}-host-ort"
    return found


@pytest.fixture(scope="module")
def answers(bundles: dict[str, Path]) -> Any:
    """Token ids that `edgeexport run --raw` answers to a text, by scheme."""

    @cache
    def ask(scheme: str, text: str) -> tuple[int, ...]:
        document = edgeexport("run", str(bundles[scheme]), "--raw", "--prompt", text, "--max-tokens", str(TOKENS))
        return tuple(document["token_ids"])

    return ask


@pytest.fixture(scope="module")
def judge(bundles: dict[str, Path]) -> Any:
    """transformers' model with the checkpoint's weights, or with those that a bundle stores, dequantised."""
    import torch
    from transformers import AutoModelForCausalLM

    from edgeexport.backends.storage import read_rows
    from edgeexport.families.stages import transformers_config
    from edgeexport.shipping import stored_weights

    checkpoint = open_checkpoint(MODEL)
    model = AutoModelForCausalLM.from_config(transformers_config(checkpoint.config), dtype=torch.float32).eval()

    @lru_cache(maxsize=1)  # two of them are a gigabyte
    def load(scheme: str | None) -> Any:
        shapes = {name: ref.shape for name, ref in checkpoint.tensors.items()}
        stored = stored_weights(open_bundle(bundles[scheme]), "decoder", shapes) if scheme else {}
        with WeightReader() as reader:
            state = {}
            for name, ref in checkpoint.tensors.items():
                rows = read_rows(bundles[scheme], stored[name], 0, ref.shape[0]) if scheme else reader.read(ref)
                state[name] = torch.from_numpy(rows.reshape(ref.shape).copy())
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert (missing, unexpected) == (["lm_head.weight"], []) or not missing
        model.tie_weights()
        return model

    def logits(scheme: str | None, tokens: list[int]) -> Array:
        with torch.no_grad():
            result: Array = load(scheme)(torch.tensor([tokens])).logits[0].numpy()
        return result

    return logits


def test_float32_answers_token_for_token_as_transformers(bundles: dict[str, Path], answers: Any, judge: Any) -> None:
    tokenizer = open_bundle(bundles["fp32"]).tokenizer()
    worst = 0.0
    for text in TEXTS:
        prompt, answer = list(tokenizer.encode(text)), list(answers("fp32", text))
        reference = judge(None, [*prompt, *answer])
        assert reference[len(prompt) - 1 : -1].argmax(-1).tolist()[: len(answer)] == answer
        with open_bundle(bundles["fp32"]).session() as session:
            worst = max(worst, float(np.abs(session.prefill(np.array(prompt)) - reference[len(prompt) - 1]).max()))
    assert worst <= 1e-3


def test_int4_answers_as_its_own_dequantised_weights(bundles: dict[str, Path], answers: Any, judge: Any) -> None:
    tokenizer = open_bundle(bundles["int4-b32"]).tokenizer()
    tie = gates.NEAR_TIE["int4"]
    decided = ambiguous = 0
    for text in TEXTS:
        prompt, answer = list(tokenizer.encode(text)), list(answers("int4-b32", text))
        reference = judge("int4-b32", [*prompt, *answer])[len(prompt) - 1 : -1][: len(answer)]
        clear = margins(reference) >= tie
        assert (reference.argmax(-1) == np.array(answer))[clear].all(), text
        decided, ambiguous = decided + int(clear.sum()), ambiguous + int((~clear).sum())
    assert decided > ambiguous, f"{ambiguous} of {decided + ambiguous} tokens are near a tie: nothing is proven"


def test_the_capital_of_france_is_paris(bundles: dict[str, Path], answers: Any) -> None:
    tokenizer = open_bundle(bundles["fp32"]).tokenizer()
    assert tokenizer.decode(answers("fp32", "The capital of France is")).startswith(" Paris")
    document = edgeexport("run", str(bundles["fp32"]), "--prompt", "What is the capital of France?")
    assert "Paris" in document["text"]


def test_int4_answers_what_the_ladder_says_it_answers(bundles: dict[str, Path]) -> None:
    """Of the eight questions: the original's answer, or another one from a place where it was near a tie."""
    listed = json.loads((bundles["int4-b32"] / "parity.json").read_text())["answers"]
    assert len(listed) == 8
    assert all(each["whole"] or each["near_tie"] for each in listed)
    for each in [each for each in listed if each["whole"]][:2]:
        document = edgeexport("run", str(bundles["int4-b32"]), "--prompt", each["prompt"], "--max-tokens", "16")
        assert (
            document["text"]
            == each["artifact"].removesuffix("<|im_end|>")
            == each["original"].removesuffix("<|im_end|>")
        )


def test_the_int4_bundle_is_small_and_verifies(bundles: dict[str, Path]) -> None:
    report = json.loads((bundles["int4-b32"] / "parity.json").read_text())
    assert report["sizes"]["artifact_to_ideal"] <= 1.01
    edgeexport("verify", str(bundles["int4-b32"]))


def test_a_second_build_changes_nothing(bundles: dict[str, Path]) -> None:
    out = str(bundles["int4-b32"].parent)
    document = edgeexport("build", MODEL, "--target", "host-ort", "--quant", "int4-b32", *CONTEXT, "-o", out)
    assert document["builds"][0]["up_to_date"]
