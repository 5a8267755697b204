"""Programs that we did not write: random ones against coremltools' value inference, and small networks that its torch
front end converts against torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from mlpackages import builder, coremltools
from torch import nn

from edgeexport.backends import coreml_mil as mil
from edgeexport.backends.coreml_interpreter import Interpreter
from edgeexport.backends.coreml_package import MANIFEST, MODEL, WEIGHTS, _manifest
from edgeexport.core import Array

pytest.importorskip("coremltools")

UNARY = ("relu", "sigmoid", "tanh", "abs", "square", "softplus", "softsign", "exp", "gelu", "sign", "floor")
BINARY = ("add", "sub", "mul", "maximum", "minimum")
COMPARED = ("greater", "less_equal", "equal")
REDUCED = ("reduce_mean", "reduce_sum", "reduce_max", "reduce_min")
MAX_RANK = 4
MAX_ELEMENTS = 400


@st.composite
def plans(draw: st.DrawFn) -> tuple[list[int], list[tuple[Any, ...]]]:
    """A shape and steps: (operation, numbers that choose its parameters)."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    choice = st.sampled_from(
        (
            "unary",
            "binary",
            "reduce",
            "transpose",
            "reshape",
            "slice",
            "concat",
            "split",
            "expand",
            "tile",
            "linear",
            "matmul",
            "softmax",
            "norm",
            "select",
            "gather",
            "update",
            "cumsum",
        )
    )
    steps = draw(st.lists(st.tuples(choice, st.integers(0, 2**31)), min_size=1, max_size=8))
    return shape, steps


def grown(mb: Any, x: Any, steps: list[tuple[str, int]]) -> Any:
    """The steps applied to x, each where it fits; the same for a placeholder and for a constant."""
    for kind, number in steps:
        rng = np.random.default_rng(number)
        made = applied(mb, x, kind, rng)
        if made is not None and len(made.shape) <= MAX_RANK and np.prod(made.shape) <= MAX_ELEMENTS:
            x = made
    return x


def applied(mb: Any, x: Any, kind: str, rng: np.random.Generator) -> Any:
    shape = [int(size) for size in x.shape]
    rank = len(shape)
    axis = int(rng.integers(rank)) if rank else 0
    if kind == "unary":
        op = str(rng.choice(UNARY))
        inside = mb.clip(x=x, alpha=np.float32(-4), beta=np.float32(4)) if op in ("exp", "square") else x
        return mb.gelu(x=inside, mode="EXACT") if op == "gelu" else getattr(mb, op)(x=inside)
    if rank == 0:
        return None
    other = rng.standard_normal(shape).astype(np.float32)
    if kind == "binary":
        return getattr(mb, str(rng.choice(BINARY)))(x=x, y=other if rng.integers(2) else other.ravel()[0])
    if kind == "select":
        return mb.select(cond=getattr(mb, str(rng.choice(COMPARED)))(x=x, y=other), a=x, b=other)
    if kind == "reduce":
        return getattr(mb, str(rng.choice(REDUCED)))(x=x, axes=[axis], keep_dims=bool(rank == 1 or rng.integers(2)))
    if kind == "transpose":
        return mb.transpose(x=x, perm=rng.permutation(rank).tolist())
    if kind == "reshape":
        return mb.reshape(x=x, shape=[shape[0], -1] if rng.integers(2) else [-1])
    if kind == "slice":
        begin = [int(rng.integers(size)) for size in shape]
        end = [int(rng.integers(first, size)) + 1 for first, size in zip(begin, shape, strict=True)]
        return mb.slice_by_index(x=x, begin=begin, end=end)
    if kind == "concat":
        return mb.concat(values=[x, other, x], axis=axis)
    if kind == "split":
        return mb.split(x=x, split_sizes=[1, shape[axis] - 1], axis=axis)[1] if shape[axis] > 1 else None
    if kind == "expand":
        return mb.expand_dims(x=x, axes=[axis])
    if kind == "tile":
        return mb.tile(x=x, reps=[int(rng.integers(1, 3)) for _ in shape])
    if kind == "linear":
        weight = rng.standard_normal((int(rng.integers(1, 6)), shape[-1])).astype(np.float32)
        return mb.linear(x=x, weight=weight) if rank > 1 else None
    if kind == "matmul":
        weight = rng.standard_normal((shape[-1], int(rng.integers(1, 6)))).astype(np.float32)
        return mb.matmul(x=x, y=weight) if rank > 1 else None
    if kind == "softmax":
        return mb.softmax(x=x, axis=axis)
    if kind == "norm":
        gamma = rng.standard_normal(shape[-1]).astype(np.float32)
        return mb.layer_norm(x=x, axes=[-1], gamma=gamma, beta=gamma, epsilon=np.float32(1e-2))
    if kind == "gather":
        return mb.gather(x=x, indices=rng.integers(0, shape[axis], int(rng.integers(1, 4))).astype(np.int32), axis=axis)
    if kind == "update":
        part = rng.standard_normal([1, *shape[1:]]).astype(np.float32)
        place = int(rng.integers(shape[0]))
        masks = [False] + [True] * (rank - 1)
        return mb.slice_update(
            x=x, update=part, begin=[place] + [0] * (rank - 1), end=[place + 1] + [0] * (rank - 1),
            begin_mask=masks, end_mask=masks,
        )  # fmt: skip
    return mb.cumsum(x=x, axis=axis)


