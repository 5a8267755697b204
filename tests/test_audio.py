"""Sound: the same spectrograms as transformers' Whisper, honest resampling, and WAV files that are what they claim."""

from __future__ import annotations

import io
import math
import struct
import subprocess
import sys
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import WhisperFeatureExtractor
from transformers.audio_utils import mel_filter_bank
from transformers.models.whisper import feature_extraction_whisper

from edgeexport.errors import EdgeExportError, UsageError
from edgeexport.session.audio import AudioContract, Sound, log_mel, mel_filters, read_wav, resample
from edgeexport.session.wav import SUBFORMAT_TAIL

RATE = 16_000


def whisper(seconds: float, mels: int = 80) -> AudioContract:
    return AudioContract(sample_rate=RATE, n_fft=400, hop_length=160, n_mels=mels, seconds=seconds)


def code(error: pytest.ExceptionInfo[EdgeExportError]) -> str:
    return error.value.findings[0].code


def sine(hertz: float, seconds: float, rate: int = RATE) -> Any:
    return np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate).astype(np.float32)


def noise(samples: int, loudness: float) -> Any:
    return (np.random.default_rng(samples).normal(size=samples) * loudness).astype(np.float32)


def chirp(seconds: float) -> Any:
    time = np.arange(int(seconds * RATE)) / RATE
    return (0.8 * np.sin(2 * np.pi * (50 * time + 7900 / (2 * seconds) * time**2))).astype(np.float32)


