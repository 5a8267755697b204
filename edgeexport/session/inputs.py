"""From tokens, pictures and sound to what a decoder is fed, by the bundle's contract and the model's own components.

What runs a component is a function: the session gives one over open artifacts, the parity ladder one over graphs. So
what is proven is what ships.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgeexport import errors
from edgeexport.core import Array, EncoderInput, Finding
from edgeexport.session.audio import Sound, heard, log_mel
from edgeexport.session.image_contract import PatchContract
from edgeexport.session.image_file import Image
from edgeexport.session.images import choose_grid, patches, pixels
from edgeexport.session.preprocess import Preprocess

Run = Callable[[str, str, Mapping[str, Array]], Mapping[str, Array]]
"""(component, variant, inputs by name) -> outputs by name."""

STRETCH = 1.1
"""Times that a picture may be stretched in one direction before it is said."""
UNHEARD = 0.01
"""Seconds of sound that may be left out before it is said."""

VISION, AUDIO, EMBED, FUSION = "vision", "audio", "embed", "fusion"


@dataclass(frozen=True)
class Features:
    """What an encoder made of a picture or a sound: float32 [M, width]."""

    component: str
    values: Array
    grid: tuple[int, int] | None = None
    remarks: tuple[Finding, ...] = ()
    """What the model did not see or hear of what was given: `picture-stretched`, `sound-cut`."""


@dataclass(frozen=True)
class Fed:
    """Embeddings float32 [T, hidden] for the decoder, their M-RoPE positions int64 [3,T] or None, and the position
    that the next token will have."""

    embeds: Array
    rope: Array | None
    next_rope: int


class Inputs:
    """The way into one model whose embedding is a component of its own."""

    def __init__(self, contract: Preprocess, run: Run, close: Callable[[], None] = lambda: None) -> None:
        self.contract = contract
        self._run = run
        self.close = close

    def prepare_image(self, image: Image) -> EncoderInput:
        """Raises: UsageError `modality-missing`, and what the picture's own size makes impossible."""
        contract = self.contract.image
        if contract is None:
            raise errors.modality_missing("picture", "vision")
        if not isinstance(contract, PatchContract):
            bent = _stretched(image, contract.size, contract.size)
            return EncoderInput(VISION, "", {"pixels": pixels(image, contract)}, remarks=bent)
        rows, columns = choose_grid(image.height, image.width, contract)
        made, _ = patches(image, contract, (rows, columns))
        merge, patch = contract.merge_size, contract.patch_size
        bent = _stretched(image, rows * patch, columns * patch)
        return EncoderInput(VISION, f"{rows}x{columns}", {"patches": made}, (rows // merge, columns // merge), bent)

    def prepare_audio(self, sound: Sound) -> EncoderInput:
        """Raises: UsageError `modality-missing`, `bad-sample-rate`."""
        contract = self.contract.audio
        if contract is None:
            raise errors.modality_missing("sound", "audio")
        seconds = len(sound.samples) / sound.rate
        cut = (errors.sound_cut(seconds, contract.seconds),) if seconds > contract.seconds + UNHEARD else ()
        return EncoderInput(AUDIO, "", {"mel": log_mel(heard(sound, contract), contract)}, remarks=cut)

    def encode(self, prepared: EncoderInput) -> Features:
        """Run the encoder."""
        made = self._run(prepared.component, prepared.variant, prepared.inputs)["features"]
        return Features(prepared.component, made.reshape(-1, made.shape[-1]), prepared.grid, prepared.remarks)

    def expand(self, tokens: Sequence[int], prepared: Sequence[EncoderInput | Features]) -> list[int]:
        """The prompt with each picture's one placeholder repeated once per feature.

        Raises: UsageError `image-tokens-mismatch`.
        """
        pictures = [each for each in prepared if each.component == VISION]
        token = self.contract.image_token_id
        if self.contract.joining != "splice" or token is None:
            return list(tokens)
        places = sum(each == token for each in tokens)
        if places != len(pictures):
            raise errors.image_tokens_mismatch(places, len(pictures))
        waiting = iter(pictures)
        expanded: list[int] = []
        for each in tokens:
            expanded += [each] * _count(next(waiting)) if each == token else [each]
        return expanded

    def feed(self, ids: Array, features: Sequence[Features], rope: int, *, written: bool = False) -> Fed:
        """What the decoder is fed for token ids int64 [T], the first of them at M-RoPE position `rope`.

        An image token stands for no picture in what the model itself has `written`: it is a word like any other.
        Raises: UsageError `image-tokens-mismatch` where placeholders and features differ in number.
        """
        embeds = np.array(self._run(EMBED, "", {"input_ids": ids[None]})["inputs_embeds"][0])
        if self.contract.joining == "attend":
            if features:
                together = np.concatenate([each.values for each in features])[None]
                fused = self._run(FUSION, "", {"inputs_embeds": embeds[None], "features": together})
                embeds = np.asarray(fused["fused"][0])
            return Fed(embeds, None, rope + len(ids))
        token = None if written else self.contract.image_token_id
        places = np.flatnonzero(ids == token)
        wanted = sum(len(each.values) for each in features)
        if len(places) != wanted:
            raise errors.image_tokens_mismatch(len(places), wanted)
        if wanted:
            embeds[places] = np.concatenate([each.values for each in features])
        if self.contract.position_rows == 1:
            return Fed(embeds, None, rope + len(ids))
        rows, after = rope_positions(ids, token, features, rope)
        return Fed(embeds, rows, after)


def rope_positions(
    ids: Array, token: int | None, pictures: Sequence[EncoderInput | Features], start: int
) -> tuple[Array, int]:
    """M-RoPE positions int64 [3,T] (time, row, column), and the one after them.

    Text counts on in all three; a picture stands still in time, counts its own rows and columns, and moves what
    follows on by the larger of the two. Source: transformers 5.23, `Glm4vModel.get_rope_index`.
    """
    positions = np.empty((3, len(ids)), np.int64)
    waiting = iter(pictures)
    at, current = 0, start
    while at < len(ids):
        if ids[at] != token:
            positions[:, at] = current
            at, current = at + 1, current + 1
            continue
        each = next(waiting)
        assert each.grid is not None, "a spliced picture has a grid"
        rows, columns = each.grid
        stop = at + rows * columns
        positions[0, at:stop] = current
        positions[1, at:stop] = current + np.repeat(np.arange(rows), columns)
        positions[2, at:stop] = current + np.tile(np.arange(columns), rows)
        at, current = stop, current + max(rows, columns)
    return positions, current


def _stretched(image: Image, height: int, width: int) -> tuple[Finding, ...]:
    """What is said of a picture that is prepared at another shape, in pixels."""
    bent = (height * image.width) / (width * image.height)
    factor = max(bent, 1 / bent)
    given = image.height, image.width
    return (errors.picture_stretched(given, (height, width), factor),) if factor > STRETCH else ()


def _count(picture: EncoderInput | Features) -> int:
    if isinstance(picture, Features):
        return len(picture.values)
    assert picture.grid is not None, "a spliced picture has a grid"
    return picture.grid[0] * picture.grid[1]
