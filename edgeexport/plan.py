"""What a build would make, need and run at, from headers alone: no weight is read and torch is not imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from edgeexport import errors
from edgeexport.core import BITS, Checkpoint, Finding, Geometry, QuantPlan, Target, Traits
from edgeexport.errors import EdgeExportError
from edgeexport.quant.budget import Budget, Choice, read
from edgeexport.quant.calibration import GROUP, TOKENS, default_method
from edgeexport.quant.schemes import AUTO
from edgeexport.quant.search import takes

T = TypeVar("T")
PLAIN = Traits()

IMPORT_BYTES = 375 << 20
"""Resident memory of a Python 3.11 process with torch 2.13, transformers 5.23, onnx-ir, onnxscript and onnxruntime
1.31 loaded, before any work: getrusage's ru_maxrss on Linux x86-64."""
STREAM_BYTES = 128 << 20
"""Buffers through which weights stream to the artifact, two threads at work, and the graph without its weights."""
LAYERS_BYTES = 512 << 20
"""What L2 holds of weights and activations at most: it multiplies by larger ones in row chunks. With the two above
that is 1,015 MiB, where building autoglm-phone-9b up to L3 took 990."""
IMPORT_SECONDS = 8.0
"""Loading those packages (5 s) and tracing one layer of each kind (3 s), on 2 cores of the same machine."""
WEIGHTS_PER_SECOND = 200e6
"""Weights hashed, read, quantised and written in a second on 2 cores: 1.1B parameters took 5.4 s beyond the above."""
PRODUCTS_PER_SECOND = 100e9
SEARCHED_PER_SECOND = 8e6
FACTORED_PER_SECOND = 50e9
CHOSEN_PER_SECOND = 80e9
"""Of a calibration, on one core: operations of the pass through the model and of the products of its inputs; weights
whose scales are searched; operations of the factorisation, and of GPTQ's columns. Measured at the widths of
autoglm-phone-9b."""
CALIBRATION_FORMULA = (
    "8,192 tokens through each layer and the search of all scales; GPTQ: the products of each input's channels, their "
    "factorisation and each column's errors; what is searched at once, a group's activations and, for GPTQ, the "
    "products"
)
CHOSEN_BYTES = 768 << 20
"""What a calibration holds of weights, integers and rows at once, at most: of a 9B-shaped model 1.97 GB were seen by
search, and 3.51 GB by GPTQ, all told."""
GRAPH_SHARE = 0.01
"""Of an artifact, kept free of weights for its graph where its bytes are a budget: 0.2 to 0.8 % of SmolLM2-135M's."""
RUNTIME_BYTES = 64 << 20
"""What a process needs besides weights and cache: ONNX Runtime loaded (43 MiB resident, measured as above) and the
activations of one token."""

MEMORY_FORMULA = (
    "imports 375 MiB + buffers 128 MiB; up to L3 also 2 layers in float32, at most 512 MiB; with the whole ladder, "
    "if that is more, twice artifact + KV cache (ONNX Runtime packs the weights anew) and the float32 weights that a "
    "backend's host runner holds (Core ML: at most 1 GiB, MNN and TensorRT: all); where a compiler is "
    "a process of its own (TensorRT: 2.5 times the artifact), that is added while it runs"
)
TIME_FORMULA = "imports and tracing 8 s + weights / 200 million per second, without the ladder"


@dataclass(frozen=True)
class Asked:
    """What a user asks of the formats: a scheme's name, `auto` with a budget, or the path of a plan (.json)."""

    quant: str | None = None
    max_size: int | None = None
    max_kl: float | None = None
    for_device: str | None = None

    @cached_property
    def choice(self) -> Choice | None:
        """The plan that was given, if one was; its file is read once. Raises: UsageError `plan-unusable`,
        `budget-without-auto`."""
        limits = {"--max-size": self.max_size, "--max-kl": self.max_kl, "--for-device": self.for_device}
        given = next((option for option, value in limits.items() if value is not None), None)
        if given is not None and self.quant != AUTO.name:
            raise errors.budget_without_auto(given)
        return read(Path(self.quant)) if self.quant is not None and self.quant.endswith(".json") else None

    def scheme(self, target: Target) -> str:
        """The scheme's name."""
        return AUTO.name if (self.quant or "").endswith(".json") else self.quant or target.quant


def budget_of(asked: Asked, target: Target, cache_bytes: int) -> Budget:
    """What formats are chosen within, where a KV cache of so many bytes has room beside them on the device named.

    Raises: UsageError `unknown-device`."""
    size = asked.max_size
    if asked.for_device is not None:
        if asked.for_device not in target.devices:
            raise errors.unknown_device(asked.for_device, target.name, target.devices)
        device = target.devices[asked.for_device]
        room = int(device["ram_gb"] * device["usable"] * 2**30) - cache_bytes - RUNTIME_BYTES
        size = min(room, size) if size is not None else room
    return Budget(max(0, int(size * (1 - GRAPH_SHARE))) if size is not None else None, asked.max_kl)