def exported(folder: Path, function: Any) -> Path:
    """A package of one function, by coremltools' exporter alone: its converter would take a second."""
    from coremltools.converters.mil.backend.mil.load import MILProtoExporter
    from coremltools.converters.mil.mil import Program

    made = Program()
    made.add_function("main", function)
    package = folder / "p.mlpackage"
    (package / WEIGHTS).parent.mkdir(parents=True, exist_ok=True)
    (package / WEIGHTS).unlink(missing_ok=True)
    exporter = MILProtoExporter(made, str((package / WEIGHTS).parent), mil.SPECIFICATION)
    model = mil.protobuf().model.Model(specificationVersion=mil.SPECIFICATION)
    model.mlProgram.CopyFrom(mil.protobuf().mil.Program.FromString(exporter.export().SerializeToString()))
    del exporter
    (package / MODEL).write_bytes(model.SerializeToString())
    (package / MANIFEST).write_bytes(_manifest())
    return package


@settings(max_examples=320, deadline=None)
@given(plan=plans(), seed=st.integers(0, 2**31))
def test_random_programs_mean_what_coremltools_infers(
    plan: tuple[list[int], list[tuple[Any, ...]]], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    ct, mb = coremltools(), builder()
    from coremltools.converters.mil.mil import Function, types

    shape, steps = plan
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    try:
        with Function({}, opset_version=ct.target.iOS18):
            expected = grown(mb, mb.const(val=x), steps).val
        with Function({"x": mb.placeholder(shape, dtype=types.fp32)}, opset_version=ct.target.iOS18) as function:
            function.set_outputs([mb.identity(x=grown(mb, function.inputs["x"], steps), name="y")])
    except TypeError:  # what it concatenated with a placeholder is an array of objects, which its own softmax refuses
        reject()
    package = exported(tmp_path_factory.getbasetemp(), function)
    got = Interpreter(package).run({"x": x})["y"]
    assert expected is not None
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(got, expected, atol=3e-5 * scale, rtol=1e-4)


class Picture(nn.Module):
    """What small networks for pictures are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.hardswish(self.norm(self.stem(x)))
        x = F.max_pool2d(F.silu(self.deep(x)), 2) + F.avg_pool2d(x, 2)
        x = F.interpolate(F.leaky_relu(self.up(x)), scale_factor=2, mode="nearest")
        return F.softmax(self.head(x.mean((2, 3))), -1)


class Text(nn.Module):
    """An encoder layer over looked-up embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.qkv = nn.Linear(16, 48)
        self.norm = nn.LayerNorm(16)
        self.out = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        scores = self.out(x) @ self.table.weight.T
        return torch.log_softmax(scores, -1).cumsum(1).clamp(min=-40) + torch.sqrt(torch.abs(scores) + 1)


class Series(nn.Module):
    """Over time: a convolution of one dimension, statistics, and the places of the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 5, padding=2)
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.elu(self.norm(self.conv(F.pad(x, (1, 1), mode="reflect"))))
        best, _ = torch.topk(y, 3, dim=-1)
        return torch.cat((best, y.std(-1, keepdim=True), torch.where(y > 0, y, -y).amax(-1, keepdim=True)), -1)


NETWORKS: dict[str, tuple[type[nn.Module], Array]] = {
    "picture": (Picture, np.random.default_rng(0).standard_normal((1, 3, 16, 24), np.float32)),
    "text": (Text, np.array([[3, 49, 0, 7]], np.int32)),
    "series": (Series, np.random.default_rng(0).standard_normal((2, 4, 12), np.float32)),
}


@pytest.mark.parametrize("precision", ["FLOAT32", "FLOAT16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_that_coremltools_converted_gives_what_torch_gives(name: str, precision: str, tmp_path: Path) -> None:
    ct = coremltools()
    kind, x = NETWORKS[name]
    torch.manual_seed(0)
    network = kind().eval()
    with torch.no_grad():
        traced = torch.jit.trace(network, torch.from_numpy(x))
        expected = network(torch.from_numpy(x)).numpy()
    made = ct.convert(
        traced, inputs=[ct.TensorType("x", x.shape, dtype=x.dtype.type)], outputs=[ct.TensorType("y")],
        compute_precision=getattr(ct.precision, precision), minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
    )  # fmt: skip
    made.save(str(tmp_path / "n.mlpackage"))
    for exact in (True, False):
        got = Interpreter(tmp_path / "n.mlpackage", exact=exact).run({"x": x})["y"]
        coarse = precision == "FLOAT16"
        np.testing.assert_allclose(got, expected, atol=(0.05 if coarse else 1e-4), rtol=0.01 if coarse else 1e-4)
