"""Sound prepared for an audio component as transformers' WhisperFeatureExtractor prepares it, with numpy alone."""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
from msgspec import Meta, Struct

from edgeexport.core import Array
from edgeexport.limits import UNTRUSTED
from edgeexport.session.wav import Sound, read_wav, refuse_rate, refuse_samples

__all__ = ["AudioContract", "Sound", "heard", "log_mel", "mel_filters", "read_wav", "resample"]

MAX_HZ = 8000.0
"""Upper end of the highest mel filter, at any sample rate."""
FLOOR = 1e-10
"""Smallest power of a mel band before its logarithm."""
RANGE = 8.0
"""log10 of the loudest band's power over the quietest's: what lies lower is lifted."""

BLOCK = 1024
"""Frames that are transformed at once."""

SIDE_TAPS = 40
"""Half the length of the resampling filter, in samples of the lower of the two rates."""
CUTOFF = 0.9375
"""Where the filter is at half amplitude, as a part of the lower rate's Nyquist frequency."""
KAISER_BETA = 7.857
"""0.1102 * (A - 8.7) for A = 80 dB: Kaiser's formula, as in Oppenheim and Schafer, Discrete-Time Signal Processing."""


class AudioContract(Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="whisper-log-mel"):
    """Mono sound at `sample_rate`, cut or filled with silence to `seconds`, as log-mel float32 [1, n_mels, frames].

    Steps: mirrored at both ends by n_fft / 2; frames of n_fft every hop_length under a periodic Hann window; power of
    the Fourier transform; n_mels Slaney filters from 0 to 8000 Hz, of equal area; log10 with a floor of 1e-10; lifted
    to the loudest value - 8; (x + 4) / 4. The frame after the last whole hop is left out.
    """

    sample_rate: Annotated[int, Meta(ge=16_000, le=48_000)]
    n_fft: Annotated[int, Meta(ge=32, le=4096, multiple_of=2)]
    hop_length: Annotated[int, Meta(ge=16, le=4096)]
    n_mels: Annotated[int, Meta(ge=1, le=256)]
    seconds: Annotated[float, Meta(gt=0.0, le=600.0)]

    def __post_init__(self) -> None:
        """Raises ValueError, which msgspec reports as a ValidationError of the file that is read."""
        inexact = abs(self.seconds * self.sample_rate - self.samples) > 1e-6
        if inexact or self.samples % self.hop_length:
            raise ValueError(
                f"{self.seconds:g} s at {self.sample_rate} Hz are not whole hops of {self.hop_length} samples"
            )
        if self.samples <= self.n_fft:
            raise ValueError(f"a window of {self.samples} samples is shorter than n_fft {self.n_fft}")
        if self.frames * self.n_fft > UNTRUSTED.fourier or self.frames * self.n_mels > UNTRUSTED.spectrum:
            raise ValueError(f"{self.frames} frames of {self.n_fft} samples and {self.n_mels} bands are too many")

    @property
    def samples(self) -> int:
        """Number of samples in the window."""
        return round(self.seconds * self.sample_rate)

    @property
    def frames(self) -> int:
        """Number of columns of the spectrogram."""
        return self.samples // self.hop_length


def heard(sound: Sound, contract: AudioContract) -> Array:
    """float32 samples at the contract's rate of what its window holds of a sound: what lies behind it is not resampled.

    Raises: UsageError `bad-sample-rate`, `bad-sound`.
    """
    refuse_rate(sound.rate)
    ratio = sound.rate / contract.sample_rate
    needed = math.ceil(contract.samples * ratio) + _side(sound.rate, contract.sample_rate) + 1
    return resample(sound.samples[:needed], sound.rate, contract.sample_rate)[: contract.samples]


