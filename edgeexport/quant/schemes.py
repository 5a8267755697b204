"""The presets a user can name with --quant, as data: one storage format per tensor class."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from edgeexport import errors
from edgeexport.core import Format, Shift, TensorClass

FP32 = Format("fp32", 32, integer=False)
FP16 = Format("fp16", 16, integer=False)
INT8_CHANNEL = Format("int8-channel", 8, integer=True)
INT4_CHANNEL = Format("int4-channel", 4, integer=True)
PALETTE4 = Format("palette4", 4, integer=True, palette=True)
"""Whose rows come in groups, so that it is not one of `FORMATS`."""
FLOAT8_CHANNEL = Format("float8-channel", 8, integer=True, float8=True)
"""Whose bits are no integers, so that it is not one of `FORMATS`."""
BLOCKS = (16, 32, 64, 128)
"""Elements that may share a scale. Powers of two from 16: what ONNX Runtime's MatMulNBits takes."""

SUFFIXES: Mapping[Shift, str] = {"zero": "zp", "zero16": "zp16", "int8": "o8", "half": "o16"}
"""What the names of shifted formats end in."""

FORMATS: Mapping[str, Format] = {
    fmt.name: fmt
    for fmt in (
        FP32,
        FP16,
        INT8_CHANNEL,
        INT4_CHANNEL,
        *(Format(f"int{bits}-b{block}", bits, integer=True, block=block) for bits in (8, 4) for block in BLOCKS),
        *(
            Format(f"int4-b{block}-{SUFFIXES[shift]}", 4, integer=True, block=block, shift=shift)
            for shift in SUFFIXES
            for block in BLOCKS
        ),
    )
}

KNOWN: Mapping[str, Format] = {**FORMATS, PALETTE4.name: PALETTE4, FLOAT8_CHANNEL.name: FLOAT8_CHANNEL}
"""Every format that a bundle may name."""


@dataclass(frozen=True)
class Scheme:
    """One preset. `embedding` and `lm_head` are equal in every preset: tied models keep both in one tensor."""

    name: str
    title: str
    linear: Format
    embedding: Format
    lm_head: Format
    encoder: Format
    convolution: Format = FP16
    other: Format = FP32  # norms, biases: a thousandth of the bytes, and the values everything else passes through
    value: Format | None = None
    """That of attention's v_proj, where it is not the other multiplications'."""

    @property
    def formats(self) -> Mapping[TensorClass, Format]:
        """The format of each tensor class."""
        return {
            "linear": self.linear,
            "encoder": self.encoder,
            "embedding": self.embedding,
            "lm_head": self.lm_head,
            "convolution": self.convolution,
            "other": self.other,
        }


# Encoders are read once per picture, not once per token, and a tenth of the weights: in the int4 schemes they stay
# at 8 bits. So does v_proj, a twentieth of the weights: a quarter of what 4 bits cost is lost there (KL 0.19 to 0.15
# on SmolLM2-135M). So do embedding and lm_head, but for `int4-b32-t4`: for every token the whole lm_head is read, and
# in int8 a model as small as SmolLM2-135M, a fifth of which it is, decodes slower by what docs/quantisation.md says.
SCHEMES: Mapping[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("fp32", "32-bit floats, as precise as the checkpoint", FP32, FP32, FP32, FP32, FP32),
        Scheme("fp16", "16-bit floats", FP16, FP16, FP16, FP16),
        Scheme(
            "int8",
            "8-bit integers, one scale per output channel",
            INT8_CHANNEL,
            INT8_CHANNEL,
            INT8_CHANNEL,
            INT8_CHANNEL,
        ),
        Scheme(
            "int4",
            "4-bit integers, one scale per output channel, embedding and v_proj in 8 bits: for GPU delegates",
            INT4_CHANNEL,
            INT8_CHANNEL,
            INT8_CHANNEL,
            INT8_CHANNEL,
            value=INT8_CHANNEL,
        ),
        *(
            Scheme(
                f"int4-b{block}",
                f"4-bit integers, a scale per {block} weights, embedding and v_proj in 8 bits",
                FORMATS[f"int4-b{block}"],
                INT8_CHANNEL,
                INT8_CHANNEL,
                INT8_CHANNEL,
                value=INT8_CHANNEL,
            )
            for block in (32, 64, 128)
        ),
        Scheme(
            "int4-b32-t4",
            "4-bit integers, a scale per 32 weights, the embedding too: smaller and faster, and further from the model",
            FORMATS["int4-b32"],
            FORMATS["int4-b32"],
            FORMATS["int4-b32"],
            INT8_CHANNEL,
            value=INT8_CHANNEL,
        ),
    )
}


AUTO = replace(
    SCHEMES["int4-b32"],
    name="auto",
    title="the format of each matrix by what it loses, within --max-size, --max-kl or --for-device",
)
"""What is not chosen is as in `int4-b32`."""

OWN_SCHEMES: Mapping[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            "palette4",
            "4-bit palettes that 16 rows share, a scale per row, embedding in 8 bits: for Core ML",
            PALETTE4,
            INT8_CHANNEL,
            INT8_CHANNEL,
            INT8_CHANNEL,
        ),
        # Measured on SmolLM2-135M (768 tokens of English), KL to transformers: 0.019 nats; 0.056 with the embedding in
        # float8 as well; 0.0055 for int8.
        Scheme(
            "fp8",
            "8-bit floats (e4m3), one scale per output channel, embedding in 8-bit integers: for TensorRT",
            FLOAT8_CHANNEL,
            INT8_CHANNEL,
            INT8_CHANNEL,
            INT8_CHANNEL,
        ),
        Scheme(
            "int8-static",
            "8-bit integers, and in encoders activations too, calibrated on samples: for NNAPI",
            INT8_CHANNEL,
            INT8_CHANNEL,
            INT8_CHANNEL,
            INT8_CHANNEL,
            INT8_CHANNEL,
        ),
    )
}
"""Presets that only those backends take which name them in their SCHEMES."""


def find(name: str, own: Collection[str] = tuple(OWN_SCHEMES)) -> Scheme:
    """The preset of this name, one for all backends or one of `own`. Raises `unknown-scheme` with suggestions, and
    `scheme-of-another-backend`."""
    known = {**SCHEMES, AUTO.name: AUTO, **{each: OWN_SCHEMES[each] for each in own}}
    if name not in known and name in OWN_SCHEMES:
        raise errors.scheme_of_another_backend(name, OWN_SCHEMES[name].title, known)
    if name not in known:
        raise errors.unknown_scheme(name, known)
    return known[name]
