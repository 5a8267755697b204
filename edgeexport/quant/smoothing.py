"""Move outliers of what multiplications are fed into their weights, where a runtime rounds activations to int8 with one
scale for a whole token: its largest channel then decides how coarsely all others are held.

What a multiplication is fed comes out of a norm or of a product with another multiplication. Channel k of it is divided
by 2^e[k] where it is made (a norm's weight, a matrix's rows), and column k of every weight that reads it is multiplied
by as much. Powers of two change no bit of a float32 result, so the function is the same and the ladder can undo it
exactly; integers that are carried over stay what they are, since only the scales of their blocks change.

The exponents of a site are those of least predicted error, sum(E[(x' - x) W.T]^2), of several: the strength of channels
over that of weights (G. Xiao et al., "SmoothQuant", ICML 2023) in several powers, and none at all.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import msgspec
import numpy as np
import numpy.typing as npt

from edgeexport.core import Array, Codes, Format, QuantPlan
from edgeexport.quant.weights import dequantize_codes, encode_rows

Float32 = npt.NDArray[np.float32]
Int8 = npt.NDArray[np.int8]

FILE = "smoothing.json"

BALANCES = (0.5, 0.8, 1.0)
"""SmoothQuant's alpha: how much of the difference between channels goes into the weights."""
POWERS = (0.25, 0.5, 0.75, 1.0)
"""Of the whole way there."""
MOST = 6
"""Largest exponent: 2^6 of a float16 scale of usual size is far from both ends of float16."""


@dataclass(frozen=True)
class Fold:
    """`producer` is a norm's weight [K] or a matrix of K rows, which are divided by 2^exponents, int8 [K]; `consumers`
    are matrices [N, K], whose columns are multiplied by them."""

    producer: str
    consumers: tuple[str, ...]
    exponents: Int8


