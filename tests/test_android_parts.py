"""The native loader's pictures, sound, sampling, governor and response cache; Python's session and numpy decide."""

from __future__ import annotations

import itertools
import json
from typing import Any

import msgspec
import numpy as np
import pytest
from native import Parts

from edgeexport.core import Array
from edgeexport.errors import EdgeExportError
from edgeexport.session.audio import AudioContract, Sound, log_mel, resample
from edgeexport.session.generate import GREEDY, Sampling, _Chooser
from edgeexport.session.image_contract import DEFAULTS, PatchContract, PixelContract, contract_from_processor
from edgeexport.session.image_file import Image
from edgeexport.session.inputs import Inputs
from edgeexport.session.preprocess import Preprocess, to_json

MEAN, STD = DEFAULTS["image_mean"], DEFAULTS["image_std"]
PATCHES = msgspec.structs.replace(
    contract_from_processor({}), min_pixels=2000, max_pixels=200_000, grids=((8, 18), (12, 12), (18, 8), (4, 6))
)
PIXELS = PixelContract(224, MEAN, STD)
WHISPER = AudioContract(16_000, 400, 160, 80, 30.0)


def no_run(component: str, variant: str, inputs: Any) -> Any:
    raise AssertionError("preparing runs no component")


def codes_of(call: Any) -> list[str]:
    """The codes that a call raises; none where it raises nothing."""
    try:
        call()
    except EdgeExportError as error:
        return [finding.code for finding in error.findings]
    return []


def picture(height: int, width: int, seed: int = 0) -> Array:
    """Waves and noise: edges, flat parts and every byte."""
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([127 * (1 + np.sin(x / (3 + c)) * np.cos(y / (7 - c))) for c in range(3)], axis=-1)
    noise = np.random.default_rng(seed).integers(-60, 60, waves.shape)
    return np.clip(waves + noise, 0, 255).astype(np.uint8)


def image_request(parts: Parts, pixels: Array, contract: Preprocess, name: str) -> dict[str, Any]:
    height, width = pixels.shape[:2]
    return {
        "do": "image", "file": parts.file(f"{name}.rgb", pixels.tobytes()), "height": height, "width": width,
        "contract": to_json(contract).decode(), "to": str(parts.folder / f"{name}.f32"),
    }  # fmt: skip


@pytest.mark.parametrize("contract", [PATCHES, PIXELS], ids=["patches", "pixels"])
def test_pictures_equal_pythons(contract: PatchContract | PixelContract, parts: Parts) -> None:
    whole = Preprocess(image=contract)
    sizes = [(224, 224), (480, 216), (97, 333), (28, 28), (1, 1), (20, 300), (112, 252), (252, 112), (640, 480)]
    shown = [picture(*size) for size in sizes]
    shown += [np.full((50, 60, 3), 255, np.uint8), np.tile(np.uint8([[[0]], [[255]]]), (40, 80, 3))]
    requests = [
        image_request(parts, pixels, whole, f"{contract.__class__.__name__}{i}") for i, pixels in enumerate(shown)
    ]
    for pixels, request, found in zip(shown, requests, parts.ask(requests), strict=True):
        wanted = Inputs(whole, no_run).prepare_image(Image(pixels))
        [(name, values)] = wanted.inputs.items()
        assert (found["name"], found["variant"], found["shape"]) == (name, wanted.variant, list(values.shape))
        assert found["grid"] == list(wanted.grid or (0, 0))
        # bytes after the resize are the same, so nothing is left to differ but float32's rounding
        assert np.abs(np.fromfile(request["to"], np.float32).reshape(values.shape) - values).max() <= 1e-6


