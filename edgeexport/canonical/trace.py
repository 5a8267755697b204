"""Trace a component's stages to ONNX, once per kind, and stamp them into one canonical graph.

Depth costs nothing: forty equal layers are traced once and copied forty times, each copy bound to its own weights,
which stay references from start to end.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import onnx_ir as ir

from edgeexport import errors
from edgeexport.canonical import dialect, passes
from edgeexport.canonical.weights import ReferenceTensor
from edgeexport.core import Array, CanonicalModel, Component, Dim, Progress, Stage, TensorRef, TensorSpec, no_progress

STAGE = "edgeexport.stage"
"""Node metadata key: the stage a node came from."""

MODULE = "edgeexport.module"
"""Node metadata key: the path of torch modules a node came from, as torch's exporter wrote it."""

EXAMPLE_LENGTH = 16
"""T while tracing; anything but 1, which torch.export would take for a constant."""

IR_DTYPE = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "int64": ir.DataType.INT64,
    "int32": ir.DataType.INT32,
    "uint8": ir.DataType.UINT8,
    "int8": ir.DataType.INT8,
    "bool": ir.DataType.BOOL,
}


def trace(component: Component, tensors: Mapping[str, TensorRef], progress: Progress = no_progress) -> CanonicalModel:
    """The component's canonical graph, every weight of it a reference into `tensors`.

    Raises: ExportError `trace-failed` (with the stage and torch's message), `not-in-dialect`; CheckpointError for
    parameters that the checkpoint lacks.
    """
    stages = component.stages()
    constants = component.constants()
    kinds: dict[str, ir.Model] = {}
    for i, stage in enumerate(stages):
        if stage.kind not in kinds:
            kinds[stage.kind] = trace_stage(stage, component, constants)
        progress(i + 1, len(stages))
    graph, weights = stamp(component, stages, kinds, tensors, constants)
    passes.finish(graph)
    dialect.verify(graph)
    return CanonicalModel(
        component=component.name,
        graph=graph,
        inputs=component.inputs,
        outputs=component.outputs,
        state=component.state,
        weights=weights,
        stages=tuple(stage.name for stage in stages),
        digest=digest(graph, weights),
        variant=component.variant,
    )


def trace_stage(stage: Stage, component: Component, constants: Mapping[str, Array]) -> ir.Model:
    """One stage as an ONNX graph. Its first inputs are the stage's, in order; the others are its parameters, named
    as in the module: as inputs they cannot be folded, read or copied."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    modes = {p.fake_mode for p in stage.module.parameters() if hasattr(p, "fake_mode")}
    symbols: dict[str, Any] = {}
    examples: list[Any] = []
    dynamic: list[dict[int, Any] | None] = []
    with modes.pop() if modes else FakeTensorMode(allow_non_fake_inputs=True):
        for name in stage.inputs:
            spec = _spec(name, component, constants)
            sizes = [EXAMPLE_LENGTH if isinstance(dim, Dim) else dim for dim in spec.shape]
            examples.append(torch.zeros(sizes, dtype=getattr(torch, spec.dtype)))
            axes = {
                axis: symbols.setdefault(dim.name, torch.export.Dim(dim.name, min=dim.min, max=dim.max))
                for axis, dim in enumerate(spec.shape)
                if isinstance(dim, Dim)
            }
            dynamic.append(axes or None)
    try:
        with _quiet():
            shapes = _as_arguments(stage.module.forward, dynamic)
            program = torch.export.export(stage.module, tuple(examples), dynamic_shapes=shapes, strict=False)
            exported = torch.onnx.export(
                program, dynamo=True, opset_version=dialect.OPSET, optimize=False, verbose=False
            )
    except errors.EdgeExportError:
        raise
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError, KeyError) as problem:
        # torch raises any of these for a module that it cannot trace.
        raise errors.trace_failed(stage.name, type(stage.module).__name__, str(problem)) from problem
    model: ir.Model = exported.model
    graph = model.graph
    for name in stage.parameters:
        held = graph.initializers.pop(name)
        held.const_value = None
        graph.inputs.append(held)
    passes.simplify(model)
    return model


def stamp(
    component: Component,
    stages: Sequence[Stage],
    kinds: Mapping[str, ir.Model],
    tensors: Mapping[str, TensorRef],
    constants: Mapping[str, Array],
) -> tuple[ir.Model, dict[str, TensorRef]]:
    """Copy each stage's traced graph into one graph, wired by value names and bound to its own weights.

    Tied weights are one initializer because both uses name the same checkpoint tensor.
    """
    initializers = {name: _initializer(name, ir.tensor(array, name=name)) for name, array in constants.items()}
    values = {spec.name: _input(spec) for spec in component.inputs}
    inputs = list(values.values())
    values |= initializers
    results = {spec.name for spec in component.outputs}
    weights: dict[str, TensorRef] = {}
    shared: dict[tuple[object, ...], ir.Value] = {}
    nodes: list[ir.Node] = []

    def weight(name: str, shape: ir.Shape | None) -> ir.Value:
        if name not in weights:
            sizes = tuple(int(str(size)) for size in shape or ())
            ref = weights[name] = replace(tensors[name], shape=sizes)  # a kernel may be read as the matrix of its rows
            held = initializers[name] = _initializer(name, ReferenceTensor(name, ref))
            values[name] = held
            if held.dtype != ir.DataType.FLOAT:
                cast = ir.node("Cast", [held], {"to": ir.DataType.FLOAT}, name=f"{name}/Cast")
                values[name] = _describe(cast.outputs[0], f"{name}/float32", ir.DataType.FLOAT, held.shape)
                nodes.append(cast)
        return values[name]

    def constant(tensor: ir.TensorProtocol | None) -> ir.Value:
        assert tensor is not None
        key = (tensor.dtype, tuple(tensor.shape), tensor.tobytes())
        if key not in shared:  # the stages' shape constants are all alike
            name = f"const.{len(shared)}"
            shared[key] = initializers[name] = _initializer(name, ir.tensor(tensor.numpy(), name=name))
        return shared[key]

    for stage in stages:
        graph = kinds[stage.kind].graph
        local: dict[ir.Value, ir.Value] = {}
        for k, value in enumerate(graph.inputs):
            name = stage.inputs[k] if k < len(stage.inputs) else stage.parameters[str(value.name)]
            local[value] = values[name] if k < len(stage.inputs) else weight(name, value.shape)
        for held in graph.initializers.values():
            local[held] = constant(held.const_value)
        for node in graph:
            nodes.append(_clone(node, stage.name, local))
        for value, name in zip(graph.outputs, stage.outputs, strict=True):
            values[name] = local[value]
            if name in results:
                values[name].name = name

    graph = ir.Graph(
        inputs,
        [values[spec.name] for spec in component.outputs],
        nodes=nodes,
        initializers=list(initializers.values()),
        opset_imports={"": dialect.OPSET},
        name=component.name,
    )
    return ir.Model(graph, ir_version=dialect.IR_VERSION, producer_name="edgeexport"), weights


def digest(graph: ir.Model, weights: Mapping[str, TensorRef]) -> str:
    """sha256 of the graph's structure, its constants, and the names of the checkpoint tensors it reads."""
    state = hashlib.sha256()
    for node in graph.graph:
        attributes = sorted((name, repr(attribute.value)) for name, attribute in node.attributes.items())
        wires = [[value.name if value else "" for value in side] for side in (node.inputs, node.outputs)]
        state.update(repr((node.op_type, attributes, wires)).encode())
    for name, value in sorted(graph.graph.initializers.items()):
        state.update(name.encode())
        if name in weights:
            state.update(repr((weights[name].name, weights[name].shape)).encode())
        elif value.const_value is not None:
            state.update(value.const_value.tobytes())
    return state.hexdigest()


