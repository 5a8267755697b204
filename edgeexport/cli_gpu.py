"""Parity and speed on an NVIDIA GPU: PyTorch's model in a dtype, and a bundle's engines, over its golden text."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from edgeexport import errors
from edgeexport.backends import tensorrt, tensorrt_device, tensorrt_engine
from edgeexport.backends.tensorrt_device import Step
from edgeexport.bundle import open_bundle
from edgeexport.bundle.bundle import Bundle
from edgeexport.core import Array

if TYPE_CHECKING:
    from edgeexport.core import OracleModel

Dtype = Literal["float32", "float16", "bfloat16"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
Rows = Callable[[str, int, int], Array]


def parity(folder: Path, model: str, dtype: Dtype) -> dict[str, Any]:
    """How far PyTorch on the GPU, and the bundle's engine if it has one, are from PyTorch in float32 on the CPU.

    The difference is in nats (`kl`), with the share of steps at which both prefer one token (`top1`). These are
    figures; the gates are `edgeexport parity --import`'s.

    Raises: ToolError `no-gpu`, `missing-package`; BundleError `bundle-of-another-model`, `golden-unusable`.
    """
    from edgeexport import shipping
    from edgeexport.checkpoint import WeightReader

    gpu = _gpu()
    job = shipping.job_of_bundle(folder, model, "L5")
    golden = _golden(folder)
    with WeightReader() as reader:

        def rows(name: str, start: int, stop: int) -> Array:
            return reader.rows(job.checkpoint.tensors[name], start, stop)

        step = torch_step(job.family.oracle(job.checkpoint.config), rows, "cuda", dtype)
    found = [compared(f"PyTorch in {dtype}", step, golden)]
    if (engine := engine_of(open_bundle(folder))) is not None:
        found.append(compared("engine", engine, golden))
    return {"gpu": gpu, "against": "PyTorch in float32 on the CPU", "rows": found}


def bench(folder: Path, prompt_tokens: int, decode_tokens: int) -> dict[str, Any]:
    """Tokens per second of a bundle's engine on the GPU, tokens going in and logits coming out through the CPU.

    Raises: ToolError `no-gpu`, where the bundle has no engine too, `missing-package`; UsageError `context-full`.
    """
    gpu, bundle = _gpu(), open_bundle(folder)
    step = engine_of(bundle)
    if step is None:
        raise errors.no_gpu(f"{folder} has no engine", "build it for rtx-trt, or leave --device out")
    kv = bundle.component("decoder").kv
    if kv is not None and prompt_tokens + decode_tokens > kv.context:
        raise errors.context_full(0, prompt_tokens + decode_tokens, kv.context)
    return {"gpu": gpu, "target": bundle.manifest.target.name, **timed(step, prompt_tokens, decode_tokens)}


def timed(step: Step, prompt_tokens: int, decode_tokens: int) -> dict[str, float]:
    """A prompt's and single tokens' speed, the first call of each kind left out: it may prepare kernels."""
    tokens = np.arange(prompt_tokens + decode_tokens, dtype=np.int64) % 97
    step(tokens[:prompt_tokens], 0)
    step(tokens[prompt_tokens : prompt_tokens + 1], prompt_tokens)
    start = time.perf_counter()
    step(tokens[:prompt_tokens], 0)
    prefill = time.perf_counter() - start
    taken = []
    for position in range(prompt_tokens, prompt_tokens + decode_tokens):
        start = time.perf_counter()
        step(tokens[position : position + 1], position)
        taken.append(time.perf_counter() - start)
    return {
        "prefill_tokens_per_second": prompt_tokens / prefill,
        "decode_tokens_per_second": decode_tokens / sum(taken),
        "decode_median_seconds": statistics.median(taken),
    }


def torch_step(oracle: OracleModel, rows: Rows, device: str, dtype: Dtype) -> Step:
    """The unmodified model on a device with its weights, float32 rows [stop - start, ..] of a name, in `dtype`. It has
    no cache: each call reads the whole text anew."""
    import torch

    place, kind = torch.device(device), getattr(torch, dtype)
    model = oracle.model
    known: dict[int, str] = {}
    made: dict[str, Any] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        known.setdefault(id(tensor), name)  # a tied weight has one name: the first

    def held(tensor: Any) -> Any:
        name = known[id(tensor)]
        if name not in made:
            values = rows(name, 0, tensor.shape[0] if tensor.shape else 1)
            made[name] = torch.from_numpy(values).reshape(tensor.shape).to(place, kind)
        return made[name]

    for module in model.modules():
        for key, tensor in module._parameters.items():
            if tensor is not None:
                module._parameters[key] = torch.nn.Parameter(held(tensor), requires_grad=False)
        for key, tensor in module._buffers.items():
            if tensor is not None:
                if not tensor.is_meta:
                    module._buffers[key] = tensor.to(place)
                elif tensor.dtype.is_floating_point:  # others count what only training counts
                    module._buffers[key] = held(tensor)
    text: list[int] = []

    def step(tokens: Array, position: int) -> Array:
        del text[position:]
        text.extend(tokens.tolist())
        with torch.no_grad():
            given = model(torch.tensor([text], device=place), use_cache=False)
        logits = given if isinstance(given, torch.Tensor) else given.logits
        last: Array = logits[0, -1].float().cpu().numpy()
        return last

    return step


def engine_of(bundle: Bundle) -> Step | None:
    """The engines of a bundle on the GPU; None where it has none that TensorRT-RTX runs.

    Raises: ToolError `missing-package`, `no-gpu` in CUDA's words.
    """
    if bundle.component("decoder").backend != tensorrt.NAME:
        return None
    try:
        return tensorrt_device.engine_step(tensorrt_engine.load(tensorrt.MODULE), bundle.path, bundle.path)
    except tensorrt_engine.EngineError as problem:
        raise errors.missing_package(tensorrt.PACKAGES[0], "tensorrt") from problem
    except OSError as problem:
        raise errors.no_gpu(
            str(problem), "take a GPU of a compute capability that the engine was built for"
        ) from problem


def compared(what: str, step: Step, golden: Mapping[str, Array]) -> dict[str, Any]:
    """One row: what the golden text's logits are from those of the original model."""
    *_, row = tensorrt_device.measure(step, golden)
    return {"what": what, **row["metrics"]}


def _golden(folder: Path) -> dict[str, Array]:
    path = folder / tensorrt_device.GOLDEN
    open_bundle(folder).check(tensorrt_device.GOLDEN)
    try:
        found = tensorrt_device.read_golden(path)
        return {name: found[name] for name in ("tokens", "prefill", "reference_logits")}
    except (ValueError, KeyError, json.JSONDecodeError) as problem:
        raise errors.golden_unusable(path, str(problem)) from problem


def _gpu() -> str:
    """The GPU's name. Raises: ToolError `no-gpu`."""
    try:
        import torch
    except ImportError as problem:
        raise errors.missing_package("torch", "build") from problem
    if not torch.cuda.is_available():
        raise errors.no_gpu(f"PyTorch {torch.__version__} finds none", "leave --device out, or go where a GPU is")
    return str(torch.cuda.get_device_name())
