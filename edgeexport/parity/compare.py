"""The few measures of difference that the ladder uses. A NaN anywhere makes the result NaN, which passes no gate."""

from __future__ import annotations

import math

import numpy as np

from edgeexport import errors
from edgeexport.core import Array


def max_abs(one: Array, other: Array) -> float:
    """Largest absolute difference of two arrays of one shape. Raises `nothing-compared` for empty or unlike ones."""
    _pair(one, other)
    return float(np.abs(one.astype(np.float64) - other).max())


def rms(values: Array) -> float:
    """Root of the mean square."""
    return float(np.sqrt(np.mean(np.square(values.astype(np.float64)))))


def snr_db(wanted: Array, got: Array) -> float:
    """Power of what is wanted over that of the difference, in dB; infinite where there is none."""
    _pair(wanted, got)
    noise = rms(wanted.astype(np.float64) - got)
    return math.inf if noise == 0 else 20 * math.log10(max(rms(wanted), 1e-300) / noise) if noise > 0 else math.nan


def margins(logits: Array) -> Array:
    """How far the best logit of each row of [N, V] lies above the second."""
    best = np.partition(logits, -2, axis=-1)[:, -2:]
    difference: Array = best[:, 1] - best[:, 0]
    return difference


def _pair(one: Array, other: Array) -> None:
    if one.shape != other.shape or one.size == 0:
        raise errors.nothing_compared("parity", f"shapes {one.shape} and {other.shape}")