def click(seconds: float) -> Any:
    samples = np.zeros(int(seconds * RATE), np.float32)
    samples[len(samples) // 3] = 1.0
    return samples


# log-mel

SOUNDS: dict[str, Callable[[float], Any]] = {
    "noise": lambda seconds: noise(int(seconds * RATE), 0.1),
    "loud noise": lambda seconds: noise(int(seconds * RATE), 3.0),
    "faint noise": lambda seconds: noise(int(seconds * RATE), 1e-6),
    "a sine": lambda seconds: sine(440, seconds),
    "a sine at a bin": lambda seconds: sine(1000, seconds),
    "chirp": chirp,
    "click": click,
    "direct current": lambda seconds: np.full(int(seconds * RATE), 0.5, np.float32),
    "silence": lambda seconds: np.zeros(int(seconds * RATE), np.float32),
}


@pytest.fixture
def numpy_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers prefers torch's transform in float32; the numpy one is its reference in float64."""
    monkeypatch.setattr(feature_extraction_whisper, "is_torch_available", lambda: False)


def theirs(samples: Any, seconds: float, mels: int = 80) -> Any:
    extractor = WhisperFeatureExtractor(feature_size=mels)
    return extractor(samples, sampling_rate=RATE, return_tensors="np", max_length=int(seconds * RATE))["input_features"]


@pytest.mark.parametrize("kind", SOUNDS)
@pytest.mark.parametrize("lasts", [0.3, 2.0, 3.1], ids=["too short", "exact", "too long"])
@pytest.mark.filterwarnings("error")
def test_log_mel_is_whispers(kind: str, lasts: float, numpy_path: None) -> None:
    samples = SOUNDS[kind](lasts)
    made = log_mel(samples, whisper(2))
    assert made.dtype == np.float32
    assert made.shape == (1, 80, 200)
    np.testing.assert_allclose(made, theirs(samples, 2), rtol=0, atol=1e-4)


@pytest.mark.parametrize("seconds", [1, 1.5, 4, 30])
def test_the_window_may_have_another_length(seconds: float, numpy_path: None) -> None:
    samples = chirp(3.3) + noise(int(3.3 * RATE), 0.01)
    expected = theirs(samples, seconds)
    if seconds in (1, 4, 30):
        extractor = WhisperFeatureExtractor(chunk_length=int(seconds))
        np.testing.assert_array_equal(
            extractor(samples, sampling_rate=RATE, return_tensors="np")["input_features"], expected
        )
    np.testing.assert_allclose(log_mel(samples, whisper(seconds)), expected, rtol=0, atol=1e-4)


def test_log_mel_is_near_the_float32_transform_of_torch() -> None:
    samples = chirp(2.0) + noise(2 * RATE, 0.05)
    np.testing.assert_allclose(log_mel(samples, whisper(2)), theirs(samples, 2), rtol=0, atol=1e-4)


def test_more_mels(numpy_path: None) -> None:
    np.testing.assert_allclose(
        log_mel(chirp(1.0), whisper(1, mels=128)), theirs(chirp(1.0), 1, mels=128), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("mels", [40, 80, 128])
@pytest.mark.parametrize(("rate", "n_fft"), [(16_000, 400), (16_000, 512), (44_100, 1024)])
def test_the_filters_are_slaneys(mels: int, rate: int, n_fft: int) -> None:
    expected = mel_filter_bank(1 + n_fft // 2, mels, 0.0, 8000.0, rate, norm="slaney", mel_scale="slaney")
    np.testing.assert_allclose(mel_filters(rate, n_fft, mels), expected.T, rtol=0, atol=1e-12)


def test_silence_is_the_same_everywhere() -> None:
    assert np.unique(log_mel(np.zeros(1, np.float32), whisper(1))).tolist() == [-1.5]


@pytest.mark.parametrize(
    "samples",
    [
        np.zeros(0, np.float32),
        np.zeros(10),
        np.zeros((1, 10), np.float32),
        np.full(10, np.nan, np.float32),
        np.array([0, np.inf], np.float32),
        np.array([0, 32767], np.float32),
    ],
    ids=["none", "float64", "two dimensions", "nan", "infinite", "integers' scale"],
)
@pytest.mark.filterwarnings("error")
def test_what_is_no_sound_is_refused(samples: Any) -> None:
    for refuses in (
        lambda: log_mel(samples, whisper(1)),
        lambda: resample(samples, 8000, RATE),
        lambda: Sound(samples, RATE),
    ):
        with pytest.raises(UsageError) as caught:
            refuses()
        assert code(caught) == "bad-sound"


@pytest.mark.parametrize(
    "change",
    [
        {"seconds": 0},
        {"seconds": 1.005},
        {"seconds": 0.01},
        {"seconds": 1e9},
        {"sample_rate": 8000},
        {"n_fft": 401},
        {"hop_length": 0},
        {"n_mels": 0},
        {"kind": "log-mel"},
        {"dither": 0.1},
        {"seconds": 600, "sample_rate": 48_000, "hop_length": 16, "n_fft": 4096, "n_mels": 256},  # 54.9 GiB of frames
        {"seconds": 600, "sample_rate": 48_000, "hop_length": 16, "n_fft": 32, "n_mels": 256},
        {"seconds": 600, "sample_rate": 48_000, "hop_length": 64, "n_fft": 4096, "n_mels": 1},
    ],
    ids=str,
)
def test_a_contract_that_contradicts_itself_is_refused(change: dict[str, Any]) -> None:
    plain = msgspec.to_builtins(whisper(30))
    assert msgspec.convert(plain, AudioContract) == whisper(30)
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({**plain, **change}, AudioContract)


def test_the_largest_contract_takes_little_memory() -> None:
    import tracemalloc

    contract = AudioContract(sample_rate=16_000, n_fft=1024, hop_length=160, n_mels=256, seconds=600.0)
    samples = np.zeros(16_000, np.float32)
    tracemalloc.start()
    try:
        assert log_mel(samples, contract).shape == (1, 256, 60_000)
        assert tracemalloc.get_traced_memory()[1] < 1 << 30
    finally:
        tracemalloc.stop()


# resampling

RATES = (4000, 8000, 11025, 15999, 22050, 24000, 32000, 44100, 48000, 96000, 384_000)


@pytest.mark.parametrize("rate", RATES)
def test_a_sine_stays_the_same_sine(rate: int) -> None:
    """Compared sample by sample with the sine itself, so that amplitude, phase and place are right."""
    edge = RATE // 20
    for part in (0.01, 0.4, 0.875):
        hertz = part * min(rate, RATE) / 2
        made = resample(sine(hertz, 0.5, rate), rate, RATE)
        assert made.dtype == np.float32
        assert len(made) == math.ceil(int(0.5 * rate) * RATE / rate)
        expected = np.sin(2 * np.pi * hertz * np.arange(len(made)) / RATE)
        difference = np.abs(made - expected)[edge:-edge]
        assert difference.max() < 1e-3  # 0.1 dB would be 1.2e-2


@pytest.mark.parametrize("rate", [rate for rate in RATES if rate > RATE])
def test_what_would_fold_back_is_gone(rate: int) -> None:
    edge = RATE // 20
    for part in (0.0, 0.2, 0.6, 0.95):
        hertz = 8000 + part * (rate / 2 - 8000)
        made = resample(sine(hertz, 0.5, rate), rate, RATE)
        assert np.abs(made[edge:-edge]).max() < 1e-3  # -60 dB


@pytest.mark.parametrize("rate", [rate for rate in RATES if rate < RATE])
def test_no_images_appear_above_the_old_nyquist(rate: int) -> None:
    made = resample(sine(0.8 * rate / 2, 1.0, rate), rate, RATE)[2000:14000]
    spectrum = np.abs(np.fft.rfft(made * np.blackman(len(made))))
    above = int(len(made) * rate / 2 / RATE) + 5
    if above < len(spectrum):
        assert spectrum[above:].max() / spectrum.max() < 1e-3


def test_a_level_stays_and_lengths_are_whole() -> None:
    for rate in RATES:
        level = resample(np.full(rate // 2, 0.5, np.float32), rate, RATE)
        np.testing.assert_allclose(level[400:-400], 0.5, atol=1e-5)
        assert len(resample(np.ones(1, np.float32), rate, RATE)) == math.ceil(RATE / rate)


def test_the_same_rate_changes_nothing() -> None:
    samples = noise(999, 0.3)
    np.testing.assert_array_equal(resample(samples, RATE, RATE), samples)


@pytest.mark.parametrize("rate", [-1, 0, 1, 3999, 384_001, 2**31])
def test_rates_of_no_converter_are_refused(rate: int) -> None:
    for refuses in (
        lambda: resample(noise(100, 0.1), rate, RATE),
        lambda: resample(noise(100, 0.1), RATE, rate),
        lambda: Sound(noise(100, 0.1), rate),
    ):
        with pytest.raises(UsageError) as caught:
            refuses()
        assert code(caught) == "bad-sample-rate"


# WAV files


def chunk(name: bytes, content: bytes) -> bytes:
    return name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)


def riff(*chunks: bytes) -> bytes:
    content = b"WAVE" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(content)) + content


def form(tag: int, channels: int, rate: int, bits: int) -> bytes:
    frame = channels * bits // 8
    return chunk(b"fmt ", struct.pack("<HHIIHH", tag, channels, rate, rate * frame % 2**32, frame, bits))


def extensible(tag: int, channels: int, rate: int, bits: int, tail: bytes = SUBFORMAT_TAIL) -> bytes:
    frame = channels * bits // 8
    start = struct.pack("<HHIIHH", 0xFFFE, channels, rate, rate * frame % 2**32, frame, bits)
    return chunk(b"fmt ", start + struct.pack("<HHIH", 22, bits, 3, tag) + tail)


def by_the_standard_library(values: Any, width: int, rate: int) -> bytes:
    """`values` int [N, channels], as Python's own `wave` writes them."""
    raw = b"".join(int(value).to_bytes(width, "little", signed=width > 1) for value in values.ravel())
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(values.shape[1])
        out.setsampwidth(width)
        out.setframerate(rate)
        out.writeframes(raw)
    return file.getvalue()


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_integers_of_every_width_are_read(width: int, channels: int, tmp_path: Path) -> None:
    half = 1 << (8 * width - 1)
    generator = np.random.default_rng(width)
    values = generator.integers(-half, half, (501, channels))
    values[0], values[1] = -half, half - 1
    stored = values + 128 if width == 1 else values
    path = tmp_path / "a.wav"
    path.write_bytes(by_the_standard_library(stored, width, 22050))
    for source in (path, path.read_bytes()):
        sound = read_wav(source)
        assert sound.rate == 22050
        assert sound.samples.dtype == np.float32
        assert sound.seconds == 501 / 22050
        np.testing.assert_allclose(sound.samples, values.mean(axis=1) / half, rtol=0, atol=1e-7)


@pytest.mark.parametrize("header", [form, extensible])
@pytest.mark.parametrize("bits", [32, 64])
def test_floats_are_read_as_they_are(bits: int, header: Any) -> None:
    values = np.random.default_rng(bits).normal(size=(300, 2)).astype(f"<f{bits // 8}")
    made = read_wav(riff(header(3, 2, 48000, bits), chunk(b"data", values.tobytes())))
    np.testing.assert_allclose(made.samples, values.mean(axis=1, dtype=np.float64), rtol=0, atol=1e-7)


def test_other_chunks_odd_sizes_and_tags_at_the_end_are_skipped() -> None:
    samples = np.arange(-5, 6, dtype="<i2")
    parts = (chunk(b"LIST", b"abc"), form(1, 1, 8000, 16), chunk(b"fact", b"1"), chunk(b"data", samples.tobytes()))
    for content in (riff(*parts, chunk(b"id3 ", b"x" * 7)), riff(*parts) + b"TAG of another program"):
        np.testing.assert_array_equal(read_wav(content).samples * 32768, samples)


def test_long_files_are_read_block_by_block() -> None:
    values = np.arange((1 << 20) + 1000, dtype=np.uint32).astype("<i2")
    made = read_wav(riff(form(1, 1, 16000, 16), chunk(b"data", values.tobytes())))
    np.testing.assert_array_equal(made.samples * 32768, values)


PLAIN = riff(form(1, 1, 16000, 16), chunk(b"data", bytes(200)))
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not-a-wav"),
    "text": (b"hello" * 30, "not-a-wav"),
    "mp3": (b"ID3\x04" + bytes(100), "not-a-wav"),
    "riff of pictures": (b"RIFF" + struct.pack("<I", 100) + b"WEBP" + bytes(96), "not-a-wav"),
    "big-endian": (b"RIFX" + PLAIN[4:], "not-a-wav"),
    "64-bit": (b"RF64" + PLAIN[4:], "not-a-wav"),
    "a-law": (riff(form(6, 1, 8000, 8), chunk(b"data", bytes(100))), "not-a-wav"),
    "adpcm": (riff(form(2, 1, 8000, 4), chunk(b"data", bytes(100))), "not-a-wav"),
    "mp3 inside": (riff(extensible(0x55, 1, 16000, 16), chunk(b"data", bytes(100))), "not-a-wav"),
    "another guid": (riff(extensible(1, 1, 16000, 16, bytes(14)), chunk(b"data", bytes(100))), "not-a-wav"),
    "12 bits": (riff(form(1, 2, 16000, 12), chunk(b"data", bytes(99))), "not-a-wav"),
    "floats of 16 bits": (riff(form(3, 1, 16000, 16), chunk(b"data", bytes(100))), "not-a-wav"),
    "cut in the header": (PLAIN[:30], "damaged-wav"),
    "cut in the samples": (PLAIN[:-1], "damaged-wav"),
    "a stream's sizes": (
        PLAIN[:4] + b"\xff\xff\xff\xff" + PLAIN[8:40] + b"\xff\xff\xff\xff" + PLAIN[44:],
        "damaged-wav",
    ),
    "samples past the end": (PLAIN[:40] + struct.pack("<I", 10_000) + PLAIN[44:], "damaged-wav"),
    "samples past the riff": (PLAIN[:4] + struct.pack("<I", 100) + PLAIN[8:], "damaged-wav"),
    "riff of nothing": (PLAIN[:4] + bytes(4) + PLAIN[8:], "damaged-wav"),
    "no samples' chunk": (riff(form(1, 1, 16000, 16)), "damaged-wav"),
    "no format": (riff(chunk(b"LIST", b"abcd")), "damaged-wav"),
    "samples before the format": (riff(chunk(b"data", bytes(4)), form(1, 1, 16000, 16)), "damaged-wav"),
    "two formats": (riff(form(1, 1, 16000, 16), form(1, 1, 8000, 8), chunk(b"data", bytes(4))), "damaged-wav"),
    "a short format": (riff(chunk(b"fmt ", bytes(14)), chunk(b"data", bytes(4))), "damaged-wav"),
    "a short extensible": (riff(form(0xFFFE, 1, 16000, 16), chunk(b"data", bytes(4))), "damaged-wav"),
    "no channels": (riff(form(1, 0, 16000, 16), chunk(b"data", bytes(4))), "damaged-wav"),
    "65535 channels": (
        riff(chunk(b"fmt ", struct.pack("<HHIIHH", 1, 65535, 16000, 0, 0, 16)), chunk(b"data", bytes(4))),
        "damaged-wav",
    ),
    "frames of another size": (
        riff(chunk(b"fmt ", struct.pack("<HHIIHH", 1, 2, 16000, 0, 2, 16)), chunk(b"data", bytes(4))),
        "damaged-wav",
    ),
    "half a frame": (riff(form(1, 2, 16000, 16), chunk(b"data", bytes(6))), "damaged-wav"),
    "no sample": (riff(form(1, 1, 16000, 16), chunk(b"data", b"")), "bad-sound"),
    "not a number": (
        riff(form(3, 1, 16000, 32), chunk(b"data", np.array([0, np.nan], "<f4").tobytes())),
        "bad-sound",
    ),
    "infinite": (riff(form(3, 1, 16000, 64), chunk(b"data", np.array([np.inf, -np.inf]).tobytes())), "bad-sound"),
    "past float32": (riff(form(3, 2, 16000, 64), chunk(b"data", np.array([1e308, 1e308]).tobytes())), "bad-sound"),
    "the scale of integers": (
        riff(form(3, 1, 16000, 32), chunk(b"data", np.array([0, 9000], "<f4").tobytes())),
        "bad-sound",
    ),
    "no rate": (riff(form(1, 1, 0, 16), chunk(b"data", bytes(4))), "bad-sample-rate"),
    "a rate of gigahertz": (riff(form(1, 1, 2**32 - 1, 16), chunk(b"data", bytes(4))), "bad-sample-rate"),
    "eleven minutes": (riff(form(1, 1, 4000, 8), chunk(b"data", bytes(11 * 60 * 4000))), "sound-too-long"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("error")
def test_bad_files_are_refused_with_a_reason(name: str) -> None:
    content, expected = BAD[name]
    with pytest.raises(UsageError) as caught:
        read_wav(content)
    assert code(caught) == expected


def test_ten_minutes_are_read() -> None:
    assert read_wav(riff(form(1, 1, 4000, 8), chunk(b"data", bytes(10 * 60 * 4000)))).seconds == 600


def test_paths_that_are_no_files_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.wav"):
        with pytest.raises(UsageError) as caught:
            read_wav(path)
        assert code(caught) == "media-unreadable"


SEEDS = [
    PLAIN,
    riff(extensible(3, 2, 48000, 32), chunk(b"data", noise(50, 0.2).tobytes())),
    riff(chunk(b"LIST", b"abc"), form(1, 3, 8000, 24), chunk(b"data", bytes(range(90)))),
]


@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.integers(0, 100), st.binary(max_size=5)), max_size=4),
    st.integers(0, 400),
)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@pytest.mark.filterwarnings("error")
def test_damaged_files_end_in_a_sound_or_a_typed_error(
    seed: bytes, edits: list[tuple[int, bytes]], length: int
) -> None:
    content = bytearray(seed)
    for at, piece in edits:
        content[at : at + len(piece)] = piece
    try:
        sound = read_wav(bytes(content[:length]))
    except UsageError as error:
        assert error.findings[0].fix
    else:
        assert np.isfinite(sound.samples).all()
        assert sound.samples.nbytes <= 4 * length


def test_torch_is_not_needed() -> None:
    program = """
import sys
import numpy as np
from edgeexport.session.audio import *
sound = Sound(np.ones(8000, np.float32), 8000)
contract = AudioContract(sample_rate=16000, n_fft=400, hop_length=160, n_mels=80, seconds=1)
assert log_mel(resample(sound.samples, sound.rate, contract.sample_rate), contract).shape == (1, 80, 100)
assert not {"torch", "transformers", "scipy", "PIL"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
