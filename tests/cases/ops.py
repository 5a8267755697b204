"""At least one case of every op in the dialect: a tiny graph, its inputs and weights, and what it must become."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Weight:
    """A weight of a case: its shape, the format it is to be stored in, and the checkpoint's encoding."""

    shape: tuple[int, ...]
    format: str = "fp32"
    encoding: str = "F32"


@dataclass(frozen=True)
class OpCase:
    """A graph in ONNX text, one node per line, that is about `op`.

    `becomes` are ops that the lowered graph must have, `gone` ops that it must not have; `tolerance` is the largest
    absolute difference from the oracle, for outputs of order 1.
    """

    op: str
    note: str
    text: str
    inputs: Arrays
    outputs: tuple[str, ...] = ("y",)
    weights: Mapping[str, Weight] = field(default_factory=dict)
    constants: Arrays = field(default_factory=dict)
    becomes: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()
    tolerance: float = 1e-5
    attention: Mapping[str, Any] | None = None
    """Settings of an attention over a cache: its oracle is torch, not the graph itself."""

    def __str__(self) -> str:
        return f"{self.op}: {self.note}".replace(" ", "_")


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """float32 numbers of order 1."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


def ints(*values: int) -> np.ndarray:
    """An int64 vector."""
    return np.array(values, np.int64)


def cached_attention(
    note: str, *, length: int, position: int, heads: int = 4, kv_heads: int = 2, head_dim: int = 16, slots: int = 12,
    rotary: int = 16, interleaved: int = 0, scale: float = 0.25,
) -> OpCase:  # fmt: skip
    """The decoder's attention: q, k, v [1,T,heads * dim] -> rotated, written at `position`, attended, flat again."""
    layout = f"interleaved = {interleaved}, rotary_embedding_dim = {rotary}"
    angle = np.arange(slots)[:, None] * (0.7 ** np.arange(rotary // 2))[None]
    return OpCase(
        op="Attention",
        note=note,
        text=f"""
            q4 = Reshape (q, q_shape)
            k4 = Reshape (k, kv_shape)
            v4 = Reshape (v, kv_shape)
            qt = Transpose <perm = [0, 2, 1, 3]> (q4)
            kt = Transpose <perm = [0, 2, 1, 3]> (k4)
            vt = Transpose <perm = [0, 2, 1, 3]> (v4)
            qr = RotaryEmbedding <{layout}> (qt, cos, sin, positions)
            kr = RotaryEmbedding <{layout}> (kt, cos, sin, positions)
            present_key = TensorScatter <axis = -2, mode = "linear"> (past_key, kr, position)
            present_value = TensorScatter <axis = -2, mode = "linear"> (past_value, vt, position)
            a = Attention <is_causal = 1, scale = {scale}> (qr, present_key, present_value, , , , kv_length)
            at = Transpose <perm = [0, 2, 1, 3]> (a)
            y = Reshape (at, flat_shape)
        """,
        inputs={
            "q": normal(1, length, heads * head_dim),
            "k": normal(1, length, kv_heads * head_dim, seed=1),
            "v": normal(1, length, kv_heads * head_dim, seed=2),
            "past_key": _past(kv_heads, slots, head_dim, position, 3),
            "past_value": _past(kv_heads, slots, head_dim, position, 4),
            "position": ints(position),
            "positions": ints(*range(position, position + length))[None],
            "kv_length": ints(position + length),
        },
        outputs=("y", "present_key", "present_value"),
        constants={
            "q_shape": ints(1, -1, heads, head_dim),
            "kv_shape": ints(1, -1, kv_heads, head_dim),
            "flat_shape": ints(1, -1, heads * head_dim),
            "cos": np.cos(angle).astype(np.float32),
            "sin": np.sin(angle).astype(np.float32),
        },
        becomes=("GroupQueryAttention",),
        gone=("Attention", "TensorScatter", "RotaryEmbedding"),
        attention={"heads": heads, "kv_heads": kv_heads, "interleaved": interleaved, "scale": scale},
    )


def _past(kv_heads: int, slots: int, head_dim: int, filled: int, seed: int) -> np.ndarray:
    """A cache with `filled` slots in use; the others hold numbers that would show if they were attended to."""
    past = normal(1, kv_heads, slots, head_dim, seed=seed)
    past[:, :, filled:] = 50
    return past


def linear(note: str, fmt: str, *, rows: int = 24, width: int = 256, length: int = 3, encoding: str = "F32") -> OpCase:
    """x [1,T,K] times a weight [N,K]."""
    cast = "" if encoding == "F32" else "wf = Cast <to = 1> (w)\n"
    return OpCase(
        op="MatMul",
        note=note,
        text=f"{cast}wt = Transpose <perm = [1, 0]> ({'wf' if cast else 'w'})\ny = MatMul (x, wt)",
        inputs={"x": normal(1, length, width)},
        weights={"w": Weight((rows, width), fmt, encoding)},
        becomes=("MatMulNBits",) if fmt.startswith("int") else (),
        gone=("MatMul",) if fmt.startswith("int") else (),
        tolerance=1e-4,  # sums of 256 products
    )


def lookup(note: str, fmt: str, *, width: int = 256, encoding: str = "F32") -> OpCase:
    """Rows of a table [40, K] by ids."""
    cast = "" if encoding == "F32" else "wf = Cast <to = 1> (w)\n"
    return OpCase(
        op="Gather",
        note=note,
        text=f"{cast}y = Gather <axis = 0> ({'wf' if cast else 'w'}, ids)",
        inputs={"ids": ints(0, 39, 7, 7)[None]},
        weights={"w": Weight((40, width), fmt, encoding)},
        becomes=("GatherBlockQuantized",) if fmt.startswith("int") else ("Gather",),
    )


WINDOW = 'auto_pad = "NOTSET", kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]'
NORM = "RMSNormalization <axis = -1, epsilon = 0.001>"

OPS: list[OpCase] = [
    OpCase("Add", "a bias", "y = Add (x, b)", {"x": normal(1, 3, 64)}, weights={"b": Weight((64,))}),
    OpCase("Add", "two activations", "y = Add (x, z)", {"x": normal(1, 3, 8), "z": normal(1, 3, 8, seed=1)}),
    cached_attention("prefill of an empty cache", length=5, position=0),
    cached_attention("one token after five", length=1, position=5),
    cached_attention("a chunk after five", length=3, position=5),
    cached_attention("the last slot", length=1, position=11),
    cached_attention("the whole cache at once", length=12, position=0),
    cached_attention("as many keys as heads", length=4, position=2, kv_heads=4),
    cached_attention("one key for all heads", length=4, position=2, kv_heads=1),
    cached_attention("six heads, three keys", length=4, position=2, heads=6, kv_heads=3),
    cached_attention("interleaved rotary", length=4, position=2, interleaved=1),
    cached_attention("rotary over half of each head", length=4, position=2, head_dim=32),
    cached_attention("interleaved rotary over half of each head", length=1, position=3, head_dim=32, interleaved=1),
    cached_attention("a scale of its own", length=4, position=2, scale=0.1),
    OpCase(
        "Attention",
        "without a cache, both ways",
        "y = Attention <is_causal = 0, scale = 0.3> (q, k, v)",
        {"q": normal(1, 4, 5, 16), "k": normal(1, 2, 7, 16), "v": normal(1, 2, 7, 16, seed=1)},
    ),
    OpCase(
        "BatchNormalization", "after a convolution",
        f"h = Conv <{WINDOW}> (x, w)\ny = BatchNormalization <epsilon = 0.001> (h, g, b, m, v)",
        {"x": normal(1, 3, 9, 8)},
        weights={"w": Weight((6, 3, 3, 3)), **{name: Weight((6,)) for name in "gbm"}},
        constants={"v": np.linspace(0.2, 3, 6, dtype=np.float32)}, tolerance=1e-4,
    ),
    OpCase(
        "Clip", "between 0 and 6", "y = Clip (x, low, high)", {"x": 9 * normal(1, 3, 8)},
        constants={"low": np.float32(0), "high": np.float32(6)},
    ),
    OpCase(
        "Conv", "of a picture, with a bias and a stride", f"y = Conv <{WINDOW}> (x, w, b)", {"x": normal(1, 3, 9, 8)},
        weights={"w": Weight((6, 3, 3, 3)), "b": Weight((6,))}, tolerance=1e-4,
    ),
    OpCase(
        "Conv", "a kernel in float16 for each channel",
        'y = Conv <auto_pad = "NOTSET", kernel_shape = [3, 3], pads = [0, 0, 1, 1], group = 4> (x, w)',
        {"x": normal(1, 4, 9, 8)}, weights={"w": Weight((4, 1, 3, 3), "fp16")}, tolerance=1e-4,
    ),
    OpCase(
        "Conv", "over time",
        'y = Conv <auto_pad = "NOTSET", kernel_shape = [3], strides = [2], pads = [1, 1]> (x, w, b)',
        {"x": normal(1, 5, 12)}, weights={"w": Weight((7, 5, 3)), "b": Weight((7,))}, tolerance=1e-4,
    ),
    OpCase("Cast", "int64 to float32", "y = Cast <to = 1> (x)", {"x": ints(-3, 0, 70000)}),
    OpCase(
        "Cast", "a float16 norm in front of a sum", "bf = Cast <to = 1> (b)\ny = Add (x, bf)",
        {"x": normal(1, 3, 64)}, weights={"b": Weight((64,), "fp32", "F16")},
    ),
    OpCase(
        "Concat", "two widths", "y = Concat <axis = -1> (x, z)", {"x": normal(1, 3, 8), "z": normal(1, 3, 5)},
    ),
    *(lookup(f"from a table in {name}", name) for name in ("fp32", "fp16", "int8-channel")),
    *(lookup(f"from a table in {name}", name) for name in ("int8-b32", "int8-b128", "int4-b32", "int4-b128")),
    lookup("rows of 576, one scale each", "int8-channel", width=576),
    lookup("a bfloat16 checkpoint, float16 table", "fp16", encoding="BF16"),
    lookup("a bfloat16 checkpoint, int8 table", "int8-b32", encoding="BF16"),
    OpCase("Gather", "from an activation", "y = Gather <axis = 1> (x, ids)", {"x": normal(1, 5, 8), "ids": ints(4, 0)}),
    OpCase("Gelu", "exact", 'y = Gelu <approximate = "none"> (x)', {"x": 3 * normal(1, 3, 8)}),
    OpCase(
        "LayerNormalization", "over the last axis", "y = LayerNormalization <axis = -1, epsilon = 0.001> (x, g, b)",
        {"x": normal(1, 3, 64)}, weights={"g": Weight((64,)), "b": Weight((64,))},
    ),
    *(linear(f"a weight in {name}", name) for name in ("fp32", "fp16", "int8-channel")),
    *(linear(f"a weight in {name}", name) for name in ("int8-b32", "int8-b128", "int4-b16", "int4-b32", "int4-b128")),
    linear("one token, int4", "int4-b32", length=1),
    linear("rows of 576, one scale each", "int8-channel", width=576),
    linear("one row of output", "int8-channel", rows=1),
    linear("a bfloat16 checkpoint", "fp32", encoding="BF16"),
    linear("a float16 checkpoint, int4", "int4-b32", encoding="F16"),
    OpCase("MatMul", "two activations", "y = MatMul (x, z)", {"x": normal(1, 3, 8), "z": normal(1, 8, 5)}),
    OpCase(
        "MatMul", "a tied weight, looked up and multiplied",
        "h = Gather <axis = 0> (w, ids)\nwt = Transpose <perm = [1, 0]> (w)\ny = MatMul (h, wt)",
        {"ids": ints(3, 1, 39)[None]}, weights={"w": Weight((40, 64), "int8-b32")},
        becomes=("GatherBlockQuantized", "MatMulNBits"), tolerance=1e-4,
    ),
    OpCase("Mul", "broadcast", "y = Mul (x, z)", {"x": normal(1, 3, 8), "z": normal(3, 1)}),
    OpCase(
        "RMSNormalization", "alone", f"y = {NORM} (x, g)", {"x": normal(1, 3, 64)}, weights={"g": Weight((64,))},
    ),
    OpCase(
        "RMSNormalization", "over each head", f"y = {NORM} (x, g)", {"x": normal(1, 3, 4, 16)},
        weights={"g": Weight((16,))},
    ),
    OpCase(
        "RMSNormalization", "after a residual that nobody else reads", f"s = Add (x, z)\ny = {NORM} (s, g)",
        {"x": normal(1, 3, 64), "z": normal(1, 3, 64, seed=1)}, weights={"g": Weight((64,))},
        becomes=("SkipSimplifiedLayerNormalization",), gone=("Add",),
    ),
    OpCase(
        "RMSNormalization", "after a residual with a second reader",
        f"s = Add (x, z)\nn = {NORM} (s, g)\ny = Mul (s, n)",
        {"x": normal(1, 3, 64), "z": normal(1, 3, 64, seed=1)}, weights={"g": Weight((64,))},
        becomes=("SkipSimplifiedLayerNormalization",), gone=("Add",),
    ),
    OpCase(
        "RMSNormalization", "after a residual that two norms read",
        f"s = Add (x, z)\nn = {NORM} (s, g)\nm = {NORM} (s, h)\ny = Mul (m, n)",
        {"x": normal(1, 3, 64), "z": normal(1, 3, 64, seed=1)}, weights={"g": Weight((64,)), "h": Weight((64,))},
    ),
    OpCase(
        "RMSNormalization", "after a sum that is used before it",
        f"s = Add (x, z)\nu = Sigmoid (s)\nn = {NORM} (s, g)\ny = Mul (u, n)",
        {"x": normal(1, 3, 64), "z": normal(1, 3, 64, seed=1)}, weights={"g": Weight((64,))},
    ),
    OpCase(
        "RMSNormalization", "after a bias, which is no residual", f"s = Add (x, b)\ny = {NORM} (s, g)",
        {"x": normal(1, 3, 64)}, weights={"b": Weight((64,)), "g": Weight((64,))}, becomes=("Add",),
    ),
    OpCase(
        "RMSNormalization", "after a sum that is broadcast", f"s = Add (x, z)\ny = {NORM} (s, g)",
        {"x": normal(1, 3, 64), "z": normal(1, 1, 64)}, weights={"g": Weight((64,))},
    ),
    OpCase(
        "Range", "from 0 to a length", "y = Range (zero, n, one)", {"n": np.array(5)},
        constants={"zero": np.array(0), "one": np.array(1)},
    ),
    OpCase("Reshape", "-1", "y = Reshape (x, to)", {"x": normal(1, 6, 8)}, constants={"to": ints(1, -1, 2, 4)}),
    *(
        OpCase(
            "RotaryEmbedding", note,
            f"y = RotaryEmbedding <interleaved = {interleaved}, rotary_embedding_dim = {dim}> (x, cos, sin, at)",
            {"x": normal(1, 4, 3, 16), "at": ints(2, 3, 9)[None]},
            constants={"cos": normal(10, dim // 2, seed=1), "sin": normal(10, dim // 2, seed=2)},
        )
        for note, interleaved, dim in (("two halves", 0, 16), ("pairs", 1, 16), ("half, two halves", 0, 8))
    ),
    OpCase("Shape", "one dimension", "y = Shape <start = 1, end = 2> (x)", {"x": normal(1, 6, 8)}),
    OpCase("Sigmoid", "plain", "y = Sigmoid (x)", {"x": normal(1, 3, 8) * 40}),
    OpCase(
        "Slice", "the last of an axis", "y = Slice (x, first, last, axis, step)", {"x": normal(1, 6, 8)},
        constants={"first": ints(-1), "last": ints(2**63 - 1), "axis": ints(1), "step": ints(1)},
    ),
    OpCase(
        "Split", "in two parts of different width", "y, z = Split <axis = -1> (x, parts)", {"x": normal(1, 3, 8)},
        outputs=("y", "z"), constants={"parts": ints(5, 3)},
    ),
    OpCase(
        "Split", "of a multiplication's result", "wt = Transpose <perm = [1, 0]> (w)\nh = MatMul (x, wt)\n"
        "y, z = Split <axis = -1> (h, parts)", {"x": normal(1, 3, 64)},
        outputs=("y", "z"), constants={"parts": ints(16, 16)}, weights={"w": Weight((32, 64), "int4-b32")},
        tolerance=1e-4,
    ),
    OpCase("Sub", "from a number", "y = Sub (one, x)", {"x": normal(1, 3, 8)}, constants={"one": np.float32(1)}),
    OpCase("Squeeze", "a leading one", "y = Squeeze (x, axes)", {"x": normal(1, 6, 8)}, constants={"axes": ints(0)}),
    OpCase(
        "TensorScatter", "by itself", 'y = TensorScatter <axis = -2, mode = "linear"> (past, new, position)',
        {"past": normal(1, 2, 6, 4), "new": normal(1, 2, 2, 4), "position": ints(4)},
    ),
    OpCase("Transpose", "of an activation", "y = Transpose <perm = [0, 2, 1, 3]> (x)", {"x": normal(1, 3, 4, 8)}),
    OpCase("Unsqueeze", "at the end", "y = Unsqueeze (x, axes)", {"x": ints(4)}, constants={"axes": ints(1)}),
]  # fmt: skip


SHIFTED: list[OpCase] = [
    *(
        linear(f"a weight in {name}, {length} of {width}", name, width=width, length=length)
        for name, width in (
            ("int4-b32-zp", 256), ("int4-b32-zp", 576), ("int4-b32-zp", 1536), ("int4-b64-zp", 576),
            ("int4-b128-zp", 256), ("int4-b128-zp", 1536),
            ("int4-b32-o8", 256), ("int4-b32-o8", 576), ("int4-b32-o8", 1536), ("int4-b128-o8", 256),
        )
        for length in (1, 3)
    ),
    linear("a weight in int8-b16", "int8-b16"),
    *(lookup(f"from a table in {name}", name) for name in ("int4-b32-zp", "int4-b128-zp")),
    lookup("rows of 576, nine zero points each", "int4-b64-zp", width=576),
    OpCase(
        "MatMul", "three weights of one input, in blocks with offsets",
        "at = Transpose <perm = [1, 0]> (a)\nbt = Transpose <perm = [1, 0]> (b)\nct = Transpose <perm = [1, 0]> (c)\n"
        "u = MatMul (x, at)\nv = MatMul (x, bt)\ny = MatMul (x, ct)", {"x": normal(1, 3, 576)}, ("u", "v", "y"),
        weights={name: Weight((rows, 576), "int4-b32-o8") for name, rows in (("a", 24), ("b", 8), ("c", 8))},
        becomes=("MatMulNBits", "ReduceSum"), gone=("MatMul",), tolerance=1e-4,
    ),
    OpCase(
        "MatMul", "a tied weight with zero points, looked up and multiplied",
        "h = Gather <axis = 0> (w, ids)\nwt = Transpose <perm = [1, 0]> (w)\ny = MatMul (h, wt)",
        {"ids": ints(3, 1, 39)[None]}, weights={"w": Weight((40, 64), "int4-b32-zp")},
        becomes=("GatherBlockQuantized", "MatMulNBits"), tolerance=1e-4,
    ),
]  # fmt: skip
"""The formats that a backend gets only where its Traits ask for them: zero points, offsets, 8 bits in small blocks."""
