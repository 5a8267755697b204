"""LiteRT's GPU delegate over SwiftShader: it takes every operator of our files, and computes the same numbers.

Runs where EDGEEXPORT_SWIFTSHADER names a folder with libvulkan.so.1, libvk_swiftshader.so and vk_swiftshader_icd.json
(docs/litert.md says where they come from).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from graphs import Zoo
from test_litert import compiled, planned

SWIFTSHADER = os.environ.get("EDGEEXPORT_SWIFTSHADER", "")
pytestmark = pytest.mark.skipif(not SWIFTSHADER, reason="EDGEEXPORT_SWIFTSHADER is not set")

SCRIPT = """
import json, sys
import numpy as np
from ai_edge_litert.compiled_model import CompiledModel
from ai_edge_litert.hardware_accelerator import HardwareAccelerator
from ai_edge_litert.options import Options

def logits(processor):
    model = CompiledModel.from_file(sys.argv[1], options=Options(hardware_accelerators=processor))
    inputs, outputs = model.get_input_tensor_details("decode"), model.get_output_tensor_details("decode")
    given = {name: model.create_input_buffer_by_name("decode", name) for name in inputs}
    made = {name: model.create_output_buffer_by_name("decode", name) for name in outputs}
    for name, each in inputs.items():
        given[name].write(np.zeros(each["shape"], each["dtype"]))
    rows = []
    for position, token in enumerate([5, 9, 17, 100, 3]):
        given["tokens"].write(np.array([[token]], np.int32))
        given["input_pos"].write(np.array([position], np.int32))
        model.run_by_name("decode", given, made)
        rows.append(made["logits"].read(int(np.prod(outputs["logits"]["shape"])), np.float32))
        for name in inputs:
            if name.startswith("kv_cache"):
                given[name], made[name] = made[name], given[name]
    return np.array(rows), bool(model.is_fully_accelerated())

want, _ = logits(HardwareAccelerator.CPU)
got, whole = logits(HardwareAccelerator.GPU)
seen = {"whole": whole, "max_abs": float(np.abs(want - got).max()), "scale": float(np.abs(want).max())}
print("found " + json.dumps(seen))
"""


@pytest.mark.parametrize("scheme", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "glm4"])
def test_the_delegate_takes_the_whole_decoder(name: str, scheme: str, zoo: Zoo, tmp_path: Path) -> None:
    found = zoo.traced(name)
    compiled([found.model], planned(found, scheme, "decoder"), tmp_path, gpu=True)
    folder = Path(SWIFTSHADER)
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(folder),
        "VK_ICD_FILENAMES": str(folder / "vk_swiftshader_icd.json"),
    }
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "decoder.tflite")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("found ")] or [done.stderr[-2000:]]
    seen = json.loads(line.removeprefix("found "))
    assert seen["whole"]
    rounding = 1e-5 if scheme == "fp32" else 0.05  # the processor rounds activations to int8, the delegate does not
    assert seen["max_abs"] <= rounding * seen["scale"]
