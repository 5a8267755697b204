"""MNN-LLM's call that takes embeddings and positions: its Python package has it inside, and offers token ids alone.

`Llm::forwardRaw`, which MNN's own classes for pictures and sound call, is reached in the package's library as Linux on
x86-64 passes C++ objects: by address, both ways, where they are not plain numbers (Itanium C++ ABI). An object of the
package keeps the address of what it stands for behind Python's own head.
Source: MNN 3.6 transformers/llm/engine/include/llm/llm.hpp, pymnn/src/llm.h, pymnn/src/expr.h.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from typing import Any

import numpy as np

from edgeexport import errors
from edgeexport.backends.mnn_engine import value_of
from edgeexport.core import Array

HEAD = object.__basicsize__
VTABLE = "_ZTVN3MNN11Transformer3LlmE"
FORWARD = "_ZN3MNN11Transformer3Llm10forwardRawENS_7Express4VARPES3_S3_St6vectorIS3_SaIS3_EE"
"""Llm::forwardRaw(VARP embeddings, VARP mask, VARP positions, std::vector<VARP> more) -> std::vector<VARP>"""
CACHE = "_ZN3MNN11Transformer3Llm14setKVCacheInfoEmmPii"
"""Llm::setKVCacheInfo(size_t add, size_t remove, int* reserve, int n_reserve)"""
FUNCTIONS = 16
"""Bytes of a class' table before its functions, which is where an object's first word points."""
NEW, DELETE = "_Znwm", "_ZdlPv"
VARP = 16
"""Bytes of a std::shared_ptr, which is all that a value of MNN's is."""


class _Vector(ctypes.Structure):
    """std::vector: where it begins, where it ends, and where its room does."""

    _fields_ = (("begin", ctypes.c_void_p), ("end", ctypes.c_void_p), ("room", ctypes.c_void_p))


class NativeLlm:
    """The engine behind an object of the package. Raises: ToolError `mnn-takes-no-embeddings`."""

    def __init__(self, llm: Any) -> None:
        import _mnncengine
        from MNN import expr

        if sys.platform != "linux" or platform.machine() != "x86_64":
            raise errors.mnn_takes_no_embeddings(f"this is {platform.machine()} with {platform.system()}")
        library = ctypes.CDLL(_mnncengine.__file__)
        word = ctypes.c_void_p
        try:
            table = ctypes.addressof(ctypes.c_char.in_dll(library, VTABLE))
            self._forward = _function(library, FORWARD, None, *[word] * 6)
            self._cache = _function(library, CACHE, None, word, ctypes.c_size_t, ctypes.c_size_t, word, ctypes.c_int)
            self._new = _function(library, NEW, word, ctypes.c_size_t)
            self._delete = _function(library, DELETE, None, word)
        except (AttributeError, ValueError) as problem:
            raise errors.mnn_takes_no_embeddings(f"its library has no such call: {problem}") from problem
        self._llm, self._expr = llm, expr
        if _word(_behind(llm)) != table + FUNCTIONS:
            raise errors.mnn_takes_no_embeddings("its objects are not laid out as in MNN 3.6")

    def forward(self, embeds: Array, positions: Array, forgotten: int) -> Array:
        """Forget the last tokens of the cache, as many as `forgotten`, and append those of the embeddings float32
        [T,hidden], at positions int32 [1,T] or [3,T]; the logits of the last one, float32 [V], or none at all where the
        engine failed."""
        mask = np.zeros((), np.float32)  # as the engine's own on a processor: its attention knows that it is causal
        given = [value_of(array) for array in (embeds[:, None], mask, positions)]
        made, more = _Vector(), _Vector()
        self._cache(_behind(self._llm), len(embeds), forgotten, None, 0)
        addresses = [_behind(value) for value in given]
        self._forward(ctypes.addressof(made), _behind(self._llm), *addresses, ctypes.addressof(more))
        if made.begin is None or made.end - made.begin != VARP:
            return np.zeros(0, np.float32)
        logits = self._adopted(made.begin)
        self._delete(made.begin)
        return np.asarray(logits.read(), np.float32).reshape(-1).copy()

    def _adopted(self, address: int) -> Any:
        """The value at an address, moved into an object of the package, which lets it go in its time."""
        value = self._expr.Var()
        place = self._new(VARP)
        ctypes.memmove(place, address, VARP)
        ctypes.c_void_p.from_address(id(value) + HEAD).value = place
        return value


def _function(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
    found = library[name]
    found.restype, found.argtypes = result, arguments
    return found


def _behind(held: Any) -> int:
    """The address that an object of the package keeps."""
    return _word(id(held) + HEAD)


def _word(address: int) -> int:
    return int(ctypes.c_uint64.from_address(address).value)
