"""Encoders whose activations are int8, too: what drivers for DSPs and neural processors want of NNAPI.

Convolutions, multiplications by weights and the sums between them are computed in int8, with one scale and zero point
for each activation, calibrated on samples; norms, Gelu and attention stay float32, between DEQUANTIZE and QUANTIZE.
A batch norm behind a convolution goes into the scales of its kernel and into its bias, so that the stored integers are
those of the checkpoint's kernel; a clamp goes into the convolution's activation.

    lower       every activation with a scale that stands in for its own, biases fine enough to be exact
    observe     the same file with float32 activations (litert_exact.py), run on the samples
    settle      scales and zero points from the ranges seen, biases anew
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeexport import errors
from edgeexport.backends import litert_nnapi_ops as nnapi
from edgeexport.backends.litert import specs
from edgeexport.backends.litert_file import ModelFile, Tensor
from edgeexport.backends.litert_lowering import Lowering
from edgeexport.backends.litert_names import STEP
from edgeexport.backends.litert_ops import Sliding, bias_of
from edgeexport.backends.optable import OpTable
from edgeexport.canonical.dialect import attribute, linear
from edgeexport.core import Array, CanonicalModel, Progress, QuantPlan, Signature, WeightSource

if TYPE_CHECKING:
    import onnx_ir as ir

OPS = OpTable("litert-nnapi")
STAND_IN = 1e-3
"""The scale of every activation until it is known: fine enough that biases lose nothing."""
ROWS = 1 << 12
"""Rows of a weight whose scales are read at a time."""
TAIL = 1e-4
"""The share of an activation's numbers that its range leaves out at either end. Root mean square of the difference in
autoglm-phone-mini's held-out features, over their own: 0.13 for pictures and 0.38 for sounds where none is left out,
0.12 and 0.15 here, 0.11 and 0.24 with a thousandth."""
MOST_UNITS = float(2**30)
"""The largest bias: half of what int32 holds is left for the products."""


@dataclass(frozen=True)
class _Bias:
    """A bias [outputs] in float32, its buffer and tensor; the quantisation of the input that is multiplied and of the
    kernel, and the kernel's scales float32 [outputs]."""

    values: Array
    buffer: int
    tensor: int
    input: Any
    kernel: Any
    scales: Array


@dataclass
class _Activations:
    """The quantisations of a graph's int8 activations, each beside the index of a tensor that shows its range, and the
    biases that hang on their scales."""

    shown: list[tuple[int, Any]] = field(default_factory=list)
    biases: list[_Bias] = field(default_factory=list)


