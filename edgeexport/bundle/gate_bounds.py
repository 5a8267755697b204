"""The loosest gates that a bundle's golden vectors are judged by, whatever its manifest says.

A manifest is written by whoever made the bundle, and a gate of 1e300 passes everything. A bundle may ask for tighter
gates than the ladder has for its scheme, never for looser ones.
"""

from __future__ import annotations

import numpy as np

from edgeexport.bundle.manifest import Component, Gates, Manifest
from edgeexport.core import Array
from edgeexport.parity.gates import EXACT_MAX_ABS, REFERENCE_KL, Stored, grade_of, kind_of
from edgeexport.quant.schemes import FP16, KNOWN


def bounded(manifest: Manifest) -> Gates:
    """The manifest's gates, none looser than the ladder's own for the scheme; of `max_abs` where logits are float32,
    and else see `bounded_max_abs`."""
    asked = manifest.golden.gates
    decoder = manifest.component("decoder")
    if decoder is None:
        return asked
    weights, half = _stored(decoder), _half(decoder)
    provenance = manifest.calibration.provenance if manifest.calibration is not None else "rounded"
    kl = None if asked.kl is None else min(asked.kl, REFERENCE_KL[grade_of(weights, provenance, half=half)])
    most = asked.max_abs
    if most is not None and kind_of(weights, half=half) == "float":
        most = min(most, 2 * EXACT_MAX_ABS)
    return Gates(max_abs=most, kl=kl)


def bounded_max_abs(gate: float, logits: Array) -> float:
    """A gate of `max_abs` that says something of logits [N,V]: half of their range at most. Rounding of activations
    moves them by what was measured where the bundle was built; beyond half of the range every artifact passes."""
    finite = logits[np.isfinite(logits)]
    spread = float(finite.max() - finite.min()) if finite.size else 0.0
    return min(gate, spread / 2)


def _stored(decoder: Component) -> Stored:
    return [(each.tensor_class, KNOWN[each.format]) for each in decoder.weights if each.format in KNOWN]


def _half(decoder: Component) -> bool:
    """Whether it computes in float16, from what the manifest tells of the weights and the cache."""
    kept = decoder.kv is not None and decoder.kv.dtype == "float16"
    return kept or any(each.format == FP16.name for each in decoder.weights)
