"""What is not a picture, not a sound, or too much of either: a typed error or a defined result, through the command."""

from __future__ import annotations

import io
import json
import wave
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from factories import with_tokenizer
from graphs import write_checkpoint
from PIL import Image

from edgeexport import build, errors, families, open_bundle
from edgeexport.bundle import Bundle
from edgeexport.cli_edge import execute
from edgeexport.session.audio import AudioContract, Sound, heard, resample
from edgeexport.session.image_contract import contract_from_processor
from edgeexport.session.image_file import Image as Picture
from edgeexport.session.inputs import Inputs
from edgeexport.session.preprocess import Preprocess

CONTEXT = 48


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A tiny model that sees and hears."""
    root = tmp_path_factory.mktemp("bad-media")
    folder = with_tokenizer(write_checkpoint(root / "phone", families.find("autoglm_phone").tiny))
    return open_bundle(build(str(folder), "host-ort", root, quant="fp32", context=CONTEXT, parity="L1").bundle)


def png(height: int, width: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def wav(samples: np.ndarray, rate: int) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return buffer.getvalue()


def tone(rate: int, seconds: float = 0.5) -> np.ndarray:
    return np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate) * 0.5


@pytest.mark.parametrize(
    ("option", "data", "code"),
    [
        ("--image", b"", "not-an-image"),
        ("--image", b"GIF89a, or so it says", "not-an-image"),
        ("--image", png(90, 90)[:60], "damaged-image"),
        ("--image", wav(tone(16_000), 16_000), "not-an-image"),
        ("--audio", b"", "not-a-wav"),
        ("--audio", png(8, 8), "not-a-wav"),
        ("--audio", wav(tone(16_000), 16_000)[:-101], "damaged-wav"),
        ("--audio", wav(tone(100, 5), 100), "bad-sample-rate"),
    ],
    ids=["empty picture", "text", "half a picture", "a sound as a picture", "empty sound", "a picture as a sound",
         "half a sound", "a rate too low"],
)  # fmt: skip
def test_what_is_no_picture_or_sound_is_named(
    option: str, data: bytes, code: str, bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "given").write_bytes(data)
    exit_code = execute(["run", str(bundle.path), option, str(tmp_path / "given"), "--raw", "--prompt", "?", "--json"])
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (exit_code, document["error"]["code"]) == (2, code), document


@pytest.mark.parametrize(("height", "width"), [(1, 1), (20_000, 10), (10, 20_000), (1, 300)])
def test_any_size_of_picture_has_features(height: int, width: int, bundle: Bundle) -> None:
    with bundle.session() as session:
        features = session.encode_image(png(height, width)).values
        assert np.isfinite(session.prefill([1, 2, 3], [session.encode_image(png(height, width))])).all()
    assert np.isfinite(features).all() and features.ndim == 2


@pytest.mark.parametrize(
    "samples",
    [np.zeros(8000), np.zeros(0), np.zeros(1), tone(8000), np.tile(tone(8000), 40)],
    ids=["silence", "nothing", "one sample", "half the rate", "longer than the window"],
)
def test_any_length_of_sound_has_features(samples: np.ndarray, bundle: Bundle) -> None:
    with bundle.session() as session:
        try:
            features = session.encode_audio(wav(samples, 8000)).values
        except errors.UsageError as error:
            assert len(samples) == 0 and error.findings[0].code in {"damaged-wav", "bad-sound", "not-a-wav"}
        else:
            assert np.isfinite(features).all() and features.ndim == 2


def remarks_of(document: dict[str, Any]) -> list[str]:
    return [remark["code"] for remark in document["remarks"]]


@pytest.mark.parametrize(("seconds", "said"), [(0.3, False), (0.32, False), (0.4, True), (40.0, True)])
def test_sound_that_is_not_heard_is_said(
    seconds: float, said: bool, bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model hears 0.32 s."""
    (tmp_path / "given.wav").write_bytes(wav(tone(16_000, seconds), 16_000))
    command = ["run", str(bundle.path), "--audio", str(tmp_path / "given.wav"), "--raw", "-p", "?", "--max-tokens", "1"]
    assert execute([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert remarks_of(document) == ["sound-cut"] * said
    assert execute([*command, "--quiet"]) == 0
    assert ("sound-cut" in capsys.readouterr().err) == said
    with bundle.session() as session:
        remarks = session.encode_audio(tmp_path / "given.wav").remarks
    assert [remark.code for remark in remarks] == ["sound-cut"] * said
    if said:
        assert f"{seconds:g} s" in remarks[0].what and "0.32 s" in remarks[0].what


@pytest.mark.parametrize(
    ("height", "width", "times"), [(40, 40, None), (40, 43, None), (40, 80, "2"), (90, 40, "2.25")]
)
def test_a_picture_that_is_bent_is_said(
    height: int, width: int, times: str | None, bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model sees a square."""
    (tmp_path / "given.png").write_bytes(png(height, width))
    command = ["run", str(bundle.path), "--image", str(tmp_path / "given.png"), "--raw", "-p", "?", "--max-tokens", "1"]
    assert execute([*command, "--json"]) == 0
    assert remarks_of(json.loads(capsys.readouterr().out)) == ["picture-stretched"] * (times is not None)
    assert execute(command) == 0
    assert ("picture-stretched" in capsys.readouterr().err) == (times is not None)
    with bundle.session() as session:
        remarks = session.encode_image(png(height, width)).remarks
    assert [f" {times} times" in remark.what for remark in remarks] == [True] * (times is not None)


def test_a_photo_on_a_phones_one_grid_is_said_to_be_bent() -> None:
    """The grid of android-ort's screens: 66 rows of 30 patches."""
    contract = contract_from_processor({"image_processor_type": "Glm4vImageProcessor"})
    contract = msgspec.structs.replace(contract, grids=((66, 30),))
    inputs = Inputs(Preprocess(image=contract, image_token_id=1), lambda *_: {})
    photo, screen = (inputs.prepare_image(Picture(np.zeros((*size, 3), np.uint8))) for size in ((300, 400), (240, 108)))
    assert "2.93 times" in photo.remarks[0].what
    assert not screen.remarks


def test_what_the_window_holds_is_the_beginning_of_the_whole_sound_resampled() -> None:
    contract = AudioContract(sample_rate=16_000, n_fft=400, hop_length=160, n_mels=80, seconds=0.32)
    for rate in (8000, 16_000, 44_100, 48_000, 96_000):
        samples = np.random.default_rng(rate).normal(0, 0.1, 2 * rate).astype(np.float32).clip(-1, 1)
        whole = resample(samples, rate, 16_000)[: contract.samples]
        np.testing.assert_allclose(heard(Sound(samples, rate), contract), whole, atol=1e-6)


def test_a_prompt_beyond_the_context_is_refused_and_the_session_goes_on(bundle: Bundle) -> None:
    with bundle.session() as session:
        picture = session.encode_image(png(40, 40))
        with pytest.raises(errors.UsageError) as caught:
            session.prefill([1] * (CONTEXT + 1), [picture])
        assert caught.value.findings[0].code == "context-full"
        assert session.position == 0
        assert np.isfinite(session.prefill([1] * CONTEXT, [picture])).all()


def test_a_model_of_text_alone_refuses_both(tmp_path: Path) -> None:
    folder = with_tokenizer(write_checkpoint(tmp_path / "text", families.find("llama").tiny))
    plain = open_bundle(build(str(folder), "host-ort", tmp_path, quant="fp32", context=CONTEXT, parity="L1").bundle)
    with plain.session() as session:
        for encode in (lambda: session.encode_image(png(8, 8)), lambda: session.encode_audio(wav(tone(8000), 8000))):
            with pytest.raises(errors.UsageError) as caught:
                encode()
            assert caught.value.findings[0].code == "modality-missing"