class StaticLowering(Lowering):
    """A graph in which a value may be there as float32, as int8 with its own axes, and as int8 with channels last.
    Whoever reads one asks for the form that it takes, and one that is missing is made of another, once."""

    def __init__(
        self, model: CanonicalModel, plan: QuantPlan, file: ModelFile, name: str, source: WeightSource
    ) -> None:
        super().__init__(model, plan, OPS, file, name)
        self.source = source
        self.activations = _Activations()
        self.absorbed: set[ir.Node] = set()
        """Nodes that a convolution took in."""
        self._plain: dict[ir.Value, Tensor] = {}
        self._last: dict[ir.Value, tuple[Tensor, tuple[int, ...]]] = {}

    # forms

    def value(self, value: ir.Value | None) -> Tensor:
        """As float32."""
        assert value is not None, "an input that the dialect requires"
        if value not in self.tensors and self.is_int8(value):
            held = self.int8(value)
            self.tensors[value] = self.graph.emit("DEQUANTIZE", [held], held.shape, "DequantizeOptions", version=2)
        return super().value(value)

    def is_int8(self, value: ir.Value | None) -> bool:
        """Whether int8 is what it was computed in."""
        return value in self._plain or value in self._last

    def int8(self, value: ir.Value) -> Tensor:
        """As int8, with its own axes."""
        if value in self._plain:
            return self._plain[value]
        if value in self._last:
            last, shape = self._last[value]
            made = self.reshape(self.transpose(last, (0, 3, 1, 2)), shape)
        else:
            x = self.value(value)
            made = self.emit8("QUANTIZE", [x], x.shape, "QuantizeOptions")
            # In float32 there is no QUANTIZE: the number that goes in shows the range.
            self.activations.shown.append((x.index, self.graph.tensors[made.index].quantization))
        self._plain[value] = made
        return made

    def channels_last(self, value: ir.Value) -> Tensor:
        """As int8 [batch, height, width, channels], of height 1 where it has but one axis of places."""
        if value not in self._last:
            held = self.int8(value)
            shape = held.shape
            if len(shape) == 3:
                held = self.reshape(held, (*shape[:2], 1, shape[2]))
            self._last[value] = self.transpose(held, (0, 2, 3, 1)), shape
        return self._last[value][0]

    def last_of(self, value: ir.Value) -> tuple[int, ...] | None:
        """Its own shape where a value is there with channels last."""
        return self._last[value][1] if value in self._last else None

    def learn_int8(self, value: ir.Value, tensor: Tensor, last_of: tuple[int, ...] | None = None) -> None:
        """Enter a value that was computed in int8; `last_of` is its own shape where its channels are last."""
        if last_of is None:
            self._plain[value] = tensor
        else:
            self._last[value] = tensor, last_of

    # emission

    def emit8(
        self, op: str, inputs: Sequence[Tensor | None], shape: Sequence[int], options: str = "", **settings: Any
    ) -> Tensor:
        """Append an operator whose output is an int8 activation with a scale of its own."""
        made = self.graph.emit(op, inputs, shape, options, dtype="int8", **settings)
        self._quantise(made, self.graph.file.schema.QuantizationParametersT(scale=[STAND_IN], zeroPoint=[0]))
        return made

    def alike(self, made: Tensor, x: Tensor) -> Tensor:
        """Let what was only moved about keep its scale."""
        if made.dtype == "int8" and made is not x:
            self._quantise(made, self.graph.tensors[x.index].quantization)
        return made

    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """As Lowering's; scales stay."""
        return self.alike(super().reshape(x, shape), x)

    def transpose(self, x: Tensor, order: Sequence[int]) -> Tensor:
        """As Lowering's; scales stay."""
        return self.alike(super().transpose(x, order), x)

    def _quantise(self, tensor: Tensor, quantization: Any) -> None:
        self.graph.tensors[tensor.index].quantization = quantization
        self.activations.shown.append((tensor.index, quantization))

    # weights

    def is_rows_of_int8(self, name: str) -> bool:
        """Whether a weight has one scale per row, in 8 bits."""
        fmt = self.format_of(name)
        return fmt.integer and fmt.bits == 8 and not fmt.block

    def vector(self, value: ir.Value | None) -> Array:
        """The float32 numbers of a small weight, which is stored beside what is computed of it, or of a constant."""
        if (known := self.known(value)) is not None:
            return np.asarray(known, np.float32)
        name = self.weight_of(value)
        assert name is not None, "norms and biases are weights"
        shape = self.model.weights[name].shape
        self.graph.file.weight(name, shape, self.plan.formats[name])
        return np.asarray(self.source.float_rows(name, 0, shape[0]), np.float32)

    def kernel8(self, name: str, factor: Array, order: tuple[int, ...], seen: tuple[int, ...]) -> tuple[Tensor, Array]:
        """A weight's integers, and their scales float32 [outputs] times a factor for each row."""
        shape, file = self.model.weights[name].shape, self.graph.file
        held = file.weight(name, shape, self.plan.formats[name], order, turned=factor < 0)
        found = [
            self.source.quantized_rows(name, start, min(start + ROWS, shape[0])).scales
            for start in range(0, shape[0], ROWS)
        ]
        scales = np.concatenate(found)[:, 0].astype(np.float32) * np.abs(factor)
        scales = np.maximum(scales, np.finfo(np.float32).tiny)
        quantization = file.schema.QuantizationParametersT(
            scale=scales,
            zeroPoint=np.zeros(len(scales), np.int64),
            quantizedDimension=0 if order[0] == 0 else len(seen) - 1,
        )
        return self.graph.tensor(seen, "int8", name, held.rows, quantization), scales

    def bias8(self, values: Array, x: Tensor, kernel: Tensor, scales: Array) -> Tensor:
        """A bias in int32, in units of what the integers' products stand for."""
        buffer = len(self.graph.file.buffers)
        self.graph.file.buffers.append(np.zeros(len(values), np.int32))
        made = self.graph.tensor((len(values),), "int32", buffer=buffer)
        given, held = (self.graph.tensors[tensor.index].quantization for tensor in (x, kernel))
        self.activations.biases.append(_Bias(values, buffer, made.index, given, held, scales))
        return made

    def settle(self, ranges: Mapping[int, tuple[float, float]]) -> None:
        """Fix every scale by the lowest and highest number seen of each activation (tensors that share one share what
        was seen), and the biases by the scales. What was not seen keeps its stand-in.
        """
        seen: dict[int, tuple[Any, list[float]]] = {}
        for index, quantization in self.activations.shown:
            seen.setdefault(id(quantization), (quantization, [0.0]))[1].extend(ranges.get(index, ()))
        for quantization, found in seen.values():
            low, high = min(found), max(found)
            if high > low:
                scale = (high - low) / 255
                quantization.scale = [scale]
                quantization.zeroPoint = [int(np.clip(round(-128 - low / scale), -128, 127))]
        for bias in self.activations.biases:
            unit = np.float32(bias.input.scale[0])
            # Channels that training has left dead multiply by 1e-9 and add 1: their scale is raised until the bias
            # fits, and what they multiply stays below a thousandth of it.
            scales = np.maximum(bias.scales, np.abs(bias.values) / (unit * MOST_UNITS)).astype(np.float32)
            bias.kernel.scale, scales = scales, scales * unit
            self.graph.file.buffers[bias.buffer] = np.rint(bias.values / scales).astype(np.int32)
            self.graph.tensors[bias.tensor].quantization = self.graph.file.schema.QuantizationParametersT(
                scale=scales, zeroPoint=np.zeros(len(scales), np.int64), quantizedDimension=0
            )