def plan(model: str, target: str, asked: Asked | str | None = None, context: int | None = None) -> dict[str, Any]:
    """The plan as one JSON-able document. Sizes are in bytes, times in seconds.

    `findings` holds every reason why the build cannot work, and warnings; `exit_code` is what a build would end with
    for the first of them, 0 if there is none.

    Raises: EdgeExportError, of the first problem's class, when checkpoint, target, scheme or family cannot be found:
    all of them in one. CheckpointError when config.json has no usable sizes.
    """
    from edgeexport import backends, families, targets
    from edgeexport import checkpoint as checkpoints
    from edgeexport import quant as schemes
    from edgeexport.families.settled import settle

    problems = _Problems()
    found = problems.attempt(lambda: checkpoints.open_checkpoint(model))
    aim = problems.attempt(lambda: targets.load(target))
    family = problems.attempt(lambda: families.find(found.model_type)) if found else None
    opened = problems.attempt(lambda: settle(found, family)) if found and family else None
    asked = asked if isinstance(asked, Asked) else Asked(asked)
    choice = problems.attempt(lambda: asked.choice)
    name = asked.scheme(aim) if aim else asked.quant
    own = backends.load(aim.backend).TRAITS.schemes if aim else schemes.OWN_SCHEMES
    scheme = problems.attempt(lambda: schemes.find(name, own)) if name else None
    if not (opened and aim and family and scheme):
        raise problems.as_one()

    geometry = family.geometry(opened.config)
    unused = family.unused(opened)
    shapes = {
        name: (ref.shape[0], _elements(ref.shape[1:])) if name.endswith(family.kernels) else ref.shape
        for name, ref in opened.tensors.items()
        if name not in unused
    }
    encodings = {name: opened.tensors[name].encoding for name in shapes}
    traits = backends.load(aim.backend).TRAITS
    slots = problems.attempt(lambda: context_for(context, aim, geometry)) or geometry.max_context
    element = BITS[aim.precision] // 8
    limits = problems.attempt(lambda: budget_of(asked, aim, geometry.kv_bytes_per_token(element) * slots)) or Budget()
    chosen = choice.tensors if choice is not None else None
    quantised = problems.attempt(
        lambda: schemes.plan_from_names(shapes, scheme.name, geometry.tied, traits, encodings, chosen)
    )
    if quantised is None:
        raise problems.as_one()
    parts = problems.attempt(lambda: family.components(opened, slots, aim.shapes)) or []
    if refused := refused_ops(aim.backend, family.model_type, family.ops):
        problems.errors.append(errors.LoweringError(*refused))
    apart = any(part.name == "embed" for part in parts)
    sizes = sizes_of(quantised, shapes, geometry, slots, element, embed_apart=apart)
    if limits.size is not None:
        sizes = problems.attempt(lambda: within(limits, sizes, quantised, shapes, traits, encodings)) or sizes
    limit = aim.limits.get("max_file_bytes")
    if limit is not None and sizes["artifact"] > limit and not backends.load(aim.backend).TRAITS.splits:
        problems.errors.append(errors.artifact_too_large(aim.name, sizes["artifact"], limit))
    devices = device_table(aim, sizes)
    findings = [finding for error in problems.errors for finding in error.findings]
    findings += opened.remarks
    findings += schemes.findings(opened.tensors, quantised, traits)
    findings += _fit_warning(aim, devices, sizes)
    return {
        "model": _model(opened, shapes),
        "target": {"name": aim.name, "title": aim.title, "backend": aim.backend, "artifact": aim.artifact},
        "scheme": quantised.scheme,
        "budget": asdict(limits),
        "carried": carried_over(quantised, shapes),
        "context": slots,
        "components": [f"{part.name} {part.variant}".rstrip() for part in parts],
        "bytes": sizes,
        "build": build_cost(shapes, geometry, sizes, backends.load(aim.backend).TRAITS),
        "calibration": calibration_cost(quantised, shapes, geometry),
        "devices": devices,
        "findings": [asdict(finding) for finding in findings],
        "exit_code": problems.errors[0].exit_code if problems.errors else 0,
    }


