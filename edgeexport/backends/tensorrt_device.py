"""Measures a bundle's engines on the device that runs them, over its golden vectors; writes a report for `--import`.

Needs Python, numpy, TensorRT and the CUDA runtime: a kit holds a copy of this very file. Polygraphy's TrtRunner could
drive caches that are updated in place (it binds an output to the input that it is an alias of), but not a graph of
primitives, which needs two buffers for each; and a Jetson has no Polygraphy.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

SCHEMA = "edgeexport.device-parity/1"
GOLDEN = "golden/text.safetensors"
CUDA = ("libcudart.so", "libcudart.so.13", "libcudart.so.12")
TO_DEVICE, FROM_DEVICE = 1, 2
"""cudaMemcpyKind."""
DTYPES = {"F32": np.float32, "I64": np.int64}
"""The dtypes of golden vectors, as safetensors calls them."""

Array = np.ndarray[Any, np.dtype[Any]]
Step = Callable[[Array, int], Array]
"""Logits [V] of the last of these token ids, int64 [T], which begin at a position."""


def measure(step: Step, golden: Mapping[str, Array]) -> list[dict[str, Any]]:
    """Rows of the report: the golden text in a prompt and single tokens, against the logits of the machine that built
    the bundle (L4) and those of the original model (L5)."""
    tokens, prompt = golden["tokens"], int(golden["prefill"][0])
    calls = [(0, prompt), *((k, k + 1) for k in range(prompt, len(tokens)))]
    logits = np.stack([step(tokens[start:stop], start) for start, stop in calls]).astype(np.float64)
    reference = golden["reference_logits"].astype(np.float64)
    rows: list[dict[str, Any]] = [{"level": "L1", "units": "GPU"}]
    if "artifact_logits" in golden:
        worst = np.abs(logits - golden["artifact_logits"]).max()
        rows.append({"level": "L4", "units": "GPU", "metrics": {"max_abs": number(worst), "steps": len(logits)}})
    wanted, found = log_softmax(reference), log_softmax(logits)
    kl = (np.exp(wanted) * (wanted - found)).sum(-1).mean()
    agree = float((logits.argmax(-1) == reference.argmax(-1)).mean())
    metrics = {"kl": number(max(kl, 0.0)), "steps": len(logits), "top1": agree}
    return [*rows, {"level": "L5", "units": "GPU", "metrics": metrics}]


def report(bundle: Path, rows: Sequence[Mapping[str, Any]], model: str, system: str) -> dict[str, Any]:
    """The document that `edgeexport parity BUNDLE --import` reads."""
    return {
        "schema": SCHEMA,
        "bundle": hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest(),
        "component": "decoder",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": {"model": model, "system": system},
        "rows": list(rows),
    }


def read_golden(path: Path) -> dict[str, Array]:
    """The arrays of a safetensors file. Raises ValueError where it is none."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    if size > len(data) - 8:
        raise ValueError(f"{path} is no safetensors file")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    return {
        name: np.frombuffer(body[slice(*held["data_offsets"])], DTYPES[held["dtype"]]).reshape(held["shape"])
        for name, held in header.items()
        if name != "__metadata__" and held["dtype"] in DTYPES
    }


def log_softmax(logits: Array) -> Array:
    """Natural logarithms of the shares, float64 [steps, V]."""
    shifted = logits - logits.max(-1, keepdims=True)
    logs: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return logs


def number(value: float) -> float | str:
    """A number, or the string that stands for one that JSON has not."""
    return float(value) if np.isfinite(value) else "NaN" if np.isnan(value) else "Infinity"


class Cuda:
    """The four calls of the CUDA runtime that an engine needs."""

    def __init__(self) -> None:
        self._library = next((found for name in CUDA if (found := _library(name)) is not None), None)
        if self._library is None:
            raise OSError(f"none of {', '.join(CUDA)} can be loaded")

    def allocate(self, size: int) -> int:
        """Device memory of zeros."""
        place = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(place), ctypes.c_size_t(size))
        self._call("cudaMemset", place, ctypes.c_int(0), ctypes.c_size_t(size))
        return int(place.value or 0)

    def copy(self, target: int, source: int, size: int, kind: int) -> None:
        """Between host and device; waits until it is done."""
        self._call("cudaMemcpy", ctypes.c_void_p(target), ctypes.c_void_p(source), ctypes.c_size_t(size), kind)

    def wait(self) -> None:
        """Until the device has done everything."""
        self._call("cudaDeviceSynchronize")

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            raise OSError(f"{name} ended with cudaError {code}")


def _library(name: str) -> Any:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