def test_the_grid_of_every_size_is_pythons(parts: Parts) -> None:
    """No pixels differ here: the grids and the refusals do."""
    whole = Preprocess(image=PATCHES)
    sizes = [*itertools.product((1, 7, 27, 28, 42, 70, 100, 401), repeat=2), (1, 300), (5000, 20), (20, 5000)]
    grey = [np.full((*size, 3), 90, np.uint8) for size in sizes]
    found = parts.ask(image_request(parts, pixels, whole, "grid") for pixels in grey)

    def variant(pixels: Array) -> str:
        return Inputs(whole, no_run).prepare_image(Image(pixels)).variant

    for pixels, answer in zip(grey, found, strict=True):
        refused = codes_of(lambda pixels=pixels: variant(pixels))
        assert ([answer["code"]] if "code" in answer else answer["variant"]) == (refused or variant(pixels))


def test_pictures_that_are_none_are_refused(parts: Parts) -> None:
    request = image_request(parts, picture(4, 4), Preprocess(image=PIXELS), "none")
    huge = request | {"height": 1 << 40, "width": 1 << 40}
    answers = parts.ask([request | {"height": 0}, huge, request | {"contract": to_json(Preprocess()).decode()}])
    assert [each["code"] for each in answers] == ["not-an-image", "image-too-large", "modality-missing"]


def sound(rate: int, seconds: float, seed: int = 0) -> Array:
    time = np.arange(round(rate * seconds)) / rate
    sweep = np.sin(2 * np.pi * (80 + 900 * time) * time) * np.exp(-time)
    noise = np.random.default_rng(seed).normal(0, 0.01, len(time))
    return (0.7 * sweep + noise).astype(np.float32)


def sound_request(parts: Parts, samples: Array, rate: int, contract: Preprocess, name: str) -> dict[str, Any]:
    return {
        "do": "sound", "file": parts.file(f"{name}.samples", samples.tobytes()), "rate": rate,
        "contract": to_json(contract).decode(), "to": str(parts.folder / f"{name}.mel"),
    }  # fmt: skip


SHORT = AudioContract(16_000, 400, 160, 80, 2.0)


@pytest.mark.parametrize(
    ("samples", "rate", "contract"),
    [
        (sound(16_000, 1.3), 16_000, SHORT), (sound(16_000, 3.0), 16_000, SHORT), (sound(44_100, 1.1), 44_100, SHORT),
        (sound(8000, 0.9), 8000, SHORT), (np.zeros(100, np.float32), 16_000, SHORT),
        (sound(16_000, 4.0), 16_000, WHISPER),
        (sound(22_050, 0.5), 22_050, AudioContract(24_000, 512, 256, 128, 1.024)),
        (sound(16_000, 0.5), 16_000, AudioContract(16_000, 450, 160, 40, 0.8)),
    ],
    ids=["short", "cut", "44100", "8000", "silence", "whisper", "512", "450"],
)  # fmt: skip
def test_log_mel_equals_pythons(samples: Array, rate: int, contract: AudioContract, parts: Parts) -> None:
    whole = Preprocess(audio=contract)
    request = sound_request(parts, samples, rate, whole, "sound")
    [found] = parts.ask([request])
    wanted = log_mel(resample(samples, rate, contract.sample_rate), contract)
    assert (found["name"], found["shape"]) == ("mel", list(wanted.shape))
    assert np.abs(np.fromfile(request["to"], np.float32).reshape(wanted.shape) - wanted).max() <= 1e-4


@pytest.mark.parametrize(("rate", "target"), [(44_100, 16_000), (8000, 16_000), (48_000, 16_000), (16_001, 24_000)])
def test_resampled_sound_equals_pythons(rate: int, target: int, parts: Parts) -> None:
    samples = sound(rate, 0.2)
    file, to = parts.file("plain.samples", samples.tobytes()), parts.folder / "resampled.f32"
    assert parts.ask([{"do": "resample", "file": file, "rate": rate, "target": target, "to": str(to)}]) == [None]
    wanted = resample(samples, rate, target)
    found = np.fromfile(to, np.float32)
    assert found.shape == wanted.shape and np.abs(found - wanted).max() <= 1e-5


