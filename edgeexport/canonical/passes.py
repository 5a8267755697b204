"""The passes between torch's export and the dialect: a list, in order, with the reason for each place.

`simplify` runs on each traced stage, before it is stamped, so that its cost does not grow with depth. `finish` runs
once on the whole graph.
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxscript.optimizer

from edgeexport.canonical.dialect import constant


def simplify(model: ir.Model) -> None:
    """Bring one traced stage into the dialect, in place."""
    split_gemms(model)
    fix_reshapes(model)  # early: it frees the Shape/Concat arithmetic that would otherwise block folding
    # Folds constants, drops Identity, turns SplitToSequence + SequenceAt into Split. The limits are bytes.
    onnxscript.optimizer.optimize(model, onnx_shape_inference=False, input_size_limit=4096, output_size_limit=4096)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.RemoveUnusedNodesPass()(model)  # last: everything above leaves orphans


def split_gemms(model: ir.Model) -> None:
    """Gemm, which torch's exporter makes of a Linear over a matrix -> MatMul of the transposed weight, and Add."""
    for node in list(model.graph):
        if node.op_type != "Gemm":
            continue
        settings = {name: node.attributes[name].value for name in node.attributes}
        if any(settings.pop(name, 1.0) != 1.0 for name in ("alpha", "beta")) or settings.pop("transA", 0):
            continue  # the dialect check names it
        x, weight, *bias = node.inputs
        made = []
        if settings.get("transB"):
            made.append(ir.node("Transpose", [weight], {"perm": [1, 0]}, name=f"{node.name}/turned"))
            weight = made[-1].outputs[0]
        made.append(ir.node("MatMul", [x, weight], name=f"{node.name}/product"))
        if bias and bias[0] is not None:
            made.append(ir.node("Add", [made[-1].outputs[0], bias[0]], name=f"{node.name}/sum"))
        old = node.outputs[0]
        for each in made:
            each.metadata_props.update(node.metadata_props)
            if each.op_type != "Transpose":
                each.outputs[0].shape, each.outputs[0].type = old.shape, old.type
        made[-1].outputs[0].name = old.name
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], made, [old], [made[-1].outputs[0]])


def finish(model: ir.Model) -> None:
    """Tidy the stamped graph, in place."""
    common.CommonSubexpressionEliminationPass()(model)  # one Transpose for a weight used twice
    common.RemoveUnusedNodesPass()(model)


def fix_reshapes(model: ir.Model) -> None:
    """Reshape(x, <computed shape>) -> Reshape(x, constant): static sizes as they are, -1 for the one symbolic one."""
    for node in model.graph:
        if node.op_type != "Reshape" or constant(node.inputs[1]) is not None:
            continue
        shape = node.outputs[0].shape
        if shape is None:
            continue
        sizes = [dim if isinstance(dim, int) else -1 for dim in shape]
        if sizes.count(-1) > 1 or 0 in sizes:
            continue
        name = f"{node.outputs[0].name}/shape"
        held = ir.Value(name=name, const_value=ir.tensor(sizes, dtype=ir.DataType.INT64, name=name))
        model.graph.register_initializer(held)
        node.replace_input_with(1, held)
        node.attributes.pop("allowzero", None)  # no size is 0, and a constant shape reads the same either way
