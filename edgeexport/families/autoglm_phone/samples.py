"""Write a held-out digit and a held-out word as files to ask about:
`python -m edgeexport.families.autoglm_phone.samples FOLDER`."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from edgeexport import errors
from edgeexport.console import Console
from edgeexport.families.autoglm_phone.data import held_out_split

PICTURE, CLIP = "digit.png", "word.wav"
DIGIT, WORD = "seven", "three"


def main(folder: Annotated[Path, typer.Argument(help="Where digit.png and word.wav are written.")]) -> None:
    """Write the first held-out picture of a seven and the first held-out clip of a three."""
    from PIL import Image

    console = Console()
    data = held_out_split()
    picture = next(each for each in data.digits if each.label == DIGIT)
    clip = next(each for each in data.clips if each.label == WORD)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.array).save(folder / PICTURE)
        with wave.open(str(folder / CLIP), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(clip.rate)
            file.writeframes(np.rint(clip.samples * 32767).clip(-32768, 32767).astype("<i2").tobytes())
    except OSError as problem:
        raise errors.output_not_writable(folder, problem.strerror or str(problem)) from problem
    console.say(f"{folder / PICTURE}: a handwritten {DIGIT}; {folder / CLIP}: the word {WORD}")


if __name__ == "__main__":
    typer.run(main)