@pytest.mark.parametrize(
    ("samples", "rate"),
    [(np.float32([]), 16_000), (np.float32([0, np.nan]), 16_000), (np.float32([np.inf]), 16_000),
     (np.float32([-17]), 16_000), (np.float32([0]), 3999), (np.float32([0]), 400_000)],
)  # fmt: skip
def test_sound_that_python_refuses_is_refused(samples: Array, rate: int, parts: Parts) -> None:
    [answer] = parts.ask([sound_request(parts, samples, rate, Preprocess(audio=SHORT), "bad")])
    assert [answer["code"]] == codes_of(lambda: Sound(samples, rate))


BAD_CONTRACTS: list[dict[str, Any]] = [
    {"schema": "edgeexport.preprocess/2"}, {"extra": 1}, {"joining": "glue"}, {"position_rows": 2},
    {"image_token_id": -1}, {"image_ids": [1.5]}, {"image": {"kind": "pixels", "size": 0, "mean": MEAN, "std": STD}},
    {"image": {"kind": "pixels", "size": 8, "mean": MEAN, "std": [0, 1, 1]}}, {"image": {"kind": "voxels"}},
    {"image": {"kind": "pixels", "size": 8, "mean": MEAN[:2], "std": STD}}, {"image": []},
    {"image": {**msgspec.to_builtins(PATCHES), "grids": [[3, 4]]}},
    {"image": {**msgspec.to_builtins(PATCHES), "grids": [[4096, 4096]]}},
    {"image": {**msgspec.to_builtins(PATCHES), "min_pixels": 1 << 20, "max_pixels": 1 << 10}},
    {"image": {**msgspec.to_builtins(PATCHES), "resample": "nearest"}},
    {"audio": {**msgspec.to_builtins(SHORT), "seconds": 0.0333}},
    {"audio": {**msgspec.to_builtins(SHORT), "seconds": 1e300}},
    {"audio": {**msgspec.to_builtins(SHORT), "n_fft": 33}}, {"audio": {**msgspec.to_builtins(SHORT), "hop_length": 0}},
]  # fmt: skip


@pytest.mark.parametrize("change", BAD_CONTRACTS, ids=lambda change: "-".join(change))
def test_damaged_contracts_are_refused(change: dict[str, Any], parts: Parts) -> None:
    whole = json.loads(to_json(Preprocess())) | change
    request = image_request(parts, picture(4, 4), Preprocess(), "contract") | {"contract": json.dumps(whole)}
    assert parts.ask([request])[0]["code"] == "bundle-bad-preprocess"


# sampling


def sample_request(parts: Parts, logits: Array, prompt: list[int], sampling: Sampling) -> dict[str, Any]:
    settings = {name: getattr(sampling, name) for name in Sampling.__dataclass_fields__}
    file = parts.file("logits.f32", logits.astype(np.float32).tobytes())
    return {"do": "sample", "file": file, "vocab": logits.shape[1], "prompt": prompt, **settings}


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY, Sampling(repetition_penalty=1.3), Sampling(frequency_penalty=0.2), Sampling(temperature=0.7, seed=1),
        Sampling(temperature=1.5, top_k=5, seed=2**63 - 1), Sampling(temperature=1.0, top_p=0.6, seed=3),
        Sampling(temperature=0.9, top_p=0.9, top_k=40, repetition_penalty=0.8, frequency_penalty=-0.1, seed=2**32),
        Sampling(temperature=2.0, top_k=1, seed=4), Sampling(temperature=1.0, top_p=1e-9),
        Sampling(temperature=1e-6), Sampling(temperature=3.0, top_k=10_000),
    ],
)  # fmt: skip
def test_chosen_tokens_equal_pythons(sampling: Sampling, parts: Parts) -> None:
    """The same seed draws the same tokens, as numpy's generator is written anew."""
    random = np.random.default_rng(11)
    logits = random.normal(0, 2, (200, 501)).astype(np.float32)
    logits[::3] = np.round(logits[::3])  # ties
    logits[5, 7:] = -np.inf
    prompt = [3, 5, 3, 500]
    choose = _Chooser(sampling, np.array(prompt), logits.shape[1])
    wanted = [choose(row, position) for position, row in enumerate(logits)]
    assert parts.ask([sample_request(parts, logits, prompt, sampling)]) == [wanted]


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**32 - 1, 2**32, 2**63 - 1])
def test_random_numbers_are_numpys(seed: int, parts: Parts) -> None:
    [found] = parts.ask([{"do": "uniform", "seed": seed}])
    assert found == np.random.Generator(np.random.PCG64(seed)).random(8).tolist()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(bad: float, parts: Parts) -> None:
    logits = np.zeros((2, 8), np.float32)
    logits[1, 3] = bad
    [answer] = parts.ask([sample_request(parts, logits, [], GREEDY)])
    assert answer["code"] == "nonfinite-logits"