def _clone(node: ir.Node, stage: str, local: dict[ir.Value, ir.Value]) -> ir.Node:
    """A copy of `node` with its inputs looked up in `local`, where its outputs are entered."""
    copy = ir.Node(
        node.domain,
        node.op_type,
        [local[value] if value is not None else None for value in node.inputs],
        node.attributes.values(),
        num_outputs=len(node.outputs),
        name=f"{stage}/{node.name or node.outputs[0].name}",
    )
    copy.metadata_props[STAGE] = stage
    if module := node.metadata_props.get("pkg.torch.onnx.name_scopes"):
        copy.metadata_props[MODULE] = module
    for old, new in zip(node.outputs, copy.outputs, strict=True):
        local[old] = _describe(new, f"{stage}/{old.name}", old.dtype, old.shape)
    return copy


def _describe(value: ir.Value, name: str, dtype: ir.DataType | None, shape: ir.Shape | None) -> ir.Value:
    value.name, value.shape = name, shape
    if dtype is not None:  # a type without a dtype could not be serialised
        value.dtype = dtype
    return value


def _initializer(name: str, tensor: ir.TensorProtocol | None) -> ir.Value:
    assert tensor is not None
    return ir.Value(
        name=name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(int(str(dim)) for dim in tensor.shape),
        const_value=tensor,
    )


def _input(spec: TensorSpec) -> ir.Value:
    shape = ir.Shape([dim.name if isinstance(dim, Dim) else dim for dim in spec.shape])
    return ir.Value(name=spec.name, type=ir.TensorType(IR_DTYPE[spec.dtype]), shape=shape)


def _as_arguments(forward: Any, values: Sequence[Any]) -> tuple[Any, ...]:
    """One value per parameter of `forward`: those that fall to its *args as a tuple, as torch.export wants them."""
    parameters = list(inspect.signature(forward).parameters.values())
    if not parameters or parameters[-1].kind is not inspect.Parameter.VAR_POSITIONAL:
        return tuple(values)
    named = len(parameters) - 1
    return (*values[:named], tuple(values[named:]))


def _spec(name: str, component: Component, constants: Mapping[str, Array]) -> TensorSpec:
    if name in constants:
        return TensorSpec(name, str(constants[name].dtype), constants[name].shape)
    return component.values[name]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter writes progress to stdout and warnings about packages we do not use to its loggers."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.onnx", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
