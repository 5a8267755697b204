"""Builds TensorRT engines from an ONNX graph: parses it, repairs its attention, refuses what is wrong, writes a stream.

Needs Python and TensorRT, or TensorRT-RTX, and nothing else: a kit holds a copy of this very file for the device. What
is to be built is a build plan (JSON): see `build`.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

MODULES = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")
"""Where the API may come from, first choice first. All three offer the same one."""
APART = 75
"""The one compute capability that shares no file with others: newer ones have another instruction set."""
READ_BYTES = 1 << 20
MADV_DONTNEED = 4


class EngineError(Exception):
    """Why there is no engine: one sentence."""


def load(wanted: str = "") -> Any:
    """TensorRT where it and a GPU are present, else TensorRT-RTX, which builds ahead of time; or the one `wanted`.

    Raises: EngineError.
    """
    for name in (wanted,) if wanted else MODULES:
        if name == "tensorrt" and not wanted and not has_gpu():
            continue  # it measures its kernels while it builds
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise EngineError(f"none of {', '.join((wanted,) if wanted else MODULES)} can be imported")


def has_gpu() -> bool:
    """Whether the system has a device of NVIDIA's driver: a card's, or a Jetson's."""
    return any(Path(path).exists() for path in ("/dev/nvidia0", "/dev/nvhost-gpu", "/dev/nvgpu"))


def groups(capabilities: Sequence[int]) -> list[list[int]]:
    """Compute capabilities by the file they share."""
    together = [number for number in capabilities if number != APART]
    return [group for group in (together, [APART] if APART in capabilities else []) if group]


