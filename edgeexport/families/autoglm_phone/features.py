"""What the frozen towers make of the data, computed once and kept in the cache folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeexport.core import Array, Progress
from edgeexport.families.autoglm_phone.config import Config
from edgeexport.families.autoglm_phone.data import Clip, Item, Picture, Split
from edgeexport.families.autoglm_phone.model import Vision, audio_encoder
from edgeexport.families.autoglm_phone.preparation import audio_contract, image_contract
from edgeexport.session.audio import log_mel
from edgeexport.session.image_file import Image
from edgeexport.session.images import pixels

BATCH = 16


@dataclass(frozen=True, eq=False)
class Features:
    """Tower features float16 by picture and by clip: [49, 1280] and [200, 384] each."""

    pictures: dict[Picture, Array]
    clips: dict[Clip, Array]

    def of(self, items: Sequence[Item]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """float32 [B, M, width] of the items' pictures and of their clips; None where the items have none."""
        pictures = [self.pictures[item.picture] for item in items if item.picture is not None]
        clips = [self.clips[item.clip] for item in items if item.clip is not None]
        return _stacked(pictures), _stacked(clips)


def _stacked(arrays: list[Array]) -> torch.Tensor | None:
    return torch.from_numpy(np.stack(arrays)).float() if arrays else None


def tower(module: Any, weights: dict[str, Array], prefix: str) -> Any:
    """The module with its weights, frozen."""
    state = {name.removeprefix(prefix): torch.from_numpy(np.array(value)).float() for name, value in weights.items()
             if name.startswith(prefix)}  # fmt: skip
    missing = module.load_state_dict(state, strict=False).missing_keys
    assert all(name.endswith("num_batches_tracked") for name in missing), missing
    return module.eval().requires_grad_(False)


def compute(data: Split, config: Config, weights: dict[str, Array], cache: Path, watch: Progress) -> Features:
    """Features of all pictures and clips, prepared exactly as a session prepares them."""
    pictures, clips = (*data.digits, *data.scenes), data.clips

    def see() -> Array:
        vision, contract = tower(Vision(config.vision_config), weights, "vision."), image_contract(config)
        prepared = (pixels(Image(each.array), contract) for each in pictures)
        return _run(prepared, len(pictures), vision, watch)

    def hear() -> Array:
        audio, contract = tower(audio_encoder(config.audio_config), weights, "audio."), audio_contract(config)
        prepared = (log_mel(each.samples, contract) for each in clips)
        return _run(prepared, len(clips), lambda mel: audio(mel).last_hidden_state, watch)

    seen = _remembered(cache, [each.array for each in pictures], see)
    heard = _remembered(cache, [each.samples for each in clips], hear)
    return Features(dict(zip(pictures, seen, strict=True)), dict(zip(clips, heard, strict=True)))


def _run(prepared: Any, count: int, module: Any, watch: Progress) -> Array:
    made: list[Array] = []
    batch: list[Array] = []
    for i, each in enumerate(prepared):
        batch.append(each)
        if len(batch) == BATCH or i == count - 1:
            with torch.no_grad():
                made += list(module(torch.from_numpy(np.concatenate(batch))).numpy().astype(np.float16))
            batch.clear()
            watch(i + 1, count)
    return np.stack(made)


def _remembered(cache: Path, inputs: Sequence[Array], make: Callable[[], Array]) -> Array:
    """The result of `make`, kept under a digest of its inputs."""
    digest = hashlib.sha256()
    for each in inputs:
        digest.update(str(each.shape).encode() + each.tobytes())
    path = cache / f"{digest.hexdigest()[:24]}.npy"
    if path.is_file():
        return np.asarray(np.load(path, allow_pickle=False))
    made = make()
    cache.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npy")
    np.save(partial, made)
    partial.replace(path)
    return made