def within(
    limits: Budget, sizes: Mapping[str, int], quantised: QuantPlan, shapes: Mapping[str, tuple[int, ...]],
    traits: Traits, encodings: Mapping[str, str],
) -> dict[str, int]:  # fmt: skip
    """The sizes of a model whose formats fill a budget of bytes. Raises: UsageError `budget-too-small`."""
    from edgeexport.quant.plan import options

    least = most = sizes["artifact"]
    for name, fmt in quantised.formats.items():
        ways = options(name, quantised.classes[name], shapes[name], traits, encodings.get(name))
        if ways:
            bytes_of = [each.nbytes(shapes[name]) for each in ways.values()]
            least += min(bytes_of) - fmt.nbytes(shapes[name])
            most += max(bytes_of) - fmt.nbytes(shapes[name])
    assert limits.size is not None
    if least > limits.size:
        raise errors.budget_too_small(f"{limits.size} bytes", f"the smallest formats need {least} bytes")
    more = min(limits.size, most) - sizes["artifact"]
    grown = ("artifact", "weights_read_per_token", "device_memory")
    return {name: size + more if name in grown else size for name, size in sizes.items()}


def carried_over(quantised: QuantPlan, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """How many of the matrices keep the checkpoint's own integers, and how many bits each of their weights takes with
    scales and the like; None where there are none."""
    size = sum(quantised.formats[name].nbytes(shapes[name]) for name in quantised.carried)
    weights = sum(_elements(shapes[name]) for name in quantised.carried)
    return {
        "matrices": len(quantised.carried),
        "of": sum(len(shapes[name]) == 2 for name in quantised.formats),
        "bits_per_weight": round(8 * size / weights, 3) if weights else None,
    }


def context_for(asked: int | None, target: Target, geometry: Geometry) -> int:
    """Slots of the KV cache: what was asked for, else the target's default as far as the model goes.

    Raises: UsageError `context-too-long`.
    """
    if asked is None:
        return min(target.context, geometry.max_context)
    if asked > geometry.max_context:
        raise errors.context_too_long(asked, geometry.max_context)
    return asked


def refused_ops(backend: str, model_type: str, ops: frozenset[str]) -> list[Finding]:
    """One finding per op that the family's graphs use and the backend's table refuses or does not know."""
    from edgeexport import backends

    table = backends.load(backend).OPS
    return [
        errors.op_not_lowered(backend, op, f"family {model_type}", *why)
        for op in sorted(ops)
        if (why := table.refusal(op)) is not None
    ]


def sizes_of(
    quantised: QuantPlan,
    shapes: Mapping[str, tuple[int, ...]],
    geometry: Geometry,
    context: int,
    element: int,
    *,
    embed_apart: bool = False,
) -> dict[str, int]:
    """Bytes of the artifacts, of the cache, and of what one token reads; `element` is the bytes of a cache element.

    A token reads every weight of the decoder but the embedding, of which it reads one row; a tied embedding is the
    lm_head too, and stored once more where the embedding is a component of its own.
    """
    artifact = quantised.ideal_bytes(shapes)
    of_class = {
        kind: sum(
            fmt.nbytes(shapes[name]) for name, fmt in quantised.formats.items() if quantised.classes[name] == kind
        )
        for kind in ("embedding", "encoder", "convolution")
    }
    looked_up = (
        of_class["encoder"]
        + of_class["convolution"]
        + (of_class["embedding"] if embed_apart or not geometry.tied else 0)
    )
    if embed_apart and geometry.tied:
        artifact += of_class["embedding"]
    per_token = geometry.kv_bytes_per_token(element)
    return {
        "artifact": artifact,
        "kv_cache": per_token * context,
        "kv_per_token": per_token,
        "weights_read_per_token": artifact - looked_up,
        "device_memory": artifact + per_token * context + RUNTIME_BYTES,
    }


def build_cost(
    shapes: Mapping[str, tuple[int, ...]], geometry: Geometry, sizes: Mapping[str, int], traits: Traits = PLAIN
) -> dict[str, Any]:
    """Estimated peak memory (bytes) and time (seconds) of the build, with the formulas they come from."""
    weights = sum(_elements(shape) for shape in shapes.values())
    outside = sum(_elements(shape) for shape in shapes.values() if shape and shape[0] == geometry.vocab)
    layer = 4 * (weights - outside) // geometry.layers
    own, compiler = IMPORT_BYTES + STREAM_BYTES, int(traits.compiler * sizes["artifact"])
    streamed = min(2 * layer, LAYERS_BYTES)
    compared = 2 * (sizes["artifact"] + sizes["kv_cache"]) + min(4 * weights, traits.widens)
    return {
        "memory": own + compiler,
        "memory_to_l3": own + max(compiler, streamed),
        "memory_with_ladder": own + max(compiler, streamed, compared),
        "memory_formula": MEMORY_FORMULA,
        "seconds": round(IMPORT_SECONDS + weights / WEIGHTS_PER_SECOND, 1),
        "seconds_formula": TIME_FORMULA,
    }


def calibration_cost(quantised: QuantPlan, shapes: Mapping[str, tuple[int, ...]], geometry: Geometry) -> dict[str, Any]:
    """What a calibration of the 4-bit weights is likely to take, by method: memory in bytes and seconds on two cores.
    `default` is the method if nothing is said; None where no weight needs one."""
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2 and name in quantised.formats}
    decoder = {name: shape for name, shape in matrices.items() if quantised.classes[name] == "linear"}
    chosen = {
        name: shape for name, shape in matrices.items()
        if quantised.classes[name] in ("linear", "embedding", "lm_head") and takes(quantised.formats[name])
        and name not in quantised.carried
    }  # fmt: skip
    if not chosen:
        return {"default": None}
    # q, k and v read the same values, gate and up do: one matrix of products for each
    fed = [shape[1] for name, shape in chosen.items() if name.split(".")[-2] not in ("k_proj", "v_proj", "up_proj")]
    weights = sum(map(_elements, chosen.values()))
    forward = 2.0 * TOKENS * sum(map(_elements, decoder.values()))
    products = 2.0 * TOKENS * sum(width * width for width in fed)
    factors = 4 / 3 * sum(float(width) ** 3 for width in fed)
    columns = 2.0 * sum(rows * float(width) ** 2 for rows, width in chosen.values())
    searched = forward / PRODUCTS_PER_SECOND + weights / SEARCHED_PER_SECOND
    exact = products / PRODUCTS_PER_SECOND + factors / FACTORED_PER_SECOND + columns / CHOSEN_PER_SECOND
    layer, widest = 4 * sum(map(_elements, decoder.values())) // geometry.layers, max(fed)
    held = 4 * sum(width * width for width in fed) // geometry.layers
    seen = 4 * GROUP * 6 * widest
    own = IMPORT_BYTES + STREAM_BYTES + min(2 * layer, CHOSEN_BYTES) + seen
    return {
        "default": default_method(sum(map(_elements, shapes.values()))),
        "search": {"memory": own, "seconds": round(IMPORT_SECONDS + searched / 2, 1)},
        "gptq": {
            "memory": own + held + 4 * widest * widest,
            "seconds": round(IMPORT_SECONDS + (searched + exact) / 2, 1),
        },
        "formula": CALIBRATION_FORMULA,
    }


