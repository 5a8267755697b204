"""What mini is trained and judged on: pictures and spoken words, the questions about them, and their answers.

Nothing here needs torch, so that a bundle is judged on the very same items. Pictures are read out of the files of
scikit-learn and scikit-image, which are not imported; speech is synthesised by eSpeak NG.
"""

from __future__ import annotations

import gzip
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from edgeexport import errors
from edgeexport.core import Array
from edgeexport.families.autoglm_phone.speech import speak_all
from edgeexport.session.audio import Sound, resample
from edgeexport.session.image_file import read_image

DIGITS: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS: Final = (*DIGITS, "yes", "no", "up", "down", "left", "right", "stop", "go", "open", "close")
SCENES: Final = {
    "astronaut.png": "astronaut", "brick.png": "bricks", "camera.png": "photographer", "chelsea.png": "cat",
    "clock_motion.png": "clock", "coffee.png": "coffee", "coins.png": "coins", "grass.png": "grass",
    "gravel.png": "gravel", "hubble_deep_field.jpg": "stars", "ihc.png": "tissue", "moon.png": "moon",
    "motorcycle_left.png": "motorcycle", "page.png": "text", "retina.jpg": "retina", "rocket.jpg": "rocket",
}  # fmt: skip
"""Files of scikit-image and what they show."""

QUESTIONS: Final = {
    "digit": ("Which digit is in the picture?", "What digit does the picture show?", "Which digit do you see?"),
    "scene": ("What is in the picture?", "What does the picture show?", "What do you see?"),
    "word": ("Which word do you hear?", "What does the speaker say?", "Which word is spoken?"),
    "joint": (
        "Which digit do you see and which do you hear?",
        "Which digits are in the picture and in the clip?",
    ),
}
TASKS: Final = tuple(QUESTIONS)

BORDER: Final = 2
"""Black pixels around a digit of 8 x 8."""
TEST_DIGITS: Final = 360
RATE: Final = 16_000

TRAIN_VOICES: Final = tuple(
    f"{accent}+{variant}"
    for accent in ("en-us", "en", "en-029")
    for variant in ("m1", "m2", "m3", "m4", "m7", "f1", "f2", "f3", "klatt", "klatt2", "Alex", "linda")
)
TEST_VOICES: Final = tuple(
    f"{accent}+{variant}"
    for accent in ("en-us", "en-gb-scotland")
    for variant in ("m5", "m6", "m8", "Andrea", "belinda", "klatt3", "steph", "david")
)
"""No voice, no variant of a voice, is in both; the Scottish accent is in the second alone."""


@dataclass(frozen=True, eq=False)
class Picture:
    """uint8 [H, W, 3] and the word for it."""

    array: Array
    label: str


@dataclass(frozen=True, eq=False)
class Clip:
    """float32 [N] samples at 16 kHz and the word in it."""

    samples: Array
    label: str
    rate: int = RATE


@dataclass(frozen=True)
class Split:
    """The pictures and clips of one side: training or held out."""

    digits: tuple[Picture, ...]
    scenes: tuple[Picture, ...]
    clips: tuple[Clip, ...]


@dataclass(frozen=True)
class Item:
    """One question. `picture` and `clip` are what goes with it."""

    task: str
    question: str
    answer: str
    picture: Picture | None = None
    clip: Clip | None = None


def split(held_out: bool, *, scenes_each: int, voices_each: int) -> Split:
    """One side of the data, always the same: so many crops of each picture, so many voices for each word.

    Digits: 360 of scikit-learn's 1797, drawn evenly from the classes, are held out. Scenes: random crops, three
    quarters of each picture to learn from, its lower right quarter to be judged on, and no pixel of both. Words: voices
    that were not heard in training.

    Raises: ToolError `missing-package`; UsageError `unknown-voice`.
    """
    generator = np.random.default_rng([20_26, int(held_out)])
    voices = TEST_VOICES if held_out else TRAIN_VOICES
    return Split(
        digits=_digits(held_out),
        scenes=tuple(
            Picture(_crop(whole, generator, held_out), label)
            for file, label in SCENES.items()
            for whole in [_scene(file)]
            for _ in range(scenes_each)
        ),
        clips=_clips(voices, voices_each, generator),
    )


def held_out_split() -> Split:
    """What the published figures are measured on: 360 digits, 320 crops, 320 clips."""
    return split(True, scenes_each=20, voices_each=16)


def held_out_items(data: Split, *, joint: int = 200) -> list[Item]:
    """The held-out questions: every digit, scene and clip once, and `joint` pairs of a digit and a spoken digit."""
    generator = np.random.default_rng(2026)
    items = [_ask("digit", generator, picture=each) for each in data.digits]
    items += [_ask("scene", generator, picture=each) for each in data.scenes]
    items += [_ask("word", generator, clip=each) for each in data.clips]
    spoken = [clip for clip in data.clips if clip.label in DIGITS]
    for _ in range(joint):
        picture = data.digits[generator.integers(len(data.digits))]
        items.append(_ask("joint", generator, picture=picture, clip=spoken[generator.integers(len(spoken))]))
    return items