# rows


def _only_user(value: ir.Value) -> ir.Node | None:
    users = [user for user, _ in value.uses()]
    return users[0] if len(users) == 1 and not value.is_graph_output() else None


@OPS.lower("Conv", note="CONV_2D or DEPTHWISE_CONV_2D in int8, channels last")
def conv(node: ir.Node, ctx: StaticLowering) -> None:
    """Conv(X, W, B), with the BatchNormalization and the Clip that alone read it."""
    x, name = node.inputs[0], ctx.weight_of(node.inputs[1])
    assert x is not None and name is not None, "check has refused a kernel that is no weight"
    shape = ctx.model.weights[name].shape
    groups = int(attribute(node, "group", 1))
    depthwise = groups > 1 and shape[1] == 1
    if not ctx.is_rows_of_int8(name) or (groups > 1 and not depthwise):
        nnapi.conv(node, ctx)
        return
    axes = len(shape) - 2
    given, sliding = ctx.channels_last(x), Sliding.of(node, axes)
    given = ctx.alike(sliding.padded(given, ctx), given)
    factor, bias, output = _affine(node, shape[0], ctx)
    clamp, output = _clamp(output, ctx)
    window = (1, shape[2]) if axes == 1 else shape[2:]
    places = sliding.places(given, window)
    activation = getattr(ctx.graph.file.schema.ActivationFunctionType, clamp)
    settings = {**sliding.settings(ctx), "fusedActivationFunction": activation}
    inner = tuple(range(2, len(shape)))
    if depthwise:
        order, seen = (1, *inner, 0), (1, *window, shape[0])
        kernel, scales = ctx.kernel8(name, factor, order, seen)
        settings["depthMultiplier"] = shape[0] // groups
        op, options = "DEPTHWISE_CONV_2D", "DepthwiseConv2DOptions"
    else:
        kernel, scales = ctx.kernel8(name, factor, (0, *inner, 1), (shape[0], *window, shape[1]))
        op, options = "CONV_2D", "Conv2DOptions"
    added = ctx.bias8(bias, given, kernel, scales)
    made = ctx.emit8(op, [given, kernel, added], (given.shape[0], *places, shape[0]), options, version=3, **settings)
    ctx.learn_int8(output, made, (given.shape[0], shape[0], *places[2 - axes :]))


