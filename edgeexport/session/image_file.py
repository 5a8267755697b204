"""Picture files decoded with Pillow: what is in them, upright and in RGB, or a reason why not."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import numpy as np

from edgeexport import errors
from edgeexport.core import Array
from edgeexport.session.media import read_media

FORMATS: Final = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
"""Pillow reads many more; each is a parser of untrusted bytes that nobody here needs."""
MAX_IMAGE_PIXELS = 100_000_000
"""Declared width times height. Reading a picture takes up to 20 bytes of memory for each."""

ORIENTATION = 0x0112
TURNS: Final[Mapping[Any, str]] = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
"""EXIF's orientation and Pillow's transposition. `ImageOps.exif_transpose` has the same, but rewrites all of the tags,
and fails over one that it cannot write."""

_FAILURES = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
"""What Pillow raises over a damaged file: its plugins say SyntaxError, OSError and whatever their parsing ran into."""


@dataclass(frozen=True, eq=False)
class Image:
    """A picture: uint8 [height, width, 3], RGB, upright. Raises: UsageError `not-an-image` for another array."""

    array: Array

    def __post_init__(self) -> None:
        shape = self.array.shape
        if self.array.dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
            found = f"{self.array.dtype} {list(shape)}"
            raise errors.not_an_image("the array of pixels", f"it is {found}; uint8 [height, width, 3] is needed")

    @property
    def height(self) -> int:
        return int(self.array.shape[0])

    @property
    def width(self) -> int:
        return int(self.array.shape[1])


def read_image(source: Path | bytes) -> Image:
    """The picture in a PNG, JPEG, WebP, BMP or GIF file (the first frame), as transformers' `load_image` sees it:
    turned upright by its EXIF orientation, then Pillow's `convert("RGB")`.

    So an alpha channel is dropped, not blended, and 16-bit grey values above 255 are white.

    Raises: UsageError `media-unreadable`, `media-too-large`, `not-an-image`, `damaged-image`, `image-too-large`.
    """
    data, where = read_media(source)
    if not data:
        raise errors.not_an_image(where, "it is empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on EXIF and on sizes that are checked here
        return Image(_decoded(data, where))


def _decoded(data: bytes, where: str) -> Array:
    from PIL import Image as pil
    from PIL import UnidentifiedImageError

    try:
        picture = pil.open(BytesIO(data), formats=FORMATS)
    except pil.DecompressionBombError as error:
        raise errors.image_too_large(where, str(error), MAX_IMAGE_PIXELS) from error
    except UnidentifiedImageError as error:
        raise errors.not_an_image(where, f"it does not start like {', '.join(FORMATS)}") from error
    except _FAILURES as error:
        raise errors.damaged_image(where, _reason(error)) from error
    with picture:
        width, height = picture.size
        if width * height > MAX_IMAGE_PIXELS:
            raise errors.image_too_large(where, f"it declares {width} x {height} pixels", MAX_IMAGE_PIXELS)
        try:
            picture.load()
            turn = TURNS.get(picture.getexif().get(ORIENTATION))
            upright = picture if turn is None else picture.transpose(pil.Transpose[turn])
            return np.array(upright.convert("RGB"))
        except pil.DecompressionBombError as error:
            raise errors.image_too_large(where, str(error), MAX_IMAGE_PIXELS) from error
        except _FAILURES as error:
            raise errors.damaged_image(where, _reason(error)) from error


def _reason(error: BaseException) -> str:
    return f"Pillow says: {error}" if str(error) else f"Pillow says: {type(error).__name__}"
