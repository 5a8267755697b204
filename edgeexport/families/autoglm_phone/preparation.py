"""The contracts by which pictures and sound are prepared for a config."""

from __future__ import annotations

import msgspec

from edgeexport import errors
from edgeexport.families.autoglm_phone.config import Config
from edgeexport.session.audio import AudioContract
from edgeexport.session.image_contract import PixelContract


def image_contract(config: Config) -> PixelContract:
    """A picture stretched to the CNN's square and normalised."""
    vision = config.vision_config
    return PixelContract(size=vision.image_size, mean=vision.mean, std=vision.std)


def audio_contract(config: Config) -> AudioContract:
    """Whisper's log-mel over the window. Raises: CheckpointError `bad-config`."""
    audio = config.audio_config
    try:
        return AudioContract(
            sample_rate=audio.sample_rate,
            n_fft=audio.n_fft,
            hop_length=audio.hop_length,
            n_mels=audio.n_mels,
            seconds=audio.seconds,
        )
    except ValueError as problem:
        raise errors.bad_config("audio_config", msgspec.to_builtins(audio), str(problem)) from problem
