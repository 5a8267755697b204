"""Parity and speed on an NVIDIA GPU: what the device is not needed for is tested on the CPU, the rest where one is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from graphs import TOKENS, oracle, reference_logits, write_checkpoint

from edgeexport import build, cli_gpu, families
from edgeexport.backends.tensorrt_device import Step
from edgeexport.checkpoint import WeightReader, open_checkpoint
from edgeexport.cli_edge import execute
from edgeexport.core import Array

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no NVIDIA GPU")


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    return build(str(checkpoint), "host-ort", checkpoint.parent / "out", quant="fp32", context=96).bundle


def row(checkpoint: Path, bundle: Path, device: str, dtype: cli_gpu.Dtype) -> dict[str, float]:
    return cli_gpu.compared(dtype, torch_step(checkpoint, "llama", device, dtype), cli_gpu._golden(bundle))


def torch_step(checkpoint: Path, family: str, device: str, dtype: cli_gpu.Dtype) -> Step:
    opened = open_checkpoint(checkpoint)
    with WeightReader() as reader:

        def rows(name: str, start: int, stop: int) -> Array:
            return reader.rows(opened.tensors[name], start, stop)

        return cli_gpu.torch_step(families.find(family).oracle(opened.config), rows, device, dtype)


@pytest.mark.parametrize("family", ["llama", "glm4v", "autoglm_phone"])
def test_what_is_run_on_a_device_is_the_original_model(family: str, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / family, families.find(family).tiny)
    step = torch_step(checkpoint, family, "cpu", "float32")
    wanted = reference_logits(oracle(checkpoint), TOKENS[:12])
    for start, stop in ((0, 7), (7, 11), (11, 12), (4, 9)):
        np.testing.assert_allclose(step(TOKENS[start:stop], start), wanted[stop - 1], atol=1e-4)


def test_a_narrower_dtype_is_further_from_the_original(checkpoint: Path, bundle: Path) -> None:
    found = {dtype: row(checkpoint, bundle, "cpu", dtype) for dtype in cli_gpu.DTYPES}
    kl = {dtype: each["kl"] for dtype, each in found.items()}
    assert kl["float32"] < 1e-9 < kl["float16"] < kl["bfloat16"] < 0.01
    assert found["float32"]["top1"] == 1.0


def test_speed_leaves_the_first_calls_out() -> None:
    calls: list[tuple[int, int]] = []

    def step(tokens: Array, position: int) -> Array:
        calls.append((len(tokens), position))
        return np.zeros(3)

    told = cli_gpu.timed(step, 5, 3)
    assert calls == [(5, 0), (1, 5), (5, 0), (1, 5), (1, 6), (1, 7)]
    assert told["decode_tokens_per_second"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["parity", "bench"])
def test_without_a_gpu_it_says_so(
    command: str, checkpoint: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = [str(checkpoint)] if command == "parity" else []
    assert execute([command, str(bundle), *model, "--device", "cuda", "--json"]) == 7
    assert json.loads(capsys.readouterr().out)["findings"][0]["code"] == "no-gpu"


@pytest.mark.parametrize("line", [["--dtype", "float16"], ["--device", "cuda"], ["--device", "cuda", "--import", "x"]])
def test_options_that_belong_together(line: list[str], bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["model"] if line[0] == "--dtype" else []
    assert execute(["parity", str(bundle), *model, *line]) == 2
    assert "bad-command-line" in capsys.readouterr().err


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", cli_gpu.DTYPES)
def test_the_model_on_the_gpu(
    dtype: cli_gpu.Dtype, checkpoint: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["parity", str(bundle), str(checkpoint), "--device", "cuda", "--dtype", dtype, "--json"]
    assert execute(line) == 0
    (told,) = json.loads(capsys.readouterr().out)["rows"]
    assert told["kl"] < 0.01
