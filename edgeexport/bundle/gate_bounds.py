"""The loosest gates that a bundle's golden vectors are judged by, whatever its manifest says.

A manifest is written by whoever made the bundle, and a gate of 1e300 passes everything. A bundle may ask for tighter
gates than the ladder has for its scheme, never for looser ones.
"""

from __future__ import annotations

import re

import numpy as np

from edgeexport.bundle.manifest import Component, Gates, Manifest
from edgeexport.core import Array
from edgeexport.parity.gates import EXACT_MAX_ABS, REFERENCE_KL
from edgeexport.parity.gates import kind as kind_of

MULTIPLIED = ("linear", "encoder")


def bounded(manifest: Manifest) -> Gates:
    """The manifest's gates, none looser than the ladder's own for the scheme; of `max_abs` where logits are float32,
    and else see `bounded_max_abs`."""
    asked = manifest.golden.gates
    decoder = manifest.component("decoder")
    if decoder is None:
        return asked
    kl = None if asked.kl is None else min(asked.kl, REFERENCE_KL[_grade(manifest, decoder)])
    most = asked.max_abs
    if most is not None and _kind(decoder) == "float":
        most = min(most, 2 * EXACT_MAX_ABS)
    return Gates(max_abs=most, kl=kl)


def bounded_max_abs(gate: float, logits: Array) -> float:
    """A gate of `max_abs` that says something of logits [N,V]: half of their range at most. Rounding of activations
    moves them by what was measured where the bundle was built; beyond half of the range every artifact passes."""
    finite = logits[np.isfinite(logits)]
    spread = float(finite.max() - finite.min()) if finite.size else 0.0
    return min(gate, spread / 2)


def _formats(decoder: Component) -> list[tuple[str, str]]:
    return [(each.tensor_class, each.format) for each in decoder.weights]


def _bits(name: str) -> int:
    """Bits of an integer format (int4-b32, palette4, float8-channel), 0 of another, as their names tell."""
    found = re.match(r"(?:int|palette|float)(4|8)", name)
    return int(found[1]) if found else 0


def _kind(decoder: Component) -> str:
    """As the ladder's own, from what the manifest tells of the weights and the cache."""
    formats = _formats(decoder)
    bits = [_bits(name) for kind, name in formats if kind in MULTIPLIED and _bits(name)]
    bits = bits or [_bits(name) for _, name in formats if _bits(name)]
    halves = any(name == "fp16" for _, name in formats) or (decoder.kv is not None and decoder.kv.dtype == "float16")
    return kind_of(min(bits, default=16 if halves else 32))


def _grade(manifest: Manifest, decoder: Component) -> str:
    kind = _kind(decoder)
    if kind != "int4":
        return kind
    provenance = manifest.calibration.provenance if manifest.calibration is not None else "rounded"
    packed = [name for group, name in _formats(decoder) if group in MULTIPLIED and _bits(name) == 4]
    narrow = all(re.match(r"int4-b(16|32)\b", name) for name in packed)
    return f"{kind} {provenance}{'' if narrow or provenance != 'gptq' else ' wide'}"