def _affine(node: ir.Node, outputs: int, ctx: StaticLowering) -> tuple[Array, Array, ir.Value]:
    """Factor and bias float32 [outputs] of a convolution and the batch norm behind it, and the value they give."""
    given = node.inputs[2] if len(node.inputs) > 2 else None
    bias = np.zeros(outputs, np.float32) if given is None else ctx.vector(given)
    factor: Array = np.ones(outputs, np.float32)
    output = node.outputs[0]
    norm = _only_user(output)
    if norm is not None and norm.op_type == "BatchNormalization":
        scale, shift, mean, variance = (ctx.vector(value) for value in norm.inputs[1:5])
        factor = scale / np.sqrt(variance + np.float32(attribute(norm, "epsilon", 1e-5)))
        bias, output = (bias - mean) * factor + shift, norm.outputs[0]
        ctx.absorbed.add(norm)
    return factor, bias, output


def _clamp(output: ir.Value, ctx: StaticLowering) -> tuple[str, ir.Value]:
    """The activation that a Clip behind a convolution is, and the value it gives."""
    clip = _only_user(output)
    if clip is None or clip.op_type != "Clip":
        return "NONE", output
    low, high = (None if (found := ctx.known(value)) is None else float(found) for value in clip.inputs[1:3])
    named = "RELU6" if (low, high) == (0.0, 6.0) else "RELU" if (low, high) == (0.0, None) else None
    if named is None:
        return "NONE", output
    ctx.absorbed.add(clip)
    return named, clip.outputs[0]


def _floating(op: str) -> Callable[[ir.Node, StaticLowering], None]:
    row = nnapi.OPS.get(op)
    assert row is not None and row.lower is not None
    return row.lower


def _unless_absorbed(lower: Callable[[Any, Any], None]) -> Callable[[ir.Node, StaticLowering], None]:
    def row(node: ir.Node, ctx: StaticLowering) -> None:
        if node not in ctx.absorbed:
            lower(node, ctx)

    return row


for _op in ("BatchNormalization", "Clip"):
    OPS.lower(_op, note="in a convolution, or in float32")(_unless_absorbed(_floating(_op)))


@OPS.lower("MatMul", note="CONV_2D of 1 x 1 in int8 by a weight, else in float32")
def matmul(node: ir.Node, ctx: StaticLowering) -> None:
    """MatMul(A, B)"""
    found = linear(node)
    name = str(found.weight.name) if found is not None else ""
    if found is None or not ctx.is_rows_of_int8(name):
        nnapi.matmul(node, ctx)
        return
    x, (outputs, width) = ctx.int8(found.input), ctx.model.weights[name].shape
    added, output = _bias_behind(found.output, outputs, ctx)
    count = int(np.prod(x.shape[:-1], dtype=np.int64))
    kernel, scales = ctx.kernel8(name, np.ones(outputs, np.float32), (0, 1), (outputs, 1, 1, width))
    rows = ctx.reshape(x, (1, count, 1, width))
    made = ctx.emit8(
        "CONV_2D", [rows, kernel, ctx.bias8(added, rows, kernel, scales)], (1, count, 1, outputs), "Conv2DOptions",
        version=3, padding=ctx.graph.file.schema.Padding.VALID, strideH=1, strideW=1, dilationHFactor=1,
        dilationWFactor=1,
    )  # fmt: skip
    ctx.learn_int8(output, ctx.reshape(made, (*x.shape[:-1], outputs)))


def _bias_behind(output: ir.Value, outputs: int, ctx: StaticLowering) -> tuple[Array, ir.Value]:
    """The bias that is added to a multiplication and to nothing else, and the sum."""
    bias, added = bias_of(output, ctx)
    if bias is None:
        return np.zeros(outputs, np.float32), output
    add = _only_user(output)
    assert add is not None
    ctx.absorbed.add(add)
    return ctx.vector(next(value for value in add.inputs if value is not output)), added


@OPS.lower("Add", note="ADD in int8 of what was computed in int8, else in float32")
def add(node: ir.Node, ctx: StaticLowering) -> None:
    """Add(A, B)"""
    left, right = node.inputs
    if node in ctx.absorbed:
        return
    if left is None or right is None or not (ctx.is_int8(left) and ctx.is_int8(right)):
        _floating("Add")(node, ctx)
        return
    shapes = [ctx.last_of(each) for each in (left, right)]
    last = shapes[0] if shapes[0] == shapes[1] else None
    x, y = (ctx.int8(each) if last is None else ctx.channels_last(each) for each in (left, right))
    made = ctx.emit8("ADD", [x, y], np.broadcast_shapes(x.shape, y.shape), "AddOptions", version=2)
    ctx.learn_int8(node.outputs[0], made, last)


