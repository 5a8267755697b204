"""How much a stored weight differs from the checkpoint's: sums over row blocks that merge into one figure."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class WeightStats:
    """Sums over some rows of one tensor. `max_abs_error` is in the weights' own unit."""

    elements: int = 0
    signal: float = 0.0  # sum of squares of the reference
    noise: float = 0.0  # sum of squares of the difference
    max_abs_error: float = 0.0
    reference_zeros: int = 0
    zeros: int = 0
    nonfinite: int = 0

    def merge(self, other: WeightStats) -> WeightStats:
        """The sums over the rows of both."""
        return WeightStats(
            self.elements + other.elements,
            self.signal + other.signal,
            self.noise + other.noise,
            max(self.max_abs_error, other.max_abs_error),
            self.reference_zeros + other.reference_zeros,
            self.zeros + other.zeros,
            self.nonfinite + other.nonfinite,
        )

    @property
    def snr_db(self) -> float:
        """Signal to noise in dB: infinite where nothing differs, -infinite where a non-finite number is stored or
        where the reference is all zeros and the stored weight is not."""
        if self.nonfinite or (self.noise and not self.signal):
            return -math.inf
        return 10 * math.log10(self.signal / self.noise) if self.noise else math.inf

    @property
    def zero_share(self) -> float:
        """Share of stored elements that are zero; 0 for a tensor without elements."""
        return self.zeros / self.elements if self.elements else 0.0

    @property
    def added_zero_share(self) -> float:
        """Share of elements that are zero as stored beyond those that are zero in the reference."""
        return max(0, self.zeros - self.reference_zeros) / self.elements if self.elements else 0.0


def compare_rows(reference: Float32, stored: Float32) -> WeightStats:
    """Compare rows of the checkpoint with the same rows as stored and dequantised; both float32 of one shape.

    Sums are in float64. Raises ValueError where the shapes differ (numpy would broadcast).
    """
    if reference.shape != stored.shape:
        raise ValueError(f"shapes differ: {reference.shape} and {stored.shape}")
    nonfinite = stored.size - int(np.count_nonzero(np.isfinite(stored)))
    zeros = (int(np.count_nonzero(reference == 0)), int(np.count_nonzero(stored == 0)))
    wide = reference.reshape(-1).astype(np.float64)
    signal = float(np.dot(wide, wide))
    if nonfinite:
        return WeightStats(stored.size, signal, math.inf, math.inf, *zeros, nonfinite)
    np.subtract(wide, stored.reshape(-1), out=wide)
    noise = float(np.dot(wide, wide))
    return WeightStats(stored.size, signal, noise, float(np.max(np.abs(wide), initial=0.0)), *zeros, nonfinite)