class Engine:
    """One engine with its buffers. A cache stays on the device: read from one buffer and written to the other, or in
    one, where the engine updates it in place."""

    def __init__(self, trt: Any, cuda: Cuda, path: Path, plan: Mapping[str, Any], *, in_place: bool) -> None:
        self._cuda = cuda
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise OSError(f"TensorRT does not open {path.name} on this GPU")
        self._context = self._engine.create_execution_context()
        self._numpy = {name: np.dtype(trt.nptype(self._engine.get_tensor_dtype(name))) for name in self._names()}
        self._profile, self._trt = plan["profile"], trt
        self._state = [tuple(pair) for pair in plan["state"]]
        self._places: dict[str, tuple[int, int]] = {}
        for past, present in self._state:
            size = int(np.prod(self._engine.get_tensor_shape(past))) * self._numpy[past].itemsize
            self._places[past] = (cuda.allocate(size), size)
            self._places[present] = self._places[past] if in_place else (cuda.allocate(size), size)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs that are no cache, by name."""
        for name, array in inputs.items():
            held = np.ascontiguousarray(array, self._numpy[name])
            self._context.set_input_shape(name, held.shape)
            self._cuda.copy(self._place(name, held.nbytes), held.ctypes.data, held.nbytes, TO_DEVICE)
        caches = {value for pair in self._state for value in pair}
        given = [name for name in self._names() if name not in inputs and name not in caches]
        outputs = {name: np.empty(tuple(self._context.get_tensor_shape(name)), self._numpy[name]) for name in given}
        for name, array in outputs.items():
            self._place(name, array.nbytes)
        for name in self._names():
            self._context.set_tensor_address(name, self._places[name][0])
        if not self._context.execute_async_v3(0):
            raise OSError("TensorRT did not run the engine")
        self._cuda.wait()
        for name, array in outputs.items():
            self._cuda.copy(array.ctypes.data, self._places[name][0], array.nbytes, FROM_DEVICE)
        for past, present in self._state:
            self._places[past], self._places[present] = self._places[present], self._places[past]
        return outputs

    def _names(self) -> list[str]:
        return [self._engine.get_tensor_name(k) for k in range(self._engine.num_io_tensors)]

    def _place(self, name: str, size: int) -> int:
        """Device memory for a value, at least `size` bytes; larger than before when it must be."""
        if name not in self._places or self._places[name][1] < size:
            self._places[name] = (self._cuda.allocate(size), size)
        return self._places[name][0]


def engine_step(trt: Any, bundle: Path, folder: Path) -> Step:
    """The decoder's engine, and that of its embedding where it is apart, in `folder`, as a `Step`. Long prompts go in
    pieces."""
    cuda = Cuda()
    plans = {
        name: json.loads((bundle / f"{name}.build_plan.json").read_text())["graphs"][0]
        for name in ("decoder", "embed")
        if (bundle / f"{name}.build_plan.json").exists()
    }
    engines = {
        name: Engine(trt, cuda, folder / plan["engines"][0]["file"], plan, in_place=bool(plan["in_place"]))
        for name, plan in plans.items()
    }
    fed = plans["decoder"]["lengths"]["fed"]
    most = int(plans["decoder"]["profile"][fed][2][1])

    def piece(tokens: Array, position: int) -> Array:
        ids = tokens[None]
        inputs = {"position": np.array([position], np.int64), fed: ids}
        if fed == "inputs_embeds":
            inputs[fed] = engines["embed"].run({"input_ids": ids})["inputs_embeds"]
        if "rope_positions" in plans["decoder"]["profile"]:
            rows = np.arange(position, position + len(tokens), dtype=np.int64)
            inputs["rope_positions"] = np.broadcast_to(rows, (3, 1, len(tokens)))
        return engines["decoder"].run(inputs)["logits"].reshape(-1)

    def step(tokens: Array, position: int) -> Array:
        cuts = [*range(0, len(tokens), most), len(tokens)]
        return [piece(tokens[a:b], position + a) for a, b in pairwise(cuts)][-1]

    return step


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the golden text through the engines that were built, and write what came of it."""
    import tensorrt_engine  # type: ignore[import-not-found]  # beside this file in the kit

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path(), help="the bundle's folder; this one by default")
    parser.add_argument("--engines", type=Path, default=Path(), help="the folder of the engines")
    parser.add_argument("--out", type=Path, default=Path("device-parity.json"), help="the report")
    parser.add_argument("--module", default="", help="the Python module to run with")
    given = parser.parse_args(arguments)
    try:
        trt = tensorrt_engine.load(given.module)
        rows = measure(engine_step(trt, given.bundle, given.engines), read_golden(given.bundle / GOLDEN))
        system = f"{platform.system()} {platform.release()}, {trt.__name__} {trt.__version__}"
        made = report(given.bundle, rows, tensorrt_engine.gpu_name() or platform.machine(), system)
        given.out.write_text(json.dumps(made, indent=1, sort_keys=True) + "\n")
    except (OSError, ValueError, tensorrt_engine.EngineError) as problem:
        sys.exit(str(problem))
