"""WAV files read strictly: every size is checked against the bytes that are there."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from edgeexport import errors
from edgeexport.core import Array
from edgeexport.session.media import read_media

MIN_RATE, MAX_RATE = 4_000, 384_000
"""Hz. Telephones record at 8000; no converter for sound runs faster than 384000."""
MAX_SECONDS = 600.0
MAX_CHANNELS = 64
MAX_MAGNITUDE = 16.0
"""Full scale is 1. Files of floats overshoot it a little; one that holds the numbers of another scale must not pass."""

BLOCK = 1 << 20
"""Frames converted at a time: the numbers between are float64."""

PCM, FLOAT, EXTENSIBLE = 0x0001, 0x0003, 0xFFFE
SUBFORMAT_TAIL = bytes.fromhex("000000001000800000aa00389b71")
"""An extensible format is named by a GUID: two bytes of format tag and these (KSDATAFORMAT_SUBTYPE_PCM and others)."""
BITS: Final = {PCM: (8, 16, 24, 32), FLOAT: (32, 64)}


@dataclass(frozen=True, eq=False)
class Sound:
    """float32 [N] samples of one channel, full scale -1 to 1, at `rate` Hz.

    Raises: UsageError `bad-sound`, `bad-sample-rate`, `sound-too-long`.
    """

    samples: Array
    rate: int

    def __post_init__(self) -> None:
        refuse_rate(self.rate)
        refuse_samples(self.samples)
        refuse_length(len(self.samples), self.rate)

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.rate


@dataclass(frozen=True)
class _Format:
    tag: int
    channels: int
    rate: int
    bits: int

    @property
    def frame_bytes(self) -> int:
        return self.channels * self.bits // 8


def read_wav(source: Path | bytes) -> Sound:
    """The sound in a RIFF/WAVE file: PCM of 8, 16, 24 or 32 bits or floats of 32 or 64, its channels averaged.

    Source: Microsoft's "Multimedia Programming Interface and Data Specifications 1.0" and WAVEFORMATEXTENSIBLE. What
    comes after the samples is not read: many programs leave tags there.

    Raises: UsageError `media-unreadable`, `media-too-large`, `not-a-wav`, `damaged-wav`, `bad-sample-rate`,
    `sound-too-long`, `bad-sound`.
    """
    data, where = read_media(source)
    form, start, size = _find(data, where)
    refuse_rate(form.rate, where)
    if size % form.frame_bytes:
        raise errors.damaged_wav(where, f"{size} bytes of samples are not whole frames of {form.frame_bytes} bytes")
    frames = size // form.frame_bytes
    if not frames:
        raise errors.bad_sound(where, "it has no samples")
    refuse_length(frames, form.rate, where)
    samples = np.empty(frames, np.float32)
    content = memoryview(data)[start : start + size]
    for first in range(0, frames, BLOCK):
        last = min(first + BLOCK, frames)
        samples[first:last] = _mono(content[first * form.frame_bytes : last * form.frame_bytes], form)
    refuse_samples(samples, where)
    return Sound(samples, form.rate)


def refuse_rate(rate: int, where: str = "the sample rate") -> None:
    """Raises: UsageError `bad-sample-rate`."""
    if not MIN_RATE <= rate <= MAX_RATE:
        raise errors.bad_sample_rate(where, rate, MIN_RATE, MAX_RATE)


def refuse_length(frames: int, rate: int, where: str = "the sound") -> None:
    """Raises: UsageError `sound-too-long`."""
    if frames > MAX_SECONDS * rate:
        raise errors.sound_too_long(where, frames / rate, MAX_SECONDS)


def refuse_samples(samples: Array, where: str = "the samples") -> None:
    """Raises: UsageError `bad-sound` unless they are finite float32 [N] of a plausible scale."""
    if samples.dtype != np.float32 or samples.ndim != 1:
        raise errors.bad_sound(where, f"they are {samples.dtype} {list(samples.shape)}, not float32 [N]")
    if not len(samples):
        raise errors.bad_sound(where, "there are none")
    peak = float(np.max(np.abs(samples)))
    if not peak <= MAX_MAGNITUDE:  # so that NaN is refused too
        raise errors.bad_sound(where, f"the largest magnitude is {peak:g}, full scale is 1")


def _find(data: bytes, where: str) -> tuple[_Format, int, int]:
    """The format, and where the samples start and how many bytes they have."""
    if len(data) < 12 or data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise errors.not_a_wav(where, "it does not start with RIFF....WAVE")
    (riff,) = struct.unpack_from("<I", data, 4)
    end = 8 + riff
    if end > len(data):
        raise errors.damaged_wav(where, f"it claims {end} bytes and has {len(data)}")
    form: _Format | None = None
    at = 12
    while at + 8 <= end:
        name, size = struct.unpack_from("<4sI", data, at)
        at += 8
        if size > end - at:
            raise errors.damaged_wav(where, f"chunk {name!r} claims {size} bytes, {end - at} are left")
        if name == b"fmt ":
            if form is not None:
                raise errors.damaged_wav(where, "it has two chunks b'fmt '")
            form = _format(data[at : at + size], where)
        elif name == b"data":
            if form is None:
                raise errors.damaged_wav(where, "the samples come before their format")
            return form, at, size
        at += size + size % 2  # chunks start at even places
    raise errors.damaged_wav(where, "it has no samples" if form else "it has no format")


def _format(chunk: bytes, where: str) -> _Format:
    if len(chunk) < 16:
        raise errors.damaged_wav(where, f"chunk b'fmt ' has {len(chunk)} bytes, at least 16 are needed")
    tag, channels, rate, _, frame_bytes, bits = struct.unpack_from("<HHIIHH", chunk)
    if tag == EXTENSIBLE:
        if len(chunk) < 40:
            raise errors.damaged_wav(where, f"chunk b'fmt ' has {len(chunk)} bytes, an extensible one has 40")
        if chunk[26:40] != SUBFORMAT_TAIL:
            raise errors.not_a_wav(where, f"unknown subformat {chunk[24:40].hex()}")
        (tag,) = struct.unpack_from("<H", chunk, 24)
    if tag not in BITS:
        raise errors.not_a_wav(where, f"its samples are compressed (format tag {tag:#06x}); PCM and floats are read")
    if bits not in BITS[tag]:
        known = ", ".join(str(each) for each in BITS[tag])
        raise errors.not_a_wav(where, f"samples of {bits} bits; {known} are read")
    if not 1 <= channels <= MAX_CHANNELS:
        raise errors.damaged_wav(where, f"it claims {channels} channels; 1 to {MAX_CHANNELS} are read")
    if frame_bytes != channels * bits // 8:
        raise errors.damaged_wav(where, f"{channels} channels of {bits} bits do not make frames of {frame_bytes} bytes")
    return _Format(tag, channels, rate, bits)


def _mono(data: memoryview, form: _Format) -> Array:
    """float32 [N]: the mean of the channels."""
    if form.tag == FLOAT:
        values, zero, full = np.frombuffer(data, f"<f{form.bits // 8}"), 0.0, 1.0
    elif form.bits == 8:
        values, zero, full = np.frombuffer(data, np.uint8), 128.0, 128.0
    elif form.bits == 24:
        wide = np.zeros((len(data) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        values, zero, full = wide.view("<i4").ravel(), 0.0, float(1 << 31)
    else:
        values, zero, full = np.frombuffer(data, f"<i{form.bits // 8}"), 0.0, float(1 << (form.bits - 1))
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused by its magnitude
        mean = values.reshape(-1, form.channels).mean(axis=1, dtype=np.float64)
        return np.asarray(((mean - zero) / full).astype(np.float32))
