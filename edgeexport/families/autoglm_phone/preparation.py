"""The contracts by which pictures and sound are prepared for a config."""

from __future__ import annotations

from edgeexport.families.autoglm_phone.config import Config
from edgeexport.session.audio import AudioContract
from edgeexport.session.image_contract import PixelContract


def image_contract(config: Config) -> PixelContract:
    """A picture stretched to the CNN's square and normalised."""
    vision = config.vision_config
    return PixelContract(size=vision.image_size, mean=vision.mean, std=vision.std)


def audio_contract(config: Config) -> AudioContract:
    """Whisper's log-mel over the window."""
    audio = config.audio_config
    return AudioContract(
        sample_rate=audio.sample_rate,
        n_fft=audio.n_fft,
        hop_length=audio.hop_length,
        n_mels=audio.n_mels,
        seconds=audio.seconds,
    )