def part_of(items: Sequence[Item], each: int) -> list[Item]:
    """At most `each` items of every task, chosen evenly; all with 0."""
    kept = []
    for task in TASKS:
        some = [item for item in items if item.task == task]
        count = min(each or len(some), len(some))
        kept += [some[i * len(some) // count] for i in range(count)]
    return kept


def draw_items(data: Split, task: str, count: int, generator: np.random.Generator) -> list[Item]:
    """`count` random questions of one task, all with the same question, so that their prompts are equally long."""
    question = QUESTIONS[task][generator.integers(len(QUESTIONS[task]))]
    pictures = {"digit": data.digits, "joint": data.digits, "scene": data.scenes}.get(task)
    clips = {"word": data.clips, "joint": tuple(each for each in data.clips if each.label in DIGITS)}.get(task)
    return [
        _item(
            task,
            question,
            pictures[generator.integers(len(pictures))] if pictures else None,
            clips[generator.integers(len(clips))] if clips else None,
        )
        for _ in range(count)
    ]


def _ask(task: str, generator: np.random.Generator, picture: Picture | None = None, clip: Clip | None = None) -> Item:
    return _item(task, QUESTIONS[task][generator.integers(len(QUESTIONS[task]))], picture, clip)


def _item(task: str, question: str, picture: Picture | None, clip: Clip | None) -> Item:
    answer = " and ".join(each.label for each in (picture, clip) if each is not None)
    return Item(task, question, answer, picture, clip)


def accuracy(items: Sequence[Item], answer: Callable[[Item], str]) -> dict[str, float]:
    """The part of each task's items that `answer` gets right, spaces, capitals and a final full stop aside."""
    right: dict[str, list[bool]] = {}
    for item in items:
        given = answer(item).strip().removesuffix(".").lower()
        right.setdefault(item.task, []).append(given == item.answer)
    return {task: sum(each) / len(each) for task, each in right.items()}


def digit_picture(values: Array) -> Array:
    """scikit-learn's 8 x 8 numbers 0..16 as a picture: white on black, with a border."""
    grey = np.rint(values / 16 * 255).astype(np.uint8)
    return np.repeat(np.pad(grey, BORDER)[:, :, None], 3, axis=2)


def _digits(held_out: bool) -> tuple[Picture, ...]:
    path = _package_file("sklearn", "scikit-learn", "datasets/data/digits.csv.gz")
    with gzip.open(path, "rt", encoding="ascii") as file:
        table = np.loadtxt(file, delimiter=",")
    classes = table[:, 64].astype(int)
    order = np.random.default_rng(0).permutation(len(table))
    each = TEST_DIGITS // len(DIGITS)
    test = np.concatenate([order[classes[order] == digit][:each] for digit in range(len(DIGITS))])
    chosen = test if held_out else np.setdiff1d(order, test)
    return tuple(Picture(digit_picture(table[i, :64].reshape(8, 8)), DIGITS[classes[i]]) for i in chosen)


def _scene(file: str) -> Array:
    return read_image(_package_file("skimage", "scikit-image", f"data/{file}")).array


def _crop(whole: Array, generator: np.random.Generator, held_out: bool) -> Array:
    """A random crop, mirrored half of the time: of the lower right quarter, or of the upper or the left half."""
    height, width = whole.shape[0], whole.shape[1]
    if held_out:
        region = whole[height // 2 :, width // 2 :]
    else:
        region = whole[: height // 2] if generator.random() < 0.5 else whole[:, : width // 2]
    tall, wide = region.shape[0], region.shape[1]
    longest = min(tall, wide)
    rows = int(generator.integers(longest * 6 // 10, longest + 1))
    columns = min(wide, int(rows * generator.uniform(0.8, 1.25)))
    top, left = int(generator.integers(tall - rows + 1)), int(generator.integers(wide - columns + 1))
    crop = region[top : top + rows, left : left + columns]
    return np.ascontiguousarray(crop[:, ::-1] if generator.random() < 0.5 else crop)


def _clips(voices: Sequence[str], each: int, generator: np.random.Generator) -> tuple[Clip, ...]:
    """Each word by `each` voices, at a speed, pitch, loudness and beginning of its own, over faint noise."""
    requests = [
        (word, str(voice), int(generator.integers(120, 200)), int(generator.integers(30, 70)))
        for word in WORDS
        for voice in generator.choice(voices, each, replace=False)
    ]
    sounds = speak_all(requests)
    return tuple(Clip(_placed(sound, generator), word) for (word, *_), sound in zip(requests, sounds, strict=True))


def _placed(sound: Sound, generator: np.random.Generator) -> Array:
    samples = resample(sound.samples, sound.rate, RATE) * np.float32(generator.uniform(0.3, 1.0))
    silence = np.zeros(int(generator.uniform(0.0, 1.2) * RATE), np.float32)
    placed = np.concatenate((silence, samples, np.zeros(RATE // 4, np.float32)))
    noise = generator.normal(0.0, 10 ** generator.uniform(-4.0, -2.5), len(placed))
    return np.asarray(placed + noise.astype(np.float32))


def _package_file(module: str, package: str, file: str) -> Path:
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(folder) / file
        if path.is_file():
            return path
    raise errors.missing_package(package, "train")