class Smoothing:
    """What is moved in one component. Safe to share between threads, and to pickle."""

    def __init__(self, folds: Sequence[Fold] = ()) -> None:
        self.folds = tuple(folds)
        self._rows = {fold.producer: fold.exponents for fold in folds}
        self._columns = {name: fold.exponents for fold in folds for name in fold.consumers}

    def __bool__(self) -> bool:
        return bool(self.folds)

    @cached_property
    def digest(self) -> str:
        """sha256 of all that is moved; "" where nothing is."""
        return hashlib.sha256(self.to_json()).hexdigest() if self else ""

    def smoothed(self, name: str, start: int, rows: Array) -> Array:
        """Float32 rows of a weight from `start` on, [.., width] (of a vector: elements), as they are stored."""
        return self._moved(name, start, rows, 1)

    def restored(self, name: str, start: int, rows: Array) -> Array:
        """Rows as they are stored, as they were: the inverse of `smoothed`, to the bit."""
        return self._moved(name, start, rows, -1)

    def codes(self, name: str, start: int, codes: Codes, fmt: Format) -> Codes:
        """Rows of a weight that keeps the checkpoint's integers: scales and offsets of blocks move, all columns of a
        block by as much."""
        if name not in self._rows and name not in self._columns:
            return codes
        count, blocks = codes.scales.shape
        moved = np.zeros((count, blocks), np.int32)
        if name in self._rows:
            moved -= self._rows[name][start : start + count, None]
        if name in self._columns:
            by_block = self._columns[name].reshape(blocks, -1)
            assert (by_block == by_block[:, :1]).all(), f"{name}: columns of a block move together"
            moved += by_block[:, 0]
        scales = np.ldexp(codes.scales.astype(np.float32), moved)
        if fmt.positive:
            scales = np.maximum(scales, np.float32(2.0**-24))
        offsets = None if codes.offsets is None else np.ldexp(codes.offsets.astype(np.float32), moved)
        return replace(codes, scales=scales.astype(np.float16), offsets=offsets)

    def _moved(self, name: str, start: int, rows: Array, sign: int) -> Array:
        if name in self._rows:
            own = -sign * self._rows[name][start : start + len(rows)].astype(np.int32)
            rows = np.ldexp(rows, own.reshape(-1, *[1] * (rows.ndim - 1)))
        if name in self._columns:
            rows = np.ldexp(rows, sign * self._columns[name].astype(np.int32))
        return rows

    def to_json(self) -> bytes:
        """Always the same text for the same exponents."""
        listed = [
            _Written(fold.producer, fold.consumers, base64.b64encode(fold.exponents.tobytes()).decode("ascii"))
            for fold in self.folds
        ]
        return msgspec.json.format(msgspec.json.encode(listed), indent=1) + b"\n"

    @classmethod
    def from_json(cls, text: bytes) -> Smoothing:
        """What `to_json` wrote. Raises ValueError for anything else."""
        try:
            return cls(
                [
                    Fold(each.producer, each.consumers, each.array())
                    for each in msgspec.json.decode(text, type=list[_Written])
                ]
            )
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as problem:
            raise ValueError(str(problem)) from problem

    def fit(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether these are weights of such shapes."""
        rows = all(len(each) == (shapes.get(name) or (0,))[0] for name, each in self._rows.items())
        return rows and all(len(each) == (shapes.get(name) or (0,))[-1] for name, each in self._columns.items())


class _Written(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A fold as it is written: exponents are the base64 of int8."""

    producer: str
    consumers: tuple[str, ...]
    exponents: str

    def array(self) -> Int8:
        found = np.frombuffer(base64.b64decode(self.exponents, validate=True), np.int8)
        if (np.abs(found.astype(np.int32)) > MOST).any():
            raise ValueError(f"exponents of {self.producer} are beyond {MOST}")
        return found


NOTHING = Smoothing()


@dataclass(frozen=True)
class Reader:
    """A weight that reads it: some of its rows, float32 [n, K], of how many, its format, and whether its integers are
    the checkpoint's own."""

    rows: Float32
    count: int
    fmt: Format
    carried: bool


def readers_of(names: Sequence[str], rows: Mapping[str, tuple[Float32, int]], plan: QuantPlan) -> list[Reader]:
    """The weights of these names, of which `rows` are some of so many."""
    return [Reader(*rows[name], plan.formats[name], name in plan.carried) for name in names]


def choose(fed: Float32, readers: Sequence[Reader]) -> Int8 | None:
    """The exponents [K] of least predicted error, by rows [n, K] of what is fed; None where moving nothing is best.

    A token counts by its error over the strength of its product, or over that of most, where it is weaker: the first
    token of a text can be a thousand times as strong as all others, and its error is nothing to it."""
    seen = _evened(fed, _energy(readers))
    best, least = None, _error(seen, readers, np.zeros(fed.shape[1], np.int8))
    tried: set[bytes] = set()
    for exponents in _candidates(seen, readers):
        if exponents.tobytes() in tried or not exponents.any():
            continue
        tried.add(exponents.tobytes())
        error = _error(seen, readers, exponents)
        if error < least:
            best, least = exponents, error
    return best


def _evened(fed: Float32, energy: Float32) -> Float32:
    """Rows [n, K] over the strength of their products, which moving changes nothing of."""
    products = (np.square(fed) * energy).sum(axis=1)
    usual = max(float(np.median(products)), 1e-30)
    evened: Float32 = (fed / np.sqrt(products + usual)[:, None]).astype(np.float32)
    return evened


def _candidates(seen: Float32, readers: Sequence[Reader]) -> Iterator[Int8]:
    """Exponents [K]; those of the columns of a block whose integers are carried over are equal."""
    block = max((reader.fmt.block or seen.shape[1] for reader in readers if reader.carried), default=1)
    peaks = np.square(seen).max(axis=0)
    fed, weights = (np.sqrt(part.reshape(-1, block).max(axis=1)) for part in (peaks, _energy(readers)))
    for balance in BALANCES:
        whole = balance * np.log2(np.maximum(fed, 1e-9)) - (1 - balance) * np.log2(np.maximum(weights, 1e-6))
        whole -= whole.mean()
        for power in POWERS:
            exponents = np.clip(np.rint(power * whole), -MOST, MOST).astype(np.int8)
            yield np.repeat(exponents, block)


def _energy(readers: Sequence[Reader]) -> Float32:
    """The sum of squares of each column of all weights together, float32 [K]."""
    total = np.zeros(readers[0].rows.shape[1], np.float32)
    for reader in readers:
        total += np.square(reader.rows).sum(axis=0) * np.float32(reader.count / len(reader.rows))
    return total


def _error(seen: Float32, readers: Sequence[Reader], exponents: Int8) -> float:
    """The mean squared error of all products, by rounding what they are fed and by rounding their weights. An error of
    rounding is taken to be spread evenly over a step and not to depend on others."""
    moved = exponents.astype(np.int32)
    rows = np.ldexp(seen, -moved)
    steps = (np.maximum(rows.max(axis=1), 0) - np.minimum(rows.min(axis=1), 0)) / np.float32(255)
    error = float(np.square(steps).mean()) / 12 * float(np.ldexp(_energy(readers), 2 * moved).sum())
    strength = np.square(rows).mean(axis=0)
    for reader in readers:
        if reader.carried and reader.fmt.shift == "int8":
            error += _error_of_offsets(rows, np.ldexp(reader.rows, moved), reader)
        elif not reader.carried:
            weight = np.ldexp(reader.rows, moved)
            lost = np.square(weight - dequantize_codes(encode_rows(weight, reader.fmt), reader.fmt)).sum(axis=0)
            error += reader.count / len(weight) * float((lost * strength).sum())
    return error


def _error_of_offsets(fed: Float32, weight: Float32, reader: Reader) -> float:
    """As `_error`, by rounding to int8 what blocks of carried integers are moved by, about the middle of their numbers,
    and the sums of the input's blocks that are multiplied by it."""
    sums = fed.reshape(len(fed), -1, reader.fmt.block).sum(axis=2)
    blocks = weight.reshape(len(weight), -1, reader.fmt.block)
    offsets = (blocks.min(axis=2) + blocks.max(axis=2)) / 2
    steps = np.abs(offsets).max(axis=1) / np.float32(127)
    rounded = float(np.square(steps).mean()) * float(np.square(sums).mean(axis=0).sum())
    steps = (np.maximum(sums.max(axis=1), 0) - np.minimum(sums.min(axis=1), 0)) / np.float32(255)
    fed_rounded = float(np.square(steps).mean()) * float(np.square(offsets).mean(axis=0).sum())
    return reader.count * (rounded + fed_rounded) / 12
