"""The real SmolLM2-135M as `.tflite`: the whole ladder, and LiteRT-LM's own engine answering from our file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeexport import open_bundle, targets
from edgeexport.cli_edge import execute
from edgeexport.parity.examples import TEXTS

pytestmark = pytest.mark.real

MODEL = "smollm2-135m"
TOKENS = 16


@pytest.fixture(scope="module", params=["fp32", "int4-b32"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for Android that has passed every level, with the file for LiteRT-LM's engine in it."""
    out = tmp_path_factory.mktemp(str(request.param))
    source = targets.load("android-tflite").source.replace("litertlm = false", "litertlm = true")
    (out / "android-tflite.toml").write_text(source)
    command = ["build", MODEL, "--target", str(out / "android-tflite.toml"), "--quant", str(request.param)]
    assert execute([*command, "--context", "512", "-o", str(out)]) == 0
    return out / f"{MODEL}-android-tflite"


def test_it_passes_every_level(bundle: Path) -> None:
    report = json.loads((bundle / "parity.json").read_text())
    rows = {(row["level"], row["output"]): row for row in report["results"]}
    assert {row["verdict"] for row in rows.values()} == {"PASS"}
    name = "logits" if "fp32" in bundle.parts[-2] else "logits, float32 activations"
    assert rows["L4", name]["metrics"]["max_abs"] <= 1e-4
    if "fp32" in bundle.parts[-2]:
        assert rows["L5", "tokens, against transformers"]["metrics"]["top1"] == 1
    graphs_and_tables = (bundle / "decoder.tflite").stat().st_size - report["sizes"]["ideal_bytes"]
    assert 0 < graphs_and_tables < 3_100_000  # a row of int8 has 4 bytes of scale, and of zero points up to 8


def test_litert_lm_answers_from_the_package_with_the_same_tokens(bundle: Path) -> None:
    script = """
import json, sys
from litert_lm import Backend, Engine
engine = Engine(sys.argv[1], backend=Backend.CPU(thread_count=2), cache_dir=sys.argv[2])
answers = []
for text in json.loads(sys.argv[3]):
    session = engine.create_session(apply_prompt_template=False, max_output_tokens=int(sys.argv[4]))
    session.run_prefill([text])
    answers.append(session.run_decode().texts[0])
    session.close()
print("answers " + json.dumps(answers))
"""
    texts = TEXTS[:3]
    cache = bundle.parent / "engine"
    cache.mkdir()
    arguments = [str(bundle / "decoder.litertlm"), str(cache), json.dumps(texts), str(TOKENS)]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("answers ")] or [done.stderr[-2000:]]
    answers = json.loads(line.removeprefix("answers "))
    opened = open_bundle(bundle)
    tokenizer = opened.tokenizer()
    with opened.session() as session:
        for text, answer in zip(texts, answers, strict=True):
            assert tokenizer.decode(greedy(session, list(tokenizer.encode(text)))) == answer


def greedy(session: Any, tokens: list[int]) -> list[int]:
    """The likeliest tokens after these."""
    session.reset()
    logits, chosen = session.prefill(np.array(tokens)), []
    for _ in range(TOKENS):
        chosen.append(int(np.argmax(logits)))
        logits = session.decode(chosen[-1])
    return chosen
