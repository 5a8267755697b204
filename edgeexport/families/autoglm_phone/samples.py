"""Write a held-out digit and a held-out word as files to ask about:
`python -m edgeexport.families.autoglm_phone.samples FOLDER`."""

from __future__ import annotations

import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import numpy as np
import typer

from edgeexport import errors
from edgeexport.console import Console
from edgeexport.families.autoglm_phone.data import SCENES, Clip, Picture, held_out_split, split

PICTURE, CLIP = "digit.png", "word.wav"
DIGIT, WORD = "seven", "three"

T = TypeVar("T")


def main(
    folder: Annotated[Path, typer.Argument(help="Where the files are written.")],
    calibration: Annotated[
        int, typer.Option(min=0, max=100, help="Write so many digits, scenes and words of the training part instead.")
    ] = 0,
) -> None:
    """Write the first held-out picture of a seven and the first held-out clip of a three; or files to calibrate by."""
    console = Console()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if calibration:
            _write_training(folder, calibration)
            console.say(f"{folder}: {3 * calibration} files that mini was trained on, for `build --samples {folder}`")
            return
        data = held_out_split()
        _write_picture(next(each for each in data.digits if each.label == DIGIT), folder / PICTURE)
        _write_clip(next(each for each in data.clips if each.label == WORD), folder / CLIP)
    except OSError as problem:
        raise errors.output_not_writable(folder, problem.strerror or str(problem)) from problem
    console.say(f"{folder / PICTURE}: a handwritten {DIGIT}; {folder / CLIP}: the word {WORD}")


def _write_training(folder: Path, count: int) -> None:
    """`count` each of digits, scenes and words, spread over all that there are."""
    data = split(False, scenes_each=-(-count // len(SCENES)), voices_each=1)
    for kind, pictures in (("digit", data.digits), ("scene", data.scenes)):
        for k, picture in enumerate(_spread(pictures, count)):
            _write_picture(picture, folder / f"{kind}-{k:03}.png")
    for k, clip in enumerate(_spread(data.clips, count)):
        _write_clip(clip, folder / f"word-{k:03}.wav")


def _spread(items: Sequence[T], count: int) -> list[T]:
    return [items[k * len(items) // count] for k in range(count)]


def _write_picture(picture: Picture, path: Path) -> None:
    from PIL import Image

    Image.fromarray(picture.array).save(path)


def _write_clip(clip: Clip, path: Path) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(clip.rate)
        file.writeframes(np.rint(clip.samples * 32767).clip(-32768, 32767).astype("<i2").tobytes())


if __name__ == "__main__":
    typer.run(main)
