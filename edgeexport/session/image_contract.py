"""What a bundle says about its pictures, and how to read it from a checkpoint's preprocessor_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, TypeAlias

import msgspec
from msgspec import Meta, Struct

from edgeexport import errors

MAX_PIXELS = 1 << 26
"""Bound of every picture's `temporal_patch_size * height * width` after its resize: 0.8 GB of float32 patches."""
Grid: TypeAlias = tuple[int, int]
"""Rows and columns of patches."""
Pixels = Annotated[int, Meta(ge=1, le=MAX_PIXELS)]
Edge = Annotated[int, Meta(ge=1, le=4096)]
Triple = tuple[
    Annotated[float, Meta(ge=-1000.0, le=1000.0)],
    Annotated[float, Meta(ge=-1000.0, le=1000.0)],
    Annotated[float, Meta(ge=-1000.0, le=1000.0)],
]
Scales = tuple[
    Annotated[float, Meta(ge=1e-6, le=1000.0)],
    Annotated[float, Meta(ge=1e-6, le=1000.0)],
    Annotated[float, Meta(ge=1e-6, le=1000.0)],
]


class PatchContract(Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="patches"):
    """RGB bytes, resized (`resample`, as Pillow does it), then `(byte * rescale_factor - mean) / std`, then patches.

    The resize goes to multiples of `patch_size * merge_size`, with `min_pixels <= temporal_patch_size * height * width
    <= max_pixels` (`shortest_edge` and `longest_edge` of transformers' `size`). Patches: see `patches`.
    `grids` are the (rows, columns) that were built into the bundle.
    """

    patch_size: Annotated[int, Meta(ge=1, le=256)]
    temporal_patch_size: Annotated[int, Meta(ge=1, le=16)]
    merge_size: Annotated[int, Meta(ge=1, le=16)]
    min_pixels: Pixels
    max_pixels: Pixels
    rescale_factor: Annotated[float, Meta(ge=1e-6, le=1000.0)]
    mean: Triple
    std: Scales
    grids: tuple[tuple[Edge, Edge], ...] = ()
    resample: Literal["bicubic"] = "bicubic"

    def __post_init__(self) -> None:
        """Raises ValueError, which msgspec reports as a ValidationError of the file that is read."""
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} is more than max_pixels {self.max_pixels}")
        if self.temporal_patch_size * self.factor**2 > MAX_PIXELS:
            raise ValueError(f"one merged patch of {self.factor} x {self.factor} has more than {MAX_PIXELS} pixels")
        for rows, columns in self.grids:
            if rows % self.merge_size or columns % self.merge_size:
                raise ValueError(f"grid {rows}x{columns} is not a multiple of merge_size {self.merge_size}")
            if rows * columns * self.temporal_patch_size * self.patch_size**2 > MAX_PIXELS:
                raise ValueError(f"grid {rows}x{columns} has more than {MAX_PIXELS} pixels")
        if len(set(self.grids)) != len(self.grids):
            raise ValueError("grids names one grid twice")

    @property
    def factor(self) -> int:
        """Every side is a multiple of this many pixels."""
        return self.patch_size * self.merge_size


class PixelContract(Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="pixels"):
    """RGB bytes, stretched to `size` x `size` (`resample`, as Pillow does it), then `(byte / 255 - mean) / std`."""

    size: Edge
    mean: Triple
    std: Scales
    resample: Literal["bicubic"] = "bicubic"


ImageContract: TypeAlias = PatchContract | PixelContract
"""What preprocess.json says about pictures; `kind` tells which."""

PROCESSORS: Final = tuple(
    f"{family}ImageProcessor{backend}" for family in ("Glm4v", "Glm46V") for backend in ("", "Fast", "Pil")
)
"""Values of `image_processor_type` that compute the same."""

DEFAULTS: Final[Mapping[str, Any]] = {
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "rescale_factor": 1 / 255,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
    "size": {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 15000},
}
"""Class attributes of transformers' `Glm4vImageProcessor` and `Glm46VImageProcessor`: used for a missing key."""

BICUBIC = 3
"""PIL.Image.Resampling.BICUBIC"""


def contract_from_processor(config: Mapping[str, Any]) -> PatchContract:
    """The contract, without grids, of a preprocessor_config.json or of a processor_config.json that has one inside.

    A missing key, and a null, is transformers' class default. Where `size` is missing, `min_pixels` and `max_pixels`
    are read as its two numbers: older files have them.

    Raises: CheckpointError `bad-preprocessor`.
    """
    inner = config.get("image_processor", config)
    if not isinstance(inner, Mapping):
        raise errors.bad_preprocessor("image_processor", inner, "a table of values is needed")
    given = {key: value for key, value in inner.items() if value is not None}
    _refuse_other_processors(given)
    smallest, largest = _pixel_limits(given)
    values = {**DEFAULTS, **given}
    plain = {
        "kind": "patches",
        "patch_size": values["patch_size"],
        "temporal_patch_size": values["temporal_patch_size"],
        "merge_size": values["merge_size"],
        "min_pixels": smallest,
        "max_pixels": largest,
        "rescale_factor": values["rescale_factor"],
        "mean": values["image_mean"],
        "std": values["image_std"],
    }
    try:
        return msgspec.convert(plain, PatchContract)
    except (msgspec.ValidationError, ValueError, OverflowError) as error:
        raise errors.bad_preprocessor("value", plain, str(error)[:400]) from error


def _refuse_other_processors(given: Mapping[str, Any]) -> None:
    name = given.get("image_processor_type", given.get("feature_extractor_type", PROCESSORS[0]))
    if name not in PROCESSORS:
        raise errors.bad_preprocessor("image_processor_type", name, f"known: {', '.join(PROCESSORS)}")
    for switch in ("do_resize", "do_rescale", "do_normalize"):
        if given.get(switch, True) is not True:
            raise errors.bad_preprocessor(switch, given[switch], "the vision component needs this step")
    if given.get("resample", BICUBIC) != BICUBIC:
        raise errors.bad_preprocessor("resample", given["resample"], f"only {BICUBIC} (bicubic) is prepared here")


def _pixel_limits(given: Mapping[str, Any]) -> tuple[Any, Any]:
    """Smallest and largest number of pixels, not checked yet."""
    size = given.get("size")
    if size is None:
        default = DEFAULTS["size"]
        return (
            given.get("min_pixels", default["shortest_edge"]),
            given.get("max_pixels", default["longest_edge"]),
        )
    if isinstance(size, Mapping):
        for smallest, largest in (("shortest_edge", "longest_edge"), ("min_pixels", "max_pixels")):
            if size.keys() == {smallest, largest}:
                return size[smallest], size[largest]
    raise errors.bad_preprocessor("size", size, "it must have shortest_edge and longest_edge, and nothing else")
