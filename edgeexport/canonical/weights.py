"""A weight in a graph that is still a reference: name, dtype and shape, and where its bytes lie."""

from __future__ import annotations

from typing import NoReturn

import onnx_ir as ir

from edgeexport.core import TensorRef

STORED_DTYPE = {
    "F64": ir.DataType.DOUBLE,
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
}
"""ONNX dtype of the encodings that ONNX can hold as they lie. Others (ggml's) count as FLOAT once decoded."""


class ReferenceTensor(ir.LazyTensor):
    """An initializer that has not been read, and that refuses to be: only a weight reader decides when and how much.

    A ggml encoding has no bytes of an ONNX dtype on disk; such a tensor stands for the float32 values it decodes to.
    """

    def __init__(self, name: str, ref: TensorRef) -> None:
        super().__init__(
            self._unread,
            dtype=STORED_DTYPE.get(ref.encoding, ir.DataType.FLOAT),
            shape=ir.Shape(ref.shape),
            name=name,
        )
        self.ref = ref

    def _unread(self) -> NoReturn:
        raise TypeError(f"{self.name} is a reference into {self.ref.file.name}: read it through a WeightReader")
