"""Describes a bundle as plain data, for people and for `--json`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from edgeexport.bundle.bundle import Bundle
from edgeexport.bundle.manifest import Component, Dim, Tensor


def describe(bundle: Bundle) -> dict[str, Any]:
    """What a bundle holds, in JSON's own types; sizes in bytes. Reads nothing but the manifest."""
    manifest = bundle.manifest
    return {
        "path": str(bundle.path),
        "schema": manifest.schema,
        "edgeexport": manifest.edgeexport,
        "build_key": manifest.build_key,
        "model": msgspec.to_builtins(manifest.model),
        "target": msgspec.to_builtins(manifest.target),
        "quantisation": manifest.quantisation,
        "bytes": sum(entry.size for entry in manifest.files.values()),
        "files": {name: entry.size for name, entry in sorted(manifest.files.items())},
        "components": [_component(bundle, component) for component in manifest.components],
        "stop_ids": list(bundle.stop_ids),
        "special_tokens": dict(manifest.text.special_tokens) if manifest.text is not None else {},
        "parity": {level: str(verdict) for level, verdict in sorted(manifest.parity.items())},
        "golden": msgspec.json.decode(msgspec.json.encode(manifest.golden)),
        "tools": dict(sorted(manifest.tools.items())),
    }


def _component(bundle: Bundle, component: Component) -> dict[str, Any]:
    files = bundle.manifest.files
    return {
        "name": component.name,
        "backend": component.backend,
        "files": list(component.files),
        "bytes": sum(files[name].size for name in component.files),
        "signatures": {
            signature.name: {
                "inputs": _tensors(signature.inputs, {past for past, _ in component.state}),
                "outputs": _tensors(signature.outputs, {present for _, present in component.state}),
            }
            for signature in component.signatures
        },
        "kv_cache": _cache(component),
        "weights": [msgspec.to_builtins(weights) for weights in component.weights],
        "weight_bytes": sum(weights.bytes for weights in component.weights),
    }


def _cache(component: Component) -> dict[str, Any] | None:
    if component.kv is None:
        return None
    per_token = component.kv.bytes_per_token
    return {
        **msgspec.to_builtins(component.kv),
        "bytes_per_token": per_token,
        "bytes_full": per_token * component.kv.context,
    }


def _tensors(tensors: Sequence[Tensor], state: set[str]) -> list[str]:
    """A line each; the caches, alike in all layers, share one."""
    lines = [_tensor(tensor) for tensor in tensors if tensor.name not in state]
    caches = [tensor for tensor in tensors if tensor.name in state]
    kinds = sorted({_tensor(tensor).partition(": ")[2] for tensor in caches})
    return (
        [*lines, f"{len(caches)} caches {caches[0].name} .. {caches[-1].name}: {', '.join(kinds)}"] if caches else lines
    )


def _tensor(tensor: Tensor) -> str:
    dims = [f"{dim.name}={dim.min}..{dim.max}" if isinstance(dim, Dim) else str(dim) for dim in tensor.shape]
    return f"{tensor.name}: {tensor.dtype} [{', '.join(dims)}]"
