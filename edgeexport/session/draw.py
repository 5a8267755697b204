"""An action drawn on the picture it was told for: rings for taps, an arrow for swipes, a caption for the rest.

All sizes follow the picture's shorter side. Marks are computed as distances to their outlines, so their edges are
smooth at every size and only the pixels of the mark change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from edgeexport import errors
from edgeexport.core import Array
from edgeexport.session.actions import (
    Action,
    DoubleTap,
    LongPress,
    Malformed,
    Point,
    Swipe,
    Tap,
    Wait,
    kind_of,
    to_pixels,
)
from edgeexport.session.image_file import Image

if TYPE_CHECKING:
    from PIL import ImageFont

FORMATS: Final[Mapping[str, tuple[str, Mapping[str, int]]]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", {"lossless": True}),
}
"""Suffix, and how Pillow saves it. JPEG keeps full colour resolution: thin red lines smear without it."""

Colour = tuple[int, int, int]
RED: Final[Colour] = (255, 32, 78)
WHITE: Final[Colour] = (255, 255, 255)
DARK: Final[Colour] = (20, 20, 28)
DARK_RED: Final[Colour] = (160, 0, 32)
"""Behind the caption of an answer that is no action. White on it has a contrast of 8 to 1."""

MAX_CAPTION_CHARS = 2000
"""More never fits legibly; a model's text may have 65,536."""
WIDE_FONTS: Final = (
    "DejaVuSans.ttf",
    "NotoSansCJK-Regular.ttc",
    "DroidSansFallbackFull.ttf",
    "wqy-microhei.ttc",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "msyh.ttc",
)
"""Looked for in the system's font folders where a caption needs more than Pillow's own font, which is plain ASCII and
little else. AutoGLM-Phone writes Chinese."""
BAND_PIXELS = 1 << 20
"""A mark is computed so many pixels at a time: an arrow over a large picture would take gigabytes at once."""


