"""Find the scales of blocks, and their zero points, that lose least, each input channel counted by how strong it is.

A product loses sum over k of E[x_k^2] (w_k - w'_k)^2 where inputs are independent, so that the mean square of what a
channel is fed is the weight of its error. A scale of either sign is tried at several sizes around the one that clips
nothing, and fitted once to the integers that it gives by least squares; the idea is `make_qx_quants` of llama.cpp's
ggml-quants.c, and "importance matrices" are the same weights.

torch, since rows by the million are worked on here, on a GPU where there is one. All sums run over one block, so that
the result does not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgeexport.core import Codes, Format

if TYPE_CHECKING:
    import torch

CHUNK = 1 << 18
"""Elements of a weight that are searched at once: a few temporaries of 1 MB, which stay in the cache."""

SIZES = (1.1, 1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.62)
"""Of the scale that clips nothing."""

ENDS = (1.0, 0.93, 0.86, 0.79, 0.7)
"""Of a block's lowest and highest number, where it has a zero point."""

LEAST = 2.0**-24
"""The least float16 above zero."""


@dataclass(frozen=True)
class Grid:
    """float32 scales [N, blocks], each a float16, and float32 whole zero points of that shape, or None. A weight is
    scale * (integer - zero point)."""

    scales: torch.Tensor
    zeros: torch.Tensor | None
    low: int
    high: int
    block: int


def takes(fmt: Format) -> bool:
    """Whether blocks of this format are searched: 4-bit ones, symmetric or with zero points."""
    return fmt.integer and fmt.bits == 4 and not fmt.palette and fmt.shift in ("", "zero")


def search(weight: torch.Tensor, strength: torch.Tensor, fmt: Format) -> Grid:
    """The grid of least error for float32 `weight` [N, K], channels counting by `strength` [K], none of it negative."""
    import torch

    rows, width = weight.shape
    block = fmt.block or width
    step = max(1, CHUNK // width)
    counted = strength.clamp_min(float(strength.max()) * 1e-8 + 1e-30).view(1, width // block, block)
    starts = _with_zero_points if fmt.shift else _symmetric
    found = []
    for start in range(0, rows, step):
        x = weight[start : start + step].reshape(-1, width // block, block)
        found.append(_least(x, counted, starts(x, fmt.positive), fmt.positive))
    scales = torch.cat([scale for scale, _ in found])
    zeros = torch.cat([zero for _, zero in found if zero is not None]) if fmt.shift else None
    return Grid(scales, zeros, -8, 7, block)


def nearest(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The integers of `grid` nearest to each weight [N, K], float32."""
    blocks = weight.reshape(*grid.scales.shape, grid.block)
    units = blocks / safe(grid.scales)[..., None]
    if grid.zeros is not None:
        units += grid.zeros[..., None]
    return units.round_().clamp_(grid.low, grid.high).view(weight.shape)


def meaning(integers: torch.Tensor, grid: Grid) -> torch.Tensor:
    """float32 [N, K] that integers stand for."""
    blocks = integers.reshape(*grid.scales.shape, grid.block)
    moved = blocks if grid.zeros is None else blocks - grid.zeros[..., None]
    return (moved * grid.scales[..., None]).view(integers.shape)


def to_codes(integers: torch.Tensor, grid: Grid) -> Codes:
    """As they are stored."""
    return Codes(
        integers.cpu().numpy().astype(np.int8),
        grid.scales.cpu().numpy().astype(np.float16),
        None if grid.zeros is None else grid.zeros.cpu().numpy().astype(np.int8),
    )


Start = tuple["torch.Tensor", "torch.Tensor | None"]
"""Scales and zero points [n, blocks] to begin with."""


def _symmetric(x: torch.Tensor, positive: bool) -> Iterator[Start]:
    """Of blocks x [n, blocks, block]: the scale that clips nothing, in several sizes."""
    import torch

    low, high = x.amin(-1), x.amax(-1)
    full = torch.where(low.abs() >= high.abs(), low, high) / -8
    if positive:
        full = torch.maximum(low / -8, high / 7)
    for size in SIZES:
        yield _half(full * size, positive), None


def _with_zero_points(x: torch.Tensor, positive: bool) -> Iterator[Start]:
    """Of blocks x [n, blocks, block]: from the lowest number (or 0) to the highest (or 0), each in several sizes."""
    low, high = x.amin(-1).clamp_max_(0), x.amax(-1).clamp_min_(0)
    for below in ENDS:
        for above in ENDS:
            scale = _half((high * above - low * below) / 15, True)
            yield scale, (-8 - low * below / scale).round_().clamp_(-8, 7)


def _least(x: torch.Tensor, counted: torch.Tensor, starts: Iterator[Start], positive: bool) -> Start:
    """The start that loses least, as it is or with its scale fitted to the integers that it gives."""
    import torch

    best: Start | None = None
    least = x.new_full(x.shape[:-1], torch.inf)
    for scale, zeros in starts:
        for fitted in (False, True):
            units = x / safe(scale)[..., None]
            if zeros is not None:
                units += zeros[..., None]
            held = units.round_().clamp_(-8, 7)
            if zeros is not None:
                held -= zeros[..., None]
            loss = (counted * (held * scale[..., None] - x).square_()).sum(-1)
            better = loss < least
            if best is None:
                best = scale, zeros
            else:
                kept = best[1]
                moved = None if zeros is None or kept is None else torch.where(better, zeros, kept)
                best = torch.where(better, scale, best[0]), moved
            least = torch.where(better, loss, least)
            if not fitted:
                above, below = (counted * held * x).sum(-1), (counted * held * held).sum(-1)
                scale = _half(above / below.clamp_min(1e-30), positive or zeros is not None)
    assert best is not None, "there are sizes"
    return best


def _half(scale: torch.Tensor, positive: bool) -> torch.Tensor:
    """Rounded to float16, and above zero where it must be."""
    rounded = scale.clamp(-65504.0, 65504.0).half().float()
    return rounded.clamp_min_(LEAST) if positive else rounded


def safe(scale: torch.Tensor) -> torch.Tensor:
    """No scale of zero, by which all numbers are zero anyway."""
    import torch

    return torch.where(scale == 0, torch.ones_like(scale), scale)