def log_mel(samples: Array, contract: AudioContract) -> Array:
    """float32 [1, n_mels, frames] of float32 [N] samples at the contract's rate.

    Longer sounds are cut at the window's end, shorter ones filled with zeros; silence is -1.5 everywhere.
    Source: transformers 5.23, `WhisperFeatureExtractor._np_extract_fbank_features`.

    Raises: UsageError `bad-sound`.
    """
    refuse_samples(samples)
    window = np.zeros(contract.samples, np.float64)
    kept = samples[: contract.samples]
    window[: len(kept)] = kept
    padded = np.pad(window, contract.n_fft // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, contract.n_fft)[:: contract.hop_length]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(contract.n_fft) / contract.n_fft)
    power = np.empty((contract.frames, contract.n_fft // 2 + 1))
    for first in range(0, contract.frames, BLOCK):  # frames overlap, and all of them side by side are many
        rows = slice(first, min(first + BLOCK, contract.frames))
        spectrum = np.fft.rfft(frames[rows] * hann, axis=1)
        power[rows] = spectrum.real**2 + spectrum.imag**2
    filters = mel_filters(contract.sample_rate, contract.n_fft, contract.n_mels)
    logs = np.log10(np.maximum(FLOOR, filters @ power.T))
    lifted = np.maximum(logs, logs.max() - RANGE)
    return np.asarray(((lifted + 4.0) / 4.0).astype(np.float32)[None])


def mel_filters(sample_rate: int, n_fft: int, n_mels: int) -> Array:
    """float64 [n_mels, n_fft / 2 + 1]: triangles of equal area, evenly spaced on Slaney's mel scale from 0 to 8000 Hz.

    Source: M. Slaney, Auditory Toolbox, Technical Report 1998-010, as librosa's `filters.mel` has it.
    """
    bins = np.linspace(0.0, sample_rate // 2, n_fft // 2 + 1)
    edges = _hertz(np.linspace(0.0, _mel(MAX_HZ), n_mels + 2))
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising = (bins - low) / (middle - low)
    falling = (high - bins) / (high - middle)
    triangles = np.maximum(0.0, np.minimum(rising, falling))
    return np.asarray(triangles * (2.0 / (high - low)))


def _mel(hertz: float) -> float:
    """Slaney's scale above its knee at 1000 Hz (15 mel): logarithmic, 27 mel for a factor of 6.4."""
    return 15.0 + 27.0 * math.log(hertz / 1000.0) / math.log(6.4)


def _hertz(mels: Array) -> Array:
    """The scale read backwards: 200 / 3 Hz a mel up to 1000 Hz, and a factor of 6.4 for 27 mel above."""
    return np.where(mels < 15.0, mels * 200.0 / 3.0, 1000.0 * 6.4 ** ((mels - 15.0) / 27.0))


def resample(samples: Array, rate: int, target: int) -> Array:
    """float32 [ceil(N * target / rate)] at `target` Hz, of float32 [N] samples at `rate` Hz; sample 0 stays in place.

    A Kaiser-windowed sinc, one set of taps for each of the `target / gcd` positions between two samples. Up to 0.875
    of the lower Nyquist frequency (7 kHz at 16 kHz) amplitudes keep within 0.1 dB; what would fold back, and images of
    what was there, lie below -60 dB.

    Raises: UsageError `bad-sample-rate`, `bad-sound`.
    """
    refuse_rate(rate)
    refuse_rate(target)
    refuse_samples(samples)
    if rate == target:
        return samples
    common = math.gcd(rate, target)
    phases, stride = target // common, rate // common
    lower = CUTOFF * min(1.0, target / rate)  # cutoff as a part of the source's Nyquist frequency
    side = _side(rate, target)
    length = -(-len(samples) * phases // stride)
    padded = np.pad(samples, (side - 1, side))
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * side)
    result = np.empty(length, np.float32)
    for phase in range(min(phases, length)):
        first, part = divmod(phase * stride, phases)
        taps = _taps(part / phases, side, lower)
        chosen = result[phase::phases]
        chosen[:] = windows[first::stride][: len(chosen)] @ taps
    return result


def _side(rate: int, target: int) -> int:
    """Half the length of the filter, in samples at `rate`."""
    return math.ceil(SIDE_TAPS * max(1.0, rate / target))


def _taps(fraction: float, side: int, cutoff: float) -> Array:
    """float32 [2 * side]: weights of the samples around a position that lies `fraction` after sample `side - 1`."""
    distance = np.arange(-side + 1, side + 1) - fraction
    window = np.i0(KAISER_BETA * np.sqrt(np.maximum(0.0, 1.0 - (distance / side) ** 2)))
    taps = np.sinc(cutoff * distance) * window
    return np.asarray((taps / taps.sum()).astype(np.float32))
