"""How much a stored weight differs from the checkpoint's: sums over row blocks that merge into one figure."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]

CHUNK = 1 << 18
"""Elements compared at a time, so that the temporaries stay in the cache."""

RUN = 1024
"""Elements whose squares are added in float32."""


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

    Squares are added in float32 over `RUN` elements and in float64 beyond: the SNR is good to 1e-5 dB.
    Raises ValueError where the shapes differ (numpy would broadcast).
    """
    if reference.shape != stored.shape:
        raise ValueError(f"shapes differ: {reference.shape} and {stored.shape}")
    wanted, got = reference.reshape(-1), stored.reshape(-1)
    stats = WeightStats()
    work, flags = np.empty(min(CHUNK, got.size), np.float32), np.empty(min(CHUNK, got.size), np.bool_)
    for start in range(0, got.size, CHUNK):
        part = wanted[start : start + CHUNK]
        size = part.size
        stats = stats.merge(_compare(part, got[start : start + CHUNK], work[:size], flags[:size]))
    return stats


def _compare(wanted: Float32, got: Float32, work: Float32, flags: npt.NDArray[np.bool_]) -> WeightStats:
    """`compare_rows` of flat pieces; `work` and `flags` are temporaries of their size."""
    reference_zeros = int(np.count_nonzero(np.equal(wanted, 0, out=flags)))
    zeros = int(np.count_nonzero(np.equal(got, 0, out=flags)))
    signal = _energy(wanted)
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is counted below
        np.subtract(wanted, got, out=work)
        noise = _energy(work)
        largest = max(float(work.max()), -float(work.min()))
    bad = 0 if math.isfinite(largest) else got.size - int(np.count_nonzero(np.isfinite(got, out=flags)))
    if bad:
        return WeightStats(got.size, signal, math.inf, math.inf, reference_zeros, zeros, bad)
    return WeightStats(got.size, signal, noise, largest, reference_zeros, zeros)


def _energy(values: Float32) -> float:
    """The sum of squares."""
    whole = values.size // RUN * RUN
    runs, rest = values[:whole].reshape(-1, RUN), values[whole:]
    return float(np.vecdot(runs, runs).sum(dtype=np.float64)) + float(np.dot(rest, rest))