def device_table(target: Target, sizes: Mapping[str, int]) -> list[dict[str, Any]]:
    """Per device of the target: does it fit, and the roofline in tokens per second with an empty and a full cache.

    The roofline is memory bandwidth over the bytes one token reads: no decoder at batch 1 can be faster.
    """
    if target.platform == "host":
        import psutil

        memory = psutil.virtual_memory()
        return [_device("this machine", "this machine", memory.total, memory.available, None, sizes)]
    return [
        _device(
            name,
            device["title"],
            int(device["ram_gb"] * 2**30),
            int(device["ram_gb"] * device["usable"] * 2**30),
            device["bandwidth_gbs"] * 1e9,
            sizes,
        )
        for name, device in target.devices.items()
    ]


def _device(
    name: str, title: str, ram: int, usable: int, bandwidth: float | None, sizes: Mapping[str, int]
) -> dict[str, Any]:
    weights, cache = sizes["weights_read_per_token"], sizes["kv_cache"]
    return {
        "name": name,
        "title": title,
        "ram": ram,
        "usable": usable,
        "needed": sizes["device_memory"],
        "fits": sizes["device_memory"] <= usable,
        "tokens_per_second_empty": round(bandwidth / weights, 1) if bandwidth and weights else None,
        "tokens_per_second_full": round(bandwidth / (weights + cache), 1) if bandwidth and weights else None,
    }


def _fit_warning(target: Target, devices: list[dict[str, Any]], sizes: Mapping[str, int]) -> list[Finding]:
    if not devices or any(device["fits"] for device in devices):
        return []
    largest = max(devices, key=lambda device: int(device["usable"]))
    return [errors.no_device_fits(target.name, sizes["device_memory"], largest["title"], largest["usable"])]


def _model(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    return {
        "name": checkpoint.name,
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "model_type": checkpoint.model_type,
        "parameters": sum(_elements(shape) for shape in shapes.values()),
        "bytes": sum(ref.stored_bytes for ref in checkpoint.tensors.values()),
    }


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


class _Problems:
    """Collects failures, so that one run reports them all."""

    def __init__(self) -> None:
        self.errors: list[EdgeExportError] = []

    def attempt(self, call: Callable[[], T]) -> T | None:
        """The call's value, or None with its failure kept."""
        try:
            return call()
        except EdgeExportError as error:
            self.errors.append(error)
            return None

    def as_one(self) -> EdgeExportError:
        """All failures as one exception of the first one's class."""
        return type(self.errors[0])(*(finding for error in self.errors for finding in error.findings))
