"""GPTQ: choose integers column by column, each column's error made up for by those that are still to come.

E. Frantar, S. Ashkboos, T. Hoefler, D. Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (ICLR 2023), with columns of strong inputs first and scales fixed before ("act-order" with "static
groups"), so that blocks stay where they are in the row.

The factor U with inverse(H) = U.T @ U is found without inverting H: where H, its rows and columns in reverse, is
L @ L.T, U is the inverse of L with its own in reverse. Both steps are written in blocks, of which only the small
ones on the diagonal are LAPACK's: those depend on the number of threads, products of matrices do not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from edgeexport.quant.search import Grid, safe

if TYPE_CHECKING:
    import torch

DAMPING = 0.01
"""Of the mean diagonal, added to it."""

STEP = 128
"""Columns whose errors are carried to the others at once."""

PANEL = 256
"""Rows and columns of a diagonal block of the factorisation."""

EXACT = 2048
"""Wider Hessians are factored in float32: the sum of the errors of a layer does not change by a thousandth, and the
memory and time of twice the width does."""


class Factor:
    """What GPTQ needs of one Hessian, for all weights that read the same input: the order of the columns and U."""

    def __init__(self, hessian: torch.Tensor) -> None:
        """float32 [K, K], symmetric; it is overwritten, since two of a wide layer are more than there is room for. A
        channel that was never fed anything counts for nothing."""
        import torch

        diagonal = hessian.diagonal()
        diagonal[diagonal <= 0] = 1
        diagonal += DAMPING * diagonal.mean()
        self.order = torch.argsort(diagonal, descending=True, stable=True)
        _reorder(hessian, self.order.flip(0))
        self.u = inverse_factor(hessian.double() if len(hessian) <= EXACT else hessian).float()


def inverse_factor(backwards: torch.Tensor) -> torch.Tensor:
    """Upper U [K, K] with inverse(H) = U.T @ U, of a positive definite H whose rows and columns are given in reverse,
    in its place."""
    return _turned(_invert(_cholesky(backwards)))


def _reorder(a: torch.Tensor, order: torch.Tensor) -> None:
    """Rows and columns of a square matrix in this order, in its place."""
    panels = [slice(start, start + PANEL) for start in range(0, len(a), PANEL)]
    for panel in panels:
        a[:, panel] = a[:, panel][order]
    for panel in panels:
        a[panel] = a[panel][:, order]


def _turned(a: torch.Tensor) -> torch.Tensor:
    """A square matrix with its rows and columns in reverse, in its place."""
    size = len(a)
    middle = size // 2
    for start in range(0, middle, PANEL):
        stop = min(middle, start + PANEL)
        upper, lower = a[start:stop], a[size - stop : size - start]
        kept = upper.flip(0, 1)
        upper.copy_(lower.flip(0, 1))
        lower.copy_(kept)
    if size % 2:
        a[middle].copy_(a[middle].flip(0))
    return a


def _cholesky(a: torch.Tensor) -> torch.Tensor:
    """L of a = L @ L.T, in the place of `a`; what is above the diagonal stays what it was."""
    size = len(a)
    for i in range(0, size, PANEL):
        j = min(size, i + PANEL)
        a[i:j, i:j] = _factor(a[i:j, i:j])
        if j < size:
            a[j:, i:j] = a[j:, i:j] @ _inverse_of_lower(a[i:j, i:j]).T
            for start in range(j, size, 8 * PANEL):  # the lower half alone
                stop = min(size, start + 8 * PANEL)
                a[start:, start:stop].addmm_(a[start:, i:j], a[start:stop, i:j].T, alpha=-1)
    return a


def _factor(block: torch.Tensor) -> torch.Tensor:
    """L of a diagonal block. One that rounding left indefinite is damped until it is not."""
    import torch

    more = block.diagonal().abs().mean() * DAMPING
    for _ in range(8):
        lower, failed = _alone(lambda: torch.linalg.cholesky_ex(block))
        if not int(failed):
            break
        block.diagonal().add_(more)
        more = more * 10
    return lower


def _invert(lower: torch.Tensor) -> torch.Tensor:
    """The inverse of a lower triangular matrix, in its place, zeros above."""
    size = len(lower)
    starts = range(0, size, PANEL)
    for i in starts:
        j = min(size, i + PANEL)
        inverse = _inverse_of_lower(lower[i:j, i:j])
        lower[i:j, i:j] = inverse
        lower[i:j, j:] = 0
        if i:
            lower[i:j, :i] = -inverse @ (lower[i:j, :i] @ lower[:i, :i])
    return lower


def _inverse_of_lower(block: torch.Tensor) -> torch.Tensor:
    import torch

    one = torch.eye(len(block), dtype=block.dtype, device=block.device)
    return _alone(lambda: torch.linalg.solve_triangular(block.tril(), one, upper=False))


T = TypeVar("T")


def _alone(work: Callable[[], T]) -> T:
    """What depends on the number of threads, on one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return work()
    finally:
        torch.set_num_threads(before)


def gptq(weight: torch.Tensor, factor: Factor, grid: Grid) -> tuple[torch.Tensor, float]:
    """Integers [N, K], float32, for `weight` [N, K] on this grid, and the error that they make: the mean over what the
    calibration fed it of (x @ (weight - held).T) ** 2, summed over rows, the damping's part with it. Rows do not
    depend on each other."""
    import torch

    rows, width = weight.shape
    left = weight.T[factor.order].contiguous()  # columns are rows here: each is read at one stretch
    chosen = torch.empty_like(left)
    scales = grid.scales.T.contiguous()
    zeros = None if grid.zeros is None else grid.zeros.T.contiguous()
    divisors = safe(scales)
    groups = (factor.order // grid.block).tolist()
    diagonal = factor.u.diagonal().tolist()
    error = torch.empty(STEP, rows, device=weight.device)
    loss = 0.0
    for start in range(0, width, STEP):
        stop = min(width, start + STEP)
        for j in range(start, stop):
            group = groups[j]
            q = left[j] / divisors[group]
            if zeros is not None:
                q += zeros[group]
            q.round_().clamp_(grid.low, grid.high)
            chosen[j] = q
            held = q if zeros is None else q - zeros[group]
            lost = torch.addcmul(left[j], held, scales[group], value=-1).div_(diagonal[j])
            error[j - start] = lost
            if j + 1 < stop:
                left[j + 1 : stop].addr_(factor.u[j, j + 1 : stop], lost, alpha=-1)
        loss += float(error[: stop - start].square().sum())
        if stop < width:
            left[stop:].addmm_(factor.u[start:stop, stop:].T, error[: stop - start], alpha=-1)
    integers = torch.empty_like(chosen)
    integers[factor.order] = chosen
    return integers.T.contiguous(), loss
