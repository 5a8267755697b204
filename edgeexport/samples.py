"""Pictures and sounds like those to come, which a user gives to calibrate activations by: a folder of files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgeexport import errors
from edgeexport.core import Array, EncoderInput
from edgeexport.session.audio import read_wav
from edgeexport.session.image_file import read_image
from edgeexport.session.inputs import Inputs
from edgeexport.session.media import read_media
from edgeexport.session.preprocess import Preprocess

PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
SOUNDS = frozenset({".wav"})
MOST = 512
"""Files that are read: ranges settle within a few hundred."""


@dataclass(frozen=True)
class Samples:
    """The files in the order of their names, and a digest of names and bytes."""

    paths: tuple[Path, ...]
    digest: str

    def inputs(self, contract: Preprocess, component: str, variant: str) -> Iterator[Mapping[str, Array]]:
        """What a component's variant is fed for those of the files that are for it, one at a time.

        Raises: UsageError for a file that is damaged or too large.
        """
        inputs = Inputs(contract, _no_model)
        for path in self.paths:
            picture = path.suffix.lower() in PICTURES
            if (contract.image if picture else contract.audio) is None:
                continue
            made: EncoderInput = (
                inputs.prepare_image(read_image(path)) if picture else inputs.prepare_audio(read_wav(path))
            )
            if (made.component, made.variant) == (component, variant):
                yield made.inputs


def find(folder: Path) -> Samples:
    """The pictures and sounds in a folder; other files are left alone. Raises: UsageError `samples-unusable`,
    `media-unreadable`, `media-too-large`."""
    try:
        found = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES | SOUNDS)
    except OSError as problem:
        raise errors.samples_unusable(folder, problem.strerror or str(problem)) from problem
    if not found:
        raise errors.samples_unusable(folder, "it holds no picture (.png, .jpg, .webp, .bmp) and no .wav file")
    if len(found) > MOST:
        raise errors.samples_unusable(folder, f"it holds {len(found)} files, and at most {MOST} are read")
    state = hashlib.sha256()
    for path in found:
        state.update(path.name.encode() + b"\0" + hashlib.sha256(read_media(path)[0]).digest())
    return Samples(tuple(found), state.hexdigest())


def _no_model(component: str, variant: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
    raise AssertionError("preparing needs no model")
