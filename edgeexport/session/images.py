"""Pictures prepared for a vision component as transformers prepares them, with Pillow and numpy alone.

Source of the patches: `Glm4vImageProcessorPil` and `Glm46VImageProcessorPil` of transformers 5.23, which compute the
same. Its torchvision backend rounds a resized byte in 500 the other way (one level, 0.015 after normalising).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from edgeexport import errors
from edgeexport.core import Array
from edgeexport.session.image_contract import (
    Grid,
    ImageContract,
    PatchContract,
    PixelContract,
    contract_from_processor,
)
from edgeexport.session.image_file import Image, read_image

__all__ = [
    "Grid",
    "Image",
    "ImageContract",
    "PatchContract",
    "PixelContract",
    "choose_grid",
    "contract_from_processor",
    "patches",
    "pixels",
    "placeholder_count",
    "read_image",
    "smart_grid",
    "smart_resize",
]

MAX_ASPECT = 200
"""The longer side over the shorter; transformers' smart_resize refuses more."""


def smart_resize(height: int, width: int, contract: PatchContract) -> tuple[int, int]:
    """The (height, width) that transformers' `smart_resize` gives a single picture, in pixels.

    Raises: UsageError `image-too-narrow`.
    """
    given = height, width
    factor, frames = contract.factor, contract.temporal_patch_size
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) / min(height, width) > MAX_ASPECT:
        raise errors.image_too_narrow(*given, MAX_ASPECT)
    tall, wide = round(height / factor) * factor, round(width / factor) * factor
    if frames * tall * wide > contract.max_pixels:
        shrink = math.sqrt(frames * height * width / contract.max_pixels)
        tall = max(factor, math.floor(height / shrink / factor) * factor)
        wide = max(factor, math.floor(width / shrink / factor) * factor)
    elif frames * tall * wide < contract.min_pixels:
        grow = math.sqrt(contract.min_pixels / (frames * height * width))
        tall = math.ceil(height * grow / factor) * factor
        wide = math.ceil(width * grow / factor) * factor
    return tall, wide


def smart_grid(height: int, width: int, contract: PatchContract) -> Grid:
    """The grid of a picture after `smart_resize`. Raises: UsageError `image-too-narrow`."""
    tall, wide = smart_resize(height, width, contract)
    return tall // contract.patch_size, wide // contract.patch_size


def choose_grid(height: int, width: int, contract: PatchContract) -> Grid:
    """The built grid that suits a picture best.

    It is the grid that `smart_resize` gives, if that was built. Otherwise the one whose shape is nearest to the
    picture's (the ratio of the two aspect ratios), of those the one whose number of patches is nearest to the smart
    grid's (again as a ratio), of those the one with fewer rows.

    Raises: UsageError `image-too-narrow`, `grid-not-built` if there are no grids.
    """
    smart = smart_grid(height, width, contract)
    if smart in contract.grids:
        return smart
    if not contract.grids:
        raise errors.grid_not_built(smart, ())

    def distance(grid: Grid) -> tuple[float, float, int]:
        rows, columns = grid
        shape = abs(math.log(rows * width / (columns * height)))
        size = abs(math.log(rows * columns / (smart[0] * smart[1])))
        return shape, size, rows

    return min(contract.grids, key=distance)


def placeholder_count(grid: Grid, contract: PatchContract) -> int:
    """How many image tokens a picture of this grid has in the prompt."""
    return grid[0] * grid[1] // contract.merge_size**2


def patches(image: Image, contract: PatchContract, grid: Grid | None = None) -> tuple[Array, Grid]:
    """float32 [rows * columns, 3 * temporal * patch * patch] and the grid: the smart one, or `grid` out of the built.

    Patches are in the order of the merger: merge x merge blocks from left to right and top to bottom, within a block
    the same. Values of a patch: colour, frame, row, column; all frames are the one picture.

    Raises: UsageError `image-too-narrow`, `grid-not-built`.
    """
    if grid is None:
        grid = smart_grid(image.height, image.width, contract)
    elif grid not in contract.grids:
        raise errors.grid_not_built(grid, contract.grids)
    rows, columns = grid
    patch, merge, frames = contract.patch_size, contract.merge_size, contract.temporal_patch_size
    resized = _resized(image, rows * patch, columns * patch)
    values = _normalised(resized, contract.rescale_factor, contract.mean, contract.std)
    blocks = values.reshape(3, rows // merge, merge, patch, columns // merge, merge, patch)
    ordered = blocks.transpose(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None]
    repeated = np.broadcast_to(ordered, (*ordered.shape[:5], frames, patch, patch))
    return np.ascontiguousarray(repeated.reshape(rows * columns, 3 * frames * patch * patch)), grid


def pixels(image: Image, contract: PixelContract) -> Array:
    """float32 [1, 3, size, size]. The picture is stretched to the square, as a CNN of fixed size was trained on."""
    resized = _resized(image, contract.size, contract.size)
    return _normalised(resized, 1 / 255, contract.mean, contract.std)[None]


def _resized(image: Image, height: int, width: int) -> Array:
    """uint8 [height, width, 3]. Pillow's bicubic widens its kernel when it shrinks, so it is antialiased."""
    from PIL import Image as pil

    return np.asarray(pil.fromarray(image.array).resize((width, height), resample=pil.Resampling.BICUBIC))


def _normalised(image: Array, factor: float, mean: Iterable[float], std: Iterable[float]) -> Array:
    """uint8 [H, W, 3] -> float32 [3, H, W].

    A byte has 256 values, so each is computed once, in transformers' precisions: the product in float64, the rest in
    float32.
    """
    levels = (np.arange(256, dtype=np.float64) * factor).astype(np.float32)
    channels = [
        ((levels - np.float32(middle)) / np.float32(spread))[image[:, :, channel]]
        for channel, (middle, spread) in enumerate(zip(mean, std, strict=True))
    ]
    return np.stack(channels)