@pytest.mark.parametrize(
    "change",
    [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"repetition_penalty": 0}, {"frequency_penalty": 1e300}],
)
def test_settings_that_mean_nothing_are_refused(change: dict[str, float], parts: Parts) -> None:
    request = sample_request(parts, np.zeros((1, 4)), [], GREEDY) | change
    assert parts.ask([request])[0]["code"] == "bad-sampling"


# governor


def rates(parts: Parts, readings: list[tuple[float, float | None]], **options: Any) -> list[float]:
    [answer] = parts.ask([{"do": "govern", "budget": 5.0, "readings": readings, **options}])
    assert answer["pause"] == pytest.approx([1 / answer["rates"][-1] - 1])
    return answer["rates"]


def test_above_the_budget_the_rate_falls_to_its_bound_and_no_further(parts: Parts) -> None:
    found = rates(parts, [(5.0 * step, 4.6) for step in range(30)], slowest=0.25)
    assert found[:3] == pytest.approx([0.8, 0.64, 0.512]) and min(found) == found[-1] == 0.25


def test_the_rate_is_restored_after_calm_seconds(parts: Parts) -> None:
    hot = [(float(second), 5.0) for second in range(11)]
    cool = [(11.0 + second, 3.0) for second in range(100)]
    found = rates(parts, hot + cool)
    # five seconds between two steps down
    assert found[:11] == pytest.approx([0.8] * 5 + [0.64] * 5 + [0.512])
    # ten seconds below 70% before each step up
    assert found[11:21] == pytest.approx([0.512] * 10) and found[21] == pytest.approx(0.512 * 1.1)
    assert found[31] == pytest.approx(0.512 * 1.1**2) and found[-1] == 1.0


def test_between_the_two_bounds_nothing_changes(parts: Parts) -> None:
    band = [(10.0 + second, 3.5 + second / 100) for second in range(100)]
    assert set(rates(parts, [(0.0, 4.6), *band])) == {0.8}
    # a reading in the band starts the calm seconds anew
    wavering = [(1.0 + second, 3.4 if second % 10 else 3.6) for second in range(50)]
    assert set(rates(parts, [(0.0, 4.6), *wavering])) == {0.8}


def test_readings_that_are_none_change_nothing(parts: Parts) -> None:
    found = rates(parts, [(5.0, 5.0), (20.0, None), (30.0, -3.0), (2.0, 5.0), (9.5, 5.0), (10.0, 5.0)])
    assert found == pytest.approx([0.8] * 5 + [0.64])


def test_a_simulated_device_settles_within_its_budget(parts: Parts) -> None:
    """A device whose power goes with the rate: 8 W at full rate, seen through ten seconds of thermal mass."""
    readings: list[tuple[float, float | None]] = []
    heat, rate = 0.0, 1.0
    for step in range(60):
        heat += (8.0 * rate - heat) * (1 - np.exp(-0.5))
        readings.append((5.0 * step, heat))
        rate = rates(parts, readings)[-1]
    settled, found = [reading or 0 for _, reading in readings[20:]], rates(parts, readings)[20:]
    assert min(settled) > 3.0 and max(settled) < 5.0
    assert min(found) > 0.4 and max(found) < 0.7