def _moved(op: str) -> Callable[[ir.Node, StaticLowering], None]:
    """What only moves numbers about does so in int8 where it finds int8."""
    lower = _floating(op)

    def row(node: ir.Node, ctx: StaticLowering) -> None:
        value = node.inputs[0]
        if value is None or not ctx.is_int8(value) or value in ctx.tensors:
            lower(node, ctx)
            return
        ctx.tensors[value] = ctx.int8(value)
        lower(node, ctx)
        del ctx.tensors[value]
        ctx.learn_int8(node.outputs[0], ctx.tensors.pop(node.outputs[0]))

    return row


for _op in ("Reshape", "Transpose", "Squeeze", "Unsqueeze"):
    OPS.lower(_op, note="in int8 where it is")(_moved(_op))

OPS.include(row for row in nnapi.OPS if OPS.get(row.op) is None)


# calibration


def lower(
    file: ModelFile, model: CanonicalModel, plan: QuantPlan, source: WeightSource
) -> tuple[StaticLowering, Signature]:
    """One graph of fixed shapes as a signature of the file, its scales still to be settled."""
    lowering = StaticLowering(model, plan, file, model.variant or STEP, source)
    inputs: dict[str, Tensor] = {}
    for spec in model.inputs:
        inputs[spec.name] = lowering.graph.tensor([int(size) for size in spec.shape], spec.dtype, spec.name)  # type: ignore[arg-type]  # no free size
        lowering.bind(spec.name, inputs[spec.name])
    outputs = lowering.run()
    file.sign(lowering.graph, inputs, outputs)
    return lowering, Signature(lowering.graph.name, specs(inputs), specs(outputs), file.name)


def write(
    file: ModelFile, lowerings: Sequence[StaticLowering], signatures: Sequence[Signature], work: Path,
    source: WeightSource, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Calibrate the graphs of a file, one for each signature, and write it into `work`; returns where its weights lie.

    Raises: UsageError `samples-missing` where a graph has none; `output-not-writable`.
    """
    from edgeexport.backends.litert_exact import write_exact

    for lowering in lowerings:
        lowering.settle({})
    with TemporaryDirectory(dir=work) as temporary:
        folder = Path(temporary)
        file.write(folder, source, lambda done, total: progress(done, 2 * total))
        write_exact(folder / file.name, folder / "float.tflite")
        for number, (lowering, signature) in enumerate(zip(lowerings, signatures, strict=True)):
            model, wanted = lowering.model, frozenset(index for index, _ in lowering.activations.shown)
            given = source.samples(model.variant)
            ranges = _observed(folder / "float.tflite", number, signature.name, wanted, given)
            if ranges is None:
                raise errors.samples_missing(model.component, model.variant)
            lowering.settle(ranges)
    return file.write(work, source, lambda done, total: progress(done + total, 2 * total))


def _observed(
    path: Path, number: int, signature: str, wanted: frozenset[int], samples: Iterable[Mapping[str, Array]]
) -> dict[int, tuple[float, float]] | None:
    """The lowest and the highest number that each of these tensors of a graph held over the samples, but for the tails
    of each; None where there is no sample."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    interpreter = Interpreter(
        str(path), experimental_preserve_all_tensors=True,
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )  # fmt: skip
    run = interpreter.get_signature_runner(signature)
    live = wanted & set(_computed(path, number))
    seen: dict[int, list[Array]] | None = None
    for sample in samples:
        run(**sample)
        seen = seen or {index: [] for index in live}
        for index in live:
            seen[index].append(np.quantile(interpreter.get_tensor(index, number), (TAIL, 1 - TAIL)))
    if seen is None:
        return None
    return {index: (float(np.min(found)), float(np.max(found))) for index, found in seen.items()}


def _computed(path: Path, number: int) -> Iterator[int]:
    """The tensors of a graph that hold numbers when it has run: its inputs, and what operators make."""
    import mmap

    from ai_edge_litert import schema_py_generated as schema

    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as held:
        model = schema.ModelT.InitFromPackedBuf(held)
        graph = model.subgraphs[number]
        found = [
            int(index) for tensors in (graph.inputs, *(each.outputs for each in graph.operators)) for index in tensors
        ]
        del model, graph  # its arrays are views of what closes here
    return iter(found)