def build(
    trt: Any, graph: Path, engine: Path, plan: Mapping[str, Any], capabilities: Sequence[int] = (),
    timing_cache: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write `engine` from the ONNX file `graph`, whose weights lie beside it; returns what the network says of itself.

    `plan` has `profile` (for each input of a free size, its least, usual and largest shape), `lengths` (`fed` and
    `position`: the inputs that tell how much of the cache is in use; null without a cache) and `state` (pairs of cache
    input and output). `capabilities` are those of TensorRT-RTX; TensorRT itself builds for the GPU that is present.

    Raises: EngineError.
    """
    log = _log(trt)
    builder = trt.Builder(log)
    if builder is None:
        raise EngineError("TensorRT gives no builder: no GPU, or a driver that does not match")
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        problems = [str(parser.get_error(k).desc()) for k in range(parser.num_errors)]
        raise EngineError("; ".join(problems or log.problems) or "the parser gives no reason")
    repair(trt, network, plan["lengths"])
    if wrong := [*lint(trt, network, plan)]:
        raise EngineError("; ".join(wrong))
    config = _config(trt, builder, network, plan, capabilities)
    cache = _attach_timing_cache(config, timing_cache)
    if plan["weights"] and hasattr(trt, "IProgressMonitor"):
        config.progress_monitor = _monitor(trt, graph.with_name(plan["weights"]))
    if not _write(trt, builder, network, config, engine):
        engine.unlink(missing_ok=True)
        raise EngineError("; ".join(log.problems[-3:]) or "the builder gives no reason")
    if cache is not None and timing_cache is not None:
        timing_cache.write_bytes(bytes(config.get_timing_cache().serialize()))
    return description(trt, network, plan, capabilities)


def repair(trt: Any, network: Any, lengths: Mapping[str, str] | None) -> int:
    """Give every causal attention the lengths that the parser drops, and the alignment that goes with them.

    The parser makes `is_causal` UPPER_LEFT and forgets `nonpad_kv_seqlen`: a decode step would see the first key
    alone. A token's own key is the last of `position + T`: LOWER_RIGHT. Returns how many were repaired.
    """
    layers = list(_attentions(trt, network))
    if not layers or lengths is None:
        return 0
    inputs = {network.get_input(k).name: network.get_input(k) for k in range(network.num_inputs)}
    shape = network.add_shape(inputs[lengths["fed"]]).get_output(0)
    tokens = network.add_slice(shape, (1,), (1,), (1,)).get_output(0)
    total = network.add_elementwise(inputs[lengths["position"]], tokens, trt.ElementWiseOperation.SUM).get_output(0)
    used = network.add_cast(total, trt.DataType.INT32).get_output(0)
    for attention in layers:
        attention.causal_kind = trt.CausalMaskKind.LOWER_RIGHT
        attention.key_value_lengths = used
    return len(layers)


def lint(trt: Any, network: Any, plan: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a parsed network that the builder would take without a word."""
    has_cache = bool(plan["state"])
    for attention in _attentions(trt, network):
        if attention.mask is not None:
            continue
        bounded = attention.key_value_lengths is not None
        if attention.causal_kind == trt.CausalMaskKind.UPPER_LEFT:
            yield "an attention is causal from the upper left: a token at T=1 would see the first key alone"
        elif has_cache and not (bounded and attention.causal_kind == trt.CausalMaskKind.LOWER_RIGHT):
            yield "an attention over a cache has neither the lengths in use nor a mask: it would see empty slots"
    inputs = {network.get_input(k).name for k in range(network.num_inputs)}
    outputs = {network.get_output(k).name for k in range(network.num_outputs)}
    for past, present in plan["state"]:
        if past not in inputs or present not in outputs:
            yield f"the cache {past} is no input whose update {present} is an output"


def description(
    trt: Any, network: Any, plan: Mapping[str, Any], capabilities: Sequence[int]
) -> dict[str, Any]:  # fmt: skip
    """What the network says of itself, JSON-able. A free size is a list: its least, usual and largest value."""
    profile = plan["profile"]
    inputs = [network.get_input(k) for k in range(network.num_inputs)]
    outputs = [network.get_output(k) for k in range(network.num_outputs)]

    def tensor(value: Any) -> dict[str, Any]:
        shape = [int(size) for size in value.shape]
        if value.name in profile:
            bounds = zip(*profile[value.name], strict=True)
            shape = [list(bound) if size == -1 else size for size, bound in zip(shape, bounds, strict=True)]  # type: ignore[misc]
        return {"name": value.name, "dtype": str(value.dtype).rpartition(".")[2].lower(), "shape": shape}

    return {
        "runtime": trt.__name__.removesuffix("_bindings"),
        "version": trt.__version__,
        "compute_capabilities": [f"{number // 10}.{number % 10}" for number in capabilities],
        "inputs": [tensor(value) for value in inputs],
        "outputs": [tensor(value) for value in outputs],
        "aliases": [list(pair) for pair in plan["state"]],
    }


def digest(plan: Mapping[str, Any], *files: Path) -> str:
    """sha256 over a build plan and the graph and weight files it is about: one of the three keys of an engine."""
    state = hashlib.sha256(json.dumps(plan, sort_keys=True).encode())
    for path in files:
        with path.open("rb") as file:
            while block := file.read(READ_BYTES):
                state.update(block)
    return state.hexdigest()


def _attentions(trt: Any, network: Any) -> Iterator[Any]:
    """Every attention of the network, as its boundary layer gives it; none where this version has none."""
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    for k in range(network.num_layers):
        layer = network.get_layer(k)
        if kind is not None and layer.type == kind:
            layer.__class__ = trt.IAttentionInputLayer
            yield layer.attention


def _config(
    trt: Any, builder: Any, network: Any, plan: Mapping[str, Any], capabilities: Sequence[int]
) -> Any:  # fmt: skip
    config = builder.create_builder_config()
    if plan["profile"]:
        profile = builder.create_optimization_profile()
        for name, shapes in plan["profile"].items():
            profile.set_shape(name, *map(tuple, shapes))
        config.add_optimization_profile(profile)
    if capabilities:
        if not hasattr(trt, "ComputeCapability"):
            raise EngineError("compute capabilities can be chosen for TensorRT-RTX alone")
        known = trt.ComputeCapability.__members__
        unknown = [number for number in capabilities if f"SM{number}" not in known]
        if unknown:
            raise EngineError(f"TensorRT-RTX {trt.__version__} knows no compute capability {unknown[0]}")
        config.num_compute_capabilities = len(capabilities)
        for k, number in enumerate(capabilities):
            config.set_compute_capability(known[f"SM{number}"], k)
    return config


def _attach_timing_cache(config: Any, path: Path | None) -> Any:
    """Kernels' times of earlier builds, where this API keeps them."""
    if path is None or not hasattr(config, "create_timing_cache"):
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    config.set_timing_cache(cache, ignore_mismatch=True)
    return cache


def _write(trt: Any, builder: Any, network: Any, config: Any, engine: Path) -> bool:
    """Write the engine as it is made, where this version can; else from memory."""
    with engine.open("wb") as file:
        if not hasattr(builder, "build_serialized_network_to_stream"):
            made = builder.build_serialized_network(network, config)
            if made is None:
                return False
            file.write(made)
            return True

        class Stream(trt.IStreamWriter):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.IStreamWriter.__init__(self)

            def write(self, data: bytes) -> int:
                return file.write(data)

        return bool(builder.build_serialized_network_to_stream(network, config, Stream()))


def _monitor(trt: Any, weights: Path) -> Any:
    """Lets go of the pages of the weights' file after each phase: a builder maps the file, copies what it needs, and
    keeps all of it resident. A page that is read again comes back from the file."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            pass

        def step_complete(self, name: str, step: int) -> bool:
            return True

        def phase_finish(self, name: str) -> None:
            release(weights)

    return Monitor()


def release(file: Path) -> int:
    """Let go of the resident pages of every read-only mapping of a file; returns the bytes mapped. Linux; elsewhere
    nothing happens."""
    maps, name, found = Path("/proc/self/maps"), str(file.resolve()), 0
    for line in maps.read_text().splitlines() if maps.exists() else []:
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] == name and fields[1].startswith("r--"):
            start, stop = (int(number, 16) for number in fields[0].split("-"))
            found += stop - start
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), MADV_DONTNEED)
    return found


def _log(trt: Any) -> Any:
    """A logger that keeps errors and drops the rest."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.problems: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.problems.append(message)

    return Log()


def build_all(
    trt: Any, file: Path, out: Path, cache: Path | None = None, timing_cache: Path | None = None
) -> list[Path]:
    """Every engine of a build plan in the folder `out`, each with a JSON file of what its network says of itself.

    With a `cache` folder, an engine that this GPU and this TensorRT have built of the same graph and weights is taken
    from there. Raises: EngineError, OSError.
    """
    out.mkdir(parents=True, exist_ok=True)
    made = []
    for plan in json.loads(file.read_text())["graphs"]:
        graph = file.parent / plan["graph"]
        sources = [graph, *([file.parent / plan["weights"]] if plan["weights"] else [])]
        for one in plan["engines"]:
            engine = out / one["file"]
            described = engine.with_name(f"{engine.name}.json")
            kept = cache / cache_key(trt, plan, one["capabilities"], sources) if cache is not None else None
            if kept is not None and kept.with_suffix(".json").exists():
                shutil.copyfile(kept.with_suffix(".engine"), engine)
                shutil.copyfile(kept.with_suffix(".json"), described)
            else:
                network = build(trt, graph, engine, plan, one["capabilities"], timing_cache)
                told = {**network, "graph": plan["graph"]}
                described.write_text(json.dumps(told, indent=1, sort_keys=True) + "\n")
                if kept is not None:
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(engine, kept.with_suffix(".engine"))
                    shutil.copyfile(described, kept.with_suffix(".json"))  # last: it says that the engine is whole
            made.append(engine)
    return made


def cache_key(trt: Any, plan: Mapping[str, Any], capabilities: Sequence[int], sources: Sequence[Path]) -> str:
    """What an engine depends on: the GPU, TensorRT's version, and the graph with its weights and plan."""
    parts = [gpu_name(), trt.__name__, trt.__version__, list(capabilities), digest(plan, *sources)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def gpu_name() -> str:
    """The Jetson's model, or the first card's; empty where there is neither."""
    for pattern in ("device-tree/model", "driver/nvidia/gpus/*/information"):
        for path in sorted(Path("/proc").glob(pattern)):
            text = path.read_bytes().decode("utf-8", "replace").strip("\0\n ")
            model = next((line.partition(":")[2] for line in text.splitlines() if line.startswith("Model:")), text)
            return model.strip()
    return ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Build what plans say: an engine for each of their graphs and groups of capabilities."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plans", type=Path, nargs="*", help="build plans; those of this folder by default")
    parser.add_argument("--out", type=Path, help="the folder of the engines; beside each plan by default")
    parser.add_argument("--module", default="", help="the Python module to build with")
    parser.add_argument("--cache", type=Path, help="keep engines here, by GPU, version and graph")
    parser.add_argument("--timing-cache", type=Path, help="kernels' times, read and written")
    given = parser.parse_args(arguments)
    try:
        trt = load(given.module)
        for plan in given.plans or sorted(Path().glob("*.build_plan.json")):
            build_all(trt, plan, given.out or plan.parent, given.cache, given.timing_cache)
    except EngineError as problem:
        sys.exit(str(problem))
    except OSError as problem:
        sys.exit(f"{problem.strerror or problem}: {problem.filename or Path.cwd()}")


if __name__ == "__main__":
    main()