@pytest.mark.parametrize("change", [{"budget": 0}, {"budget": -1}, {"slowest": 2}, {"slowest": 0}, {"high": 0.5}])
def test_policies_that_mean_nothing_are_refused(change: dict[str, float], parts: Parts) -> None:
    assert parts.ask([{"do": "govern", "budget": 1, "readings": [], **change}])[0]["code"] == "bad-policy"


# response cache


LIMITS = {"do": "limit cache", "entries": 3, "bytes": 4000, "seconds": 100}


def store(prompt: str, answer: str = "yes", now: tuple[float, int] = (0, 0), scope: str = "b") -> dict[str, Any]:
    return {"do": "store", "key": [scope, "t", prompt], "answer": answer, "now": now}


def find(prompt: str, now: tuple[float, int] = (1, 0), scope: str = "b", template: str = "t") -> dict[str, Any]:
    return {"do": "find", "key": [scope, template, prompt], "now": now}


def asked(parts: Parts, *requests: dict[str, Any]) -> list[Any]:
    return parts.ask([LIMITS, *requests])[1:]


def test_the_very_prompt_comes_before_one_of_the_same_words(parts: Parts) -> None:
    found = asked(parts, store("a b", "1"), store("a  b", "2"), find("a b"), find("a  b"), find(" a\tb "), find("A b"))
    assert found == [True, True, "1", "2", "2", None]


def test_lines_keep_their_spaces(parts: Parts) -> None:
    assert asked(parts, store("if x:\n  y"), find("if x:\n y"), find("if x:\n  y")) == [True, None, "yes"]


def test_another_bundle_or_template_is_another_key(parts: Parts) -> None:
    found = asked(parts, store("a"), find("a", scope="c"), find("a", template="u"), find("ta", template=""), find("a"))
    assert found == [True, None, None, None, "yes"]


def test_old_entries_and_the_least_used_go(parts: Parts) -> None:
    assert asked(parts, store("a"), find("a", (100, 0)), find("a", (101, 0)), find("a", (1, 0))) == [
        True, "yes", None, None
    ]  # fmt: skip
    assert asked(parts, store("a", now=(10, 0)), find("a", (9, 0))) == [True, None]  # the clock was set back
    kept = [store("a"), store("b"), store("c"), find("a"), store("d"), find("b"), find("a"), find("c"), find("d")]
    assert asked(parts, *kept) == [True, True, True, "yes", True, None, "yes", "yes", "yes"]
    large = [store("a", "x" * 5000), find("a"), store("b", "x" * 3000), store("c", "x" * 3000), find("b"), find("c")]
    assert asked(parts, *large) == [False, None, True, True, None, "x" * 3000]
    again = [store("a", "1"), store("a", "2"), find("a"), store("a", "x" * 5000), find("a")]
    assert asked(parts, *again) == [True, True, "2", False, None]


DATED = [
    "What is the date today?",
    "Plan for 2026-11-21",
    "今天天气怎么样",
    "21.11.2026?",
    "11月21日",
    "It is 12:30.",
    "Latest news",
]
MOMENT = ["What time is it?", "What is open now?", "现在几点"]
TIMELESS = ["Tap the button", "What is 3.14 squared?", "I know", "update the app", "打开微信", "version 2", "3. third"]


def test_a_date_never_gives_a_stale_answer(parts: Parts) -> None:
    for prompt in DATED:
        found = asked(
            parts, store(prompt, now=(0, 7)), find(prompt, (9, 7)), find(f" {prompt}", (9, 8)), find(prompt, (9, 7))
        )
        assert found == [True, "yes", None, None], prompt
    for prompt in MOMENT:
        assert asked(parts, store(prompt), find(prompt)) == [False, None], prompt
    for prompt in TIMELESS:
        assert asked(parts, store(prompt, now=(0, 7)), find(prompt, (9, 8))) == [True, "yes"], prompt
    # the same words of another day are another prompt
    assert asked(parts, store("Today is 2026-11-21."), find("Today is 2026-11-22.")) == [True, None]
