"""What must not be in an ML program of ours, found in the program itself, whoever wrote it.

Two of these were seen to give wrong numbers without a word: a state read again after it was written (coremltools' pass
common::remove_redundant_ops then returns the old one), and squares of activations in float16 (x * x is infinite from
256 on, and a mean of squares with it).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edgeexport import errors
from edgeexport.backends.coreml_mil import type_of
from edgeexport.core import Finding

SQUARES = ("square", "reduce_sum_square", "reduce_l2_norm", "l2_norm")
SUMS = ("reduce_sum", "reduce_mean")


def unsafe(model: Any) -> list[Finding]:
    """Every unsafe pattern of every function of a Model."""
    found = []
    for name, function in sorted(model.mlProgram.functions.items()):
        block = function.block_specializations[function.opset]
        for where, why in (*_states(block), *_outputs(block), *_squares(block)):
            found.append(errors.coreml_unsafe_program(name, where, why))
    return found


def _inputs(operation: Any) -> list[str]:
    return [binding.name for argument in operation.inputs.values() for binding in argument.arguments if binding.name]


def _name(operation: Any) -> str:
    return ", ".join(output.name for output in operation.outputs) or operation.type


def _states(block: Any) -> Iterator[tuple[str, str]]:
    """A state is read, changed and written, once, and its old value goes into the new one only."""
    written: set[str] = set()
    old: dict[str, str] = {}
    for each in block.operations:
        if each.type == "read_state":
            state = each.inputs["input"].arguments[0].name
            if state in written:
                yield _name(each), f"the state {state} is read after it is written"
            old[each.outputs[0].name] = state
        elif each.type == "write_state":
            state = each.inputs["input"].arguments[0].name
            if state in written:
                yield state, f"the state {state} is written twice"
            written.add(state)
        else:
            for stale in set(_inputs(each)) & old.keys():
                if each.type != "slice_update" or each.inputs["x"].arguments[0].name != stale:
                    yield _name(each), f"it uses what the state {old[stale]} was before it is written"


def _outputs(block: Any) -> Iterator[tuple[str, str]]:
    """No output is a state's value: Core ML may give both the same memory."""
    held: dict[str, str] = {}
    for each in block.operations:
        state = each.inputs["input"].arguments[0].name if each.type in ("read_state", "write_state") else ""
        if each.type == "read_state":
            held[each.outputs[0].name] = state
        elif each.type == "write_state":
            held[each.inputs["data"].arguments[0].name] = state
        elif each.type in ("identity", "reshape", "squeeze", "expand_dims"):
            source = each.inputs["x"].arguments[0].name
            if source in held:
                held[each.outputs[0].name] = held[source]
    for name in block.outputs:
        if name in held:
            yield name, f"the output is the value of the state {held[name]}"


def _squares(block: Any) -> Iterator[tuple[str, str]]:
    """No sum of squares of float16 values."""
    squared: set[str] = set()
    for each in block.operations:
        if not each.outputs or type_of(each.outputs[0].type).element.name != "float16":
            continue
        names = _inputs(each)
        if each.type in SQUARES[1:] or (each.type in SUMS and squared & set(names)):
            yield _name(each), "it sums squares in float16, which overflow from 256 on"
        if each.type == "square" or (each.type == "mul" and len(names) == 2 and names[0] == names[1]):
            squared.add(each.outputs[0].name)