@dataclass(frozen=True)
class Stroke:
    """A line from (ax, ay) to (bx, by), `half` pixels to either side. With `radius` it is the outline that lies so far
    around that line; so a dot and a ring are strokes of length 0."""

    ax: float
    ay: float
    bx: float
    by: float
    half: float
    radius: float = 0.0

    def distance(self, x: Array, y: Array) -> Array:
        """Distance in pixels of the points to the edge, negative inside. x [1,W], y [H,1] -> [H,W]."""
        dx, dy = self.bx - self.ax, self.by - self.ay
        squared = dx * dx + dy * dy
        along = np.clip(((x - self.ax) * dx + (y - self.ay) * dy) / squared, 0, 1) if squared else np.float32(0)
        away = np.hypot(x - self.ax - along * dx, y - self.ay - along * dy)
        return np.abs(away - self.radius) - self.half

    def box(self, margin: float) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of all that is within `margin` of the edge."""
        grow = self.radius + self.half + margin
        return (
            min(self.ax, self.bx) - grow,
            min(self.ay, self.by) - grow,
            max(self.ax, self.bx) + grow,
            max(self.ay, self.by) + grow,
        )


def draw(image: Array, action: Action, out: Path) -> None:
    """Write the picture with the action drawn on it; its size stays, the file's suffix is the format.

    Tap: ring and cross; Double Tap: two rings; Long Press: a filled disc; Swipe: an arrow from a dot. What has no
    place, and a Tap's message, is written in a strip over the lower edge. `image`: uint8 [H,W,3], RGB.
    Raises: UsageError `unknown-picture-suffix`, `picture-not-written`, `not-an-image`, `no-pixels`.
    """
    check_out(out)
    _save(mark(image, action), out)


def check_out(out: Path) -> None:
    """Whether a picture can have this name and be put there; worth knowing before a model runs for minutes.

    Raises: UsageError `unknown-picture-suffix`, `picture-not-written`.
    """
    if out.suffix.lower() not in FORMATS:
        raise errors.unknown_picture_suffix(out, FORMATS)
    if not out.parent.is_dir():
        raise errors.picture_not_written(out, f"{out.parent} is no folder")


def mark(image: Array, action: Action) -> Array:
    """A copy of the picture, uint8 [H,W,3], with the action drawn on it. Raises: `not-an-image`, `no-pixels`."""
    canvas = Image(image).array.copy()
    height, width = canvas.shape[:2]
    points = to_pixels(action, width, height)
    text = caption(action)
    if text:
        _write(canvas, text, DARK_RED if isinstance(action, Malformed) else DARK)
    unit = max(1.0, min(height, width) / 150)
    if isinstance(action, Swipe):
        _outlined(canvas, _arrow(points["start"], points["end"], unit), unit)
    elif isinstance(action, Tap | DoubleTap | LongPress):
        x, y = points["element"]
        cross = _cross(x, y, unit)
        if isinstance(action, LongPress):
            _outlined(canvas, [Stroke(x, y, x, y, 6.5 * unit)], unit)
            _paint(canvas, cross, WHITE)
            return canvas
        radii = (6 * unit, 10.5 * unit) if isinstance(action, DoubleTap) else (6 * unit,)
        rings = [Stroke(x, y, x, y, unit / 2, radius) for radius in radii]
        _outlined(canvas, [*rings, *cross], unit)
    return canvas


def caption(action: Action) -> str:
    """What is written in words, on one line: "Launch: Settings"; "" for an action that is drawn."""
    texts = [getattr(action, name, None) for name in ("app", "text", "message", "instruction", "problem")]
    said = next((text for text in texts if text is not None), None)
    if isinstance(action, Wait):
        said = f"{action.duration:g} s"
    if said is None and isinstance(action, Tap | DoubleTap | LongPress | Swipe):
        return ""
    text = kind_of(action) if said is None else f"{kind_of(action)}: {said[:MAX_CAPTION_CHARS]}"
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


# marks


def _cross(x: float, y: float, unit: float) -> list[Stroke]:
    arm = 2.5 * unit
    return [Stroke(x - arm, y, x + arm, y, unit / 2), Stroke(x, y - arm, x, y + arm, unit / 2)]


def _arrow(start: Point, end: Point, unit: float) -> list[Stroke]:
    """A dot, a shaft, and a head of two strokes 30 degrees off the shaft, at most half as long as the shaft."""
    dot = Stroke(*start, *start, 2.5 * unit)
    length = math.dist(start, end)
    if not length:
        return [dot]
    back = math.atan2(start[1] - end[1], start[0] - end[0])
    head = min(9 * unit, length / 2)
    wings = [
        (end[0] + head * math.cos(back + turn), end[1] + head * math.sin(back + turn))
        for turn in (-math.pi / 6, math.pi / 6)
    ]
    return [dot, *[Stroke(*tail, *end, unit) for tail in (start, *wings)]]


def _outlined(canvas: Array, strokes: Sequence[Stroke], unit: float) -> None:
    """Red within white within a dark rim: one of them stands out from any picture."""
    _paint(canvas, strokes, DARK, 1.3 * unit)
    _paint(canvas, strokes, WHITE, 0.8 * unit)
    _paint(canvas, strokes, RED)


def _paint(canvas: Array, strokes: Sequence[Stroke], colour: Colour, grow: float = 0.0) -> None:
    """Blend `colour` over what the strokes, `grow` pixels wider on each side, cover of each pixel."""
    height, width = canvas.shape[:2]
    boxes = np.array([stroke.box(grow + 1) for stroke in strokes])
    left, top = np.maximum(0, np.floor(boxes[:, :2].min(0))).astype(int)
    right, bottom = np.minimum((width - 1, height - 1), np.ceil(boxes[:, 2:].max(0))).astype(int) + 1
    x = np.arange(left, right, dtype=np.float32)[None, :]
    step = max(1, BAND_PIXELS // max(1, right - left))
    for first in range(top, bottom, step):
        last = min(first + step, bottom)
        y = np.arange(first, last, dtype=np.float32)[:, None]
        distance = strokes[0].distance(x, y)
        for stroke in strokes[1:]:
            distance = np.minimum(distance, stroke.distance(x, y))
        covered = np.clip(0.5 + grow - distance, 0, 1)[:, :, None]
        band = canvas[first:last, left:right]
        blended = band * (1 - covered) + np.array(colour, np.float32) * covered
        canvas[first:last, left:right] = np.rint(blended).astype(np.uint8)


# captions


def _write(canvas: Array, text: str, background: Colour) -> None:
    """The text, wrapped, white in a strip over the lower edge, at most half as high as the picture."""
    from PIL import Image as pil
    from PIL import ImageDraw

    height, width = canvas.shape[:2]
    size = max(8, round(min(height, width) / 26))
    font = _font(text, size)
    margin = size // 3 if min(height, width) >= 64 else 1
    line = math.ceil(size * 1.25)
    lines = wrap(text, [font.getlength(letter) for letter in text], width - 2 * margin)
    fitting = max(1, (height // 2 - 2 * margin) // line)
    if len(lines) > fitting:
        lines = [*lines[: fitting - 1], lines[fitting - 1][:-1] + "…"]
    strip = min(height, len(lines) * line + 2 * margin)
    picture = pil.new("RGB", (width, strip), background)
    pen = ImageDraw.Draw(picture)
    for number, content in enumerate(lines):
        pen.text((margin, margin + number * line), content, fill=WHITE, font=font)
    canvas[height - strip :] = np.asarray(picture)


def wrap(text: str, widths: Sequence[float], room: float) -> list[str]:
    """Lines that fit into `room`, broken at the last space, or within a word that is longer than a line."""
    lines: list[str] = []
    start = space = 0
    used = 0.0
    for at, letter in enumerate(text):
        if letter == " ":
            space = at
        used += widths[at]
        if used > room and at > start:
            end = space if space > start else at
            lines.append(text[start:end])
            start = end + (text[end] == " ")
            used = sum(widths[start : at + 1])
    return [*lines, text[start:]]


def _font(text: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, or the installed one of WIDE_FONTS that has the most of the text's characters; a character
    that none has is shown as a box."""
    from PIL import ImageFont

    own = ImageFont.load_default(size)
    if not _missing(own, text):
        return own
    fonts = [own]
    for name in WIDE_FONTS:
        with suppress(OSError):  # not installed
            fonts.append(ImageFont.truetype(name, size))
    return min(fonts, key=lambda font: _missing(font, text))


def _missing(font: ImageFont.FreeTypeFont | ImageFont.ImageFont, text: str) -> int:
    """How many characters the font draws as it draws one that no font can have."""
    unknown = bytes(font.getmask("\U0010ffff"))
    return sum(bytes(font.getmask(letter)) == unknown for letter in set(text) - {" "})


# files


def _save(marked: Array, out: Path) -> None:
    from PIL import Image as pil

    name, options = FORMATS[out.suffix.lower()]
    file = BytesIO()
    try:
        pil.fromarray(marked).save(file, name, **options)
        out.write_bytes(file.getvalue())
    except (OSError, ValueError) as error:  # ValueError: larger than the format can be, or a null byte in the path
        problem = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise errors.picture_not_written(out, problem) from error
