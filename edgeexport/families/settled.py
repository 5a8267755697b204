"""What `from_pretrained` decides by the weights and by its configuration's class, decided once for graph and oracle.

transformers 5 reads three things out of a checkpoint that config.json alone does not say. A head and a table of which
only one is there are one tensor where config.json ties them; where both are there they are tied if they are equal, and
else both are kept, whatever config.json says (`PreTrainedModel.tie_weights`). Names may lack the prefix of the model
within the model. And numbers that config.json leaves out are those of the configuration's class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from edgeexport import errors
from edgeexport.checkpoint import WeightReader
from edgeexport.checkpoint.digest import header_digest
from edgeexport.core import Checkpoint, Finding, TensorRef

if TYPE_CHECKING:
    from edgeexport.families import Family

COMPARED_BYTES = 16 << 20
"""Of float32 rows that are compared at once."""


def settle(checkpoint: Checkpoint, family: Family) -> Checkpoint:
    """The checkpoint as transformers would load it: names whole, config.json's numbers complete, and tied only where
    its weights are. Its digest says so where anything is not as it was written.

    Raises: CheckpointError `bad-config`, and for weights that cannot be read, where a head and a table are compared.
    """
    config = family.completed(checkpoint.config)
    geometry, stored = family.geometry(config), len(checkpoint.tensors)
    if geometry.layers > stored:
        raise errors.bad_config("num_hidden_layers", geometry.layers, f"the weights have {stored} tensors in all")
    tensors = dict(_prefixed(checkpoint.tensors, family))
    remarks: tuple[Finding, ...] = ()
    head, table = tensors.get(family.head), tensors.get(family.table)
    if geometry.tied and head is not None:
        if table is None:
            tensors[family.table] = replace(tensors.pop(family.head), name=family.table)
        elif not _equal(head, table):
            config = family.untied(config)
            remarks = (errors.head_not_tied(checkpoint.path, family.head, family.table),)
    if config == checkpoint.config and tensors == checkpoint.tensors:
        return checkpoint
    digest = header_digest(config, checkpoint.generation, tensors, checkpoint.files)
    return replace(checkpoint, config=config, tensors=tensors, header_digest=digest, remarks=remarks)


def _prefixed(tensors: Mapping[str, TensorRef], family: Family) -> Mapping[str, TensorRef]:
    """The tensors by the names of the whole model, where they have those of the model within it."""
    prefix = family.prefix
    if not prefix or family.table in tensors or family.table.removeprefix(prefix) not in tensors:
        return tensors
    whole = {name if name == family.head else prefix + name: ref for name, ref in tensors.items()}
    return {name: replace(ref, name=name) for name, ref in whole.items()}


def _equal(one: TensorRef, other: TensorRef) -> bool:
    """Whether two matrices hold the same numbers. A few rows of both are in memory at a time."""
    if one.shape != other.shape:
        return False
    rows, width = one.shape
    step = max(1, COMPARED_BYTES // (4 * width))
    with WeightReader() as reader:
        return all(
            np.array_equal(reader.rows(one, start, stop), reader.rows(other, start, stop))
            for start in range(0, rows, step)
            for stop in [min(rows, start + step)]
        )
