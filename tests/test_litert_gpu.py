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

COMPONENTS = [
    *((name, "decoder", scheme) for name in ("llama", "glm4") for scheme in ("fp32", "int8", "int4")),
    *(("glm4v", component, scheme) for component in ("decoder", "embed") for scheme in ("fp32", "int8")),
    *(("autoglm_phone", component, "fp32") for component in ("audio", "embed", "fusion", "decoder")),
]

SCRIPT = """
import json, sys
import numpy as np
from ai_edge_litert.compiled_model import CompiledModel
from ai_edge_litert.hardware_accelerator import HardwareAccelerator
from ai_edge_litert.options import Options

def outputs_of(processor):
    model = CompiledModel.from_file(sys.argv[1], options=Options(hardware_accelerators=processor))
    signature = list(model.get_signature_list())[0]
    inputs, outputs = model.get_input_tensor_details(signature), model.get_output_tensor_details(signature)
    given = {name: model.create_input_buffer_by_name(signature, name) for name in inputs}
    made = {name: model.create_output_buffer_by_name(signature, name) for name in outputs}
    rng = np.random.default_rng(0)
    for name, each in inputs.items():
        whole = np.dtype(each["dtype"]) == np.int32
        values = np.full(each["shape"], 5) if whole else rng.standard_normal(each["shape"])
        given[name].write(values.astype(each["dtype"]))
    model.run_by_name(signature, given, made)
    sizes = {name: int(np.prod(each["shape"])) for name, each in outputs.items()}
    return {name: made[name].read(size, np.float32) for name, size in sizes.items()}, bool(model.is_fully_accelerated())

want, _ = outputs_of(HardwareAccelerator.CPU)
got, whole = outputs_of(HardwareAccelerator.GPU)
error = max(float(np.abs(want[name] - got[name]).max() / np.abs(want[name]).max()) for name in want)
print("found " + json.dumps({"whole": whole, "error": error, "outputs": len(want)}))
"""


@pytest.mark.parametrize(("name", "component", "scheme"), COMPONENTS)
def test_the_delegate_takes_the_whole_component(
    name: str, component: str, scheme: str, zoo: Zoo, tmp_path: Path
) -> None:
    found = zoo.traced(name)
    artifact = compiled(
        found.variants(component), planned(found, scheme, component), tmp_path, gpu=True, windows=False, features=8
    )
    folder = Path(SWIFTSHADER)
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(folder),
        "VK_ICD_FILENAMES": str(folder / "vk_swiftshader_icd.json"),
    }
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / artifact.files[0])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("found ")] or [done.stderr[-2000:]]
    seen = json.loads(line.removeprefix("found "))
    assert seen["whole"]
    assert seen["outputs"] == len(artifact.signatures[0].outputs)
    # the processor rounds activations to int8, the delegate does not
    assert seen["error"] <= (1e-5 if scheme == "fp32" else 0.05)
