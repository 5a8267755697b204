"""The weights of a canonical model as its plan stores them: read from the checkpoint, cast or quantised on the way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from edgeexport.checkpoint.weights import WeightReader
from edgeexport.core import PALETTE, Array, Codes, QuantPlan, TensorRef
from edgeexport.quant import prequantised, repack
from edgeexport.quant.codes import CodeStore
from edgeexport.quant.smoothing import NOTHING, Smoothing
from edgeexport.quant.stats import WeightStats, compare_rows
from edgeexport.quant.weights import Scratch, cast_rows, dequantize_codes, encode_rows

Samples = Callable[[str], Iterable[Mapping[str, Array]]]
"""A variant's inputs to calibrate by."""


def no_samples(variant: str) -> Iterable[Mapping[str, Array]]:
    """The `Samples` of those who calibrate nothing."""
    return ()


class PlannedWeights:
    """A `core.WeightSource` over a checkpoint. Safe to share between threads, each of which gets a scratch of its own,
    and to pickle: the copy opens the files anew."""

    def __init__(
        self,
        reader: WeightReader,
        weights: Mapping[str, TensorRef],
        plan: QuantPlan,
        samples: Samples = no_samples,
        codes: CodeStore | None = None,
        smoothing: Smoothing = NOTHING,
    ) -> None:
        """`codes` are of weights that are smoothed already."""
        self._reader = reader
        self._weights = weights
        self._plan = plan
        self._samples = samples
        self._codes = codes
        self._smoothing = smoothing
        self._local = threading.local()

    def __reduce__(self) -> tuple[type[PlannedWeights], tuple[Any, ...]]:
        held = self._reader, self._weights, self._plan, self._samples, self._codes, self._smoothing
        return PlannedWeights, held

    def samples(self, variant: str) -> Iterable[Mapping[str, Array]]:
        """What the user gave to calibrate this variant by."""
        return self._samples(variant)

    def float_rows(self, name: str, start: int, stop: int) -> Array:
        """Rows (of a vector: elements) in the tensor's float format. Raises `nonfinite-weight`, `weight-too-large`."""
        rows = self._smoothing.smoothed(name, start, self._reader.rows(self._weights[name], start, stop))
        return cast_rows(rows, self._plan.formats[name], name=name, first_row=start)

    def quantized_rows(self, name: str, start: int, stop: int) -> Codes:
        """Rows of an integer format, those of a convolution [rows, elements of one]: the checkpoint's own integers
        where the plan carries them, those of `codes` where it has the weight, else rounded. Raises as `float_rows`."""
        ref, fmt = self._weights[name], self._plan.formats[name]
        if name in self._plan.carried:
            carry = repack.carried_rows if ref.packing is None else prequantised.carried_rows
            return self._smoothing.codes(name, start, carry(self._reader, ref, fmt, start, stop), fmt)
        if self._codes is not None and name in self._codes:
            return self._codes.rows(name, start, stop)
        rows = self._smoothing.smoothed(name, start, self._reader.rows(ref, start, stop)).reshape(stop - start, -1)
        return encode_rows(rows, fmt, name=name, first_row=start, scratch=self._scratch())

    def stored_rows(self, name: str, start: int, stop: int) -> Array:
        """float32 rows as an artifact holds them: after rounding to the format and back."""
        fmt = self._plan.formats[name]
        if fmt.palette:
            first, last = start // PALETTE * PALETTE, -(-stop // PALETTE) * PALETTE
            return dequantize_codes(self.quantized_rows(name, first, last), fmt)[start - first : stop - first]
        if fmt.integer:
            rows = dequantize_codes(self.quantized_rows(name, start, stop), fmt)
            return rows.reshape(-1, *self._weights[name].shape[1:])
        return self.float_rows(name, start, stop).astype("float32", copy=False)

    def compare(self, name: str, start: int, stop: int, stored: Array) -> WeightStats:
        """Compare float32 rows that an artifact holds with the checkpoint's, which are read for this alone."""
        wanted = self._reader.rows(self._weights[name], start, stop)
        return compare_rows(self._smoothing.smoothed(name, start, wanted), stored.reshape(wanted.shape))

    def _scratch(self) -> Scratch:
        if not hasattr(self._local, "scratch"):
            self._local.scratch = Scratch()
        scratch: Scratch = self._local.scratch
        return scratch
