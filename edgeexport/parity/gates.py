"""How far an artifact may be from what it stands for: the default gate of every level, and where it comes from.

A target may loosen one with a `why` in its [parity] section. Measured on SmolLM2-135M, ONNX Runtime 1.31, 2026-11-21.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgeexport.core import Format, Provenance

GRAPH_MAX_ABS = 1e-3
"""L2: logits of two float32 programs of the same arithmetic. Measured 5e-5 at logits up to 33."""

GRAPH_FEATURES = 1e-4
"""L2: outputs of an encoder or embedding, largest difference over the larger of 1 and their root mean square."""

EXACT_MAX_ABS = 2e-3
"""L4: logits of the artifact with float32 activations against the canonical graph over the same stored weights."""

EXACT_FEATURES = 2e-3
"""L4: as `GRAPH_FEATURES`, of the artifact with float32 activations."""

MIN_SNR_DB = {32: 120.0, 16: 55.0, 8: 25.0, 4: 10.0}
"""L3: by bits of the format. White noise would give 20 dB at 4 bits and a block of 32; measured 19 to 22."""

MAX_ADDED_ZEROS = 0.35
"""L3: share of weights that became zero by rounding. Measured 0.06 to 0.11 at 4 bits; an all-zero tensor has 1."""


def snr_floor(fmt: Format) -> float:
    """The least SNR in dB a tensor may have in this format."""
    return MIN_SNR_DB[fmt.bits]


SHIPPED_KL = {"float": 1e-5, "half": 1e-3, "int8": 0.05, "int4": 0.05}
"""L4: mean KL in nats between the canonical graph over the stored weights and the artifact as shipped, whose integer
kernels round activations to int8 per block."""

SHIPPED_SNR_DB = {"float": 80.0, "half": 40.0, "int8": 0.0, "int4": 0.0}
"""L4: the same logits, power over that of the difference, in dB: KL does not see a program that gives all zeros where
the logits are small. Measured with every operation rounded to float16: 49.8 on SmolLM2 with its 30 layers, 58 to 65 on
tiny random models of two or three."""

SHIPPED_FEATURES = {"float": 1e-3, "half": 2e-2, "int8": 0.1, "int4": 0.1}
"""L4: root mean square of the difference that rounding activations makes in an encoder, over that of the outputs.
Measured in float16: 0.0066 for EfficientNet-lite0, 0.0018 for Whisper's encoder."""

REFERENCE_FEATURES = {"float": 1e-3, "half": 3e-2, "int8": 0.15, "int4": 0.5}
"""L5: the same from the original model to the artifact. Measured in float16: 0.0123 for EfficientNet-lite0, most of
it from its weights."""

REFERENCE_KL = {
    "float": 1e-4, "half": 1e-3, "int8": 0.05,
    "int4 carried": 0.09, "int4 gptq": 0.16, "int4 gptq wide": 0.3, "int4 searched": 0.4, "int4 rounded": 0.8,
}  # fmt: skip
"""L5: mean KL in nats from transformers' model to the artifact, along the artifact's own answers. 1.25 times what was
measured: carried over 0.006 (ONNX Runtime), 0.026 (LiteRT), 0.004 (MNN) and 0.001 (Core ML) on SmolLM2-135M; 0.021 and
0.069 (LiteRT, pictures and sound) on autoglm-phone-mini. GPTQ in blocks of 32 from a bf16 source: 0.091 (ONNX Runtime)
and 0.124 (LiteRT). The other rows were measured along a text alone (search 0.18, rounding 0.29), not along answers, and
are wider than that; so is the one for blocks of more than 32."""

REFERENCE_TOP1 = {
    "float": 1.0, "half": 1.0, "int8": 0.95,
    "int4 carried": 0.95, "int4 gptq": 0.8, "int4 gptq wide": 0.8, "int4 searched": 0.75, "int4 rounded": 0.6,
}  # fmt: skip
"""L5: share of decided positions (not near a tie) of the artifact's answers where both choose the same token. Measured:
carried over all of 80 to 131, GPTQ 65 of 67."""

REFERENCE_ANSWERS = {
    "float": 1.0, "half": 1.0, "int8": 0.75,
    "int4 carried": 0.75, "int4 gptq": 0.25, "int4 gptq wide": 0.25, "int4 searched": 0.25, "int4 rounded": 0.0,
}  # fmt: skip
"""L5: share of whole answers that agree to their ends, those that part near a tie set aside. Measured: all, of 2 to 10;
most answers of a model of 135M parameters part near a tie."""

FEWEST_DECIDED = 8
"""L5: a share of fewer decided positions than this is AMBIGUOUS, unless all must agree. One position decides nothing:
of 80 tokens of a random 9B model, whose margins are all near the tie, one is decided."""

NEAR_TIE = {"float": 2e-3, "half": 0.1, "int8": 1.0, "int4": 1.0}
"""L4 and L5: a position whose two best reference logits differ by less is AMBIGUOUS. For integer schemes it is what
rounding activations to int8 may change: over 320 tokens the artifact left the greedy path of its own stored weights
16 times, at margins of 0.92 once and else below 0.31."""


def kind(scheme_bits: int) -> str:
    """The row of the tables above for linears of so many bits; "half" is float16 weights and activations."""
    return {4: "int4", 8: "int8", 16: "half"}.get(scheme_bits, "float")


MULTIPLIED = ("linear", "encoder")
"""Classes of the tensors that most of a component's work is done by."""

Stored = Sequence[tuple[str, Format]]
"""How a component's weights are stored: the class of each, or of some together, and the format."""


def kind_of(weights: Stored, *, half: bool) -> str:
    """The scheme's kind, by the smallest integers that a component multiplies by, else by what it computes in: float16
    where `half`."""
    bits = [fmt.bits for group, fmt in weights if group in MULTIPLIED and fmt.integer]
    bits = bits or [fmt.bits for _, fmt in weights if fmt.integer]
    return kind(min(bits, default=16 if half else 32))


def grade_of(weights: Stored, provenance: Provenance, *, half: bool) -> str:
    """The kind and, at 4 bits, where most of the integers come from: the row of the tables of L5."""
    found = kind_of(weights, half=half)
    if found != "int4":
        return found
    packed = [fmt for group, fmt in weights if group in MULTIPLIED and fmt.bits == 4]
    wide = provenance == "gptq" and any(not 0 < fmt.block <= 32 for fmt in packed)
    return f"{found} {provenance}{' wide' if wide else ''}"


def gate(overrides: Mapping[str, Any], level: str, name: str, default: float) -> float:
    """A target's own gate, or the default."""
    return float(overrides.get(level, {}).get(name, default))
