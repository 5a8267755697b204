"""What the ladder asks and shows: short texts of different kinds, a drawn picture for every grid, a sound."""

from __future__ import annotations

import io
import wave
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgeexport import errors
from edgeexport.core import Array, EncoderInput, Example
from edgeexport.session.audio import AudioContract, read_wav
from edgeexport.session.image_contract import PatchContract, PixelContract
from edgeexport.session.image_file import Image
from edgeexport.session.inputs import Inputs
from edgeexport.session.preprocess import Preprocess
from edgeexport.session.tokenizer import Tokenizer

if TYPE_CHECKING:
    from edgeexport.session.chat import ChatTemplate

ROOM = 32
"""Tokens of the context that a prompt leaves for the ladder's answers."""

TEXTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Once upon a time, in a small village by the sea, there lived an old fisherman who",
    "List three primary colors:\n1.",
    "Question: What is 12 times 12?\nAnswer:",
    "北京是中国的首都，也是",
    "The quick brown fox jumps over the lazy dog. The dog then",
    "import numpy as np\n\nx = np.zeros((3, 4))\nprint(x.shape)  #",
    "Photosynthesis is the process by which plants use sunlight, water and carbon dioxide to",
)


QUESTIONS = (
    "What is the capital of France?",
    "Name three planets.",
    "Write one sentence about the sea.",
    "2 + 3 =",
    "Translate to German: Good morning, my friend.",
    "Which animal says meow?",
    "Write a Python function that adds two numbers.",
    "中国的首都是哪里？",
)
"""What a user would ask: eight answers are shown beside the original's."""

QUESTION = "Describe what you see or hear."


@dataclass(frozen=True)
class Shown:
    """A prompt with pictures or sound: as the model takes it, and each of them as a file: (kind, name, bytes)."""

    example: Example
    media: tuple[tuple[Literal["image", "audio"], str, bytes], ...]


def texts(tokenizer_json: bytes, vocab: int, context: int) -> list[Example]:
    """The texts as int64 token ids of this tokenizer, each at most a quarter of the context and never empty."""
    encode = _encoder(tokenizer_json, vocab)
    return [Example(np.array(encode(text, True)[: max(1, context // 4)], np.int64)) for text in TEXTS]


def questions(tokenizer_json: bytes, template: ChatTemplate | None, vocab: int, context: int) -> dict[str, Example]:
    """`QUESTIONS` as the model is asked them: through its chat template where it has one that renders them, else as
    plain text. One that leaves no room for an answer is cut to a quarter of the context."""
    encode = _encoder(tokenizer_json, vocab)
    found = {}
    for question in QUESTIONS:
        tokens = _rendered(template, question, 0, encode, None) or encode(question, True)
        if len(tokens) + ROOM > context:
            tokens = encode(question, True)[: max(1, context // 4)]
        found[question] = Example(np.array(tokens, np.int64))
    return found


def shown(
    contract: Preprocess, tokenizer_json: bytes, template: ChatTemplate | None, vocab: int, context: int,
    questions: Mapping[str, str],
) -> dict[str, Shown]:  # fmt: skip
    """One prompt per modality that the contract has, and one with all of them: pictures of every grid that was built.

    A prompt that leaves no room for an answer is not asked, and its modality then has no numeric rows: the report
    says so.
    """
    encode = _encoder(tokenizer_json, vocab)
    inputs = Inputs(contract, _no_model)
    pictures: list[tuple[EncoderInput, tuple[Literal["image", "audio"], str, bytes]]] = []
    for rows, columns in contract.grids:
        patch = contract.image.patch_size if isinstance(contract.image, PatchContract) else 1
        pictures.append(_picture(inputs, rows * patch, columns * patch))
    if isinstance(contract.image, PixelContract):
        pictures.append(_picture(inputs, contract.image.size, contract.image.size))
    sounds = [_sound(inputs, contract.audio)] if contract.audio is not None else []
    prompts = {"picture": pictures, "sound": sounds}
    if pictures and sounds:
        prompts["picture and sound"] = pictures + sounds
    found = {}
    for name, given in prompts.items():
        if not given:
            continue
        count = sum(kind == "image" for _, (kind, _, _) in given) if contract.joining == "splice" else 0
        question = questions.get(name, QUESTION)
        prompt = _rendered(template, question, count, encode, contract) or [
            *(contract.image_ids * count), *encode(question, True)
        ]  # fmt: skip
        tokens = inputs.expand(prompt, [prepared for prepared, _ in given])
        if len(tokens) + ROOM <= context:
            example = Example(np.array(tokens, np.int64), tuple(prepared for prepared, _ in given))
            found[name] = Shown(example, tuple(medium for _, medium in given))
    return found


def _rendered(
    template: ChatTemplate | None, question: str, pictures: int, encode: Encode, contract: Preprocess | None
) -> list[int] | None:
    """The question as the model is asked it; None without a template, or with one that leaves the pictures out."""
    if template is None:
        return None
    content: Any = question
    if pictures:
        content = [*[{"type": "image"}] * pictures, {"type": "text", "text": question}]
    try:
        tokens = encode(template.render([{"role": "user", "content": content}]), False)
    except errors.EdgeExportError:
        return None
    token = contract.image_token_id if contract is not None else None
    return tokens if pictures == sum(each == token for each in tokens) else None


def _picture(
    inputs: Inputs, height: int, width: int
) -> tuple[EncoderInput, tuple[Literal["image", "audio"], str, bytes]]:
    from PIL import Image as Pillow

    drawn = drawing(height, width)
    buffer = io.BytesIO()
    Pillow.fromarray(drawn).save(buffer, "BMP")  # loaders read it without a library
    name = f"picture-{height}x{width}.bmp"
    return inputs.prepare_image(Image(drawn)), ("image", name, buffer.getvalue())


def _sound(
    inputs: Inputs, contract: AudioContract
) -> tuple[EncoderInput, tuple[Literal["image", "audio"], str, bytes]]:
    data = chirp(contract.sample_rate)
    return inputs.prepare_audio(read_wav(data)), ("audio", "sound.wav", data)


def drawing(height: int, width: int) -> Array:
    """Something like a screen: uint8 [height, width, 3] with a gradient, a bar, buttons and a disc."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    picture = np.stack([60 + 120 * y / height, 90 + 100 * x / width, 200 - 90 * (x + y) / (height + width)], -1)
    picture[: max(1, height // 16)] = (32, 32, 40)
    for i in range(4):
        top, left = height // 8 + (i // 2) * height // 5, width // 12 + (i % 2) * width // 2
        picture[top : top + height // 8, left : left + width // 3] = (230 - 40 * i, 60 + 45 * i, 120)
    disc = (x - width * 0.5) ** 2 + (y - height * 0.78) ** 2 < (0.12 * min(height, width)) ** 2
    picture[disc] = (250, 240, 90)
    return np.asarray(picture.round().clip(0, 255).astype(np.uint8))


def chirp(rate: int, seconds: float = 1.0) -> bytes:
    """A wav file: 16-bit mono, a tone rising from 200 to 3000 Hz with a pulse each quarter."""
    t = np.arange(int(rate * seconds)) / rate
    wave_form = np.sin(2 * np.pi * (200 * t + 1400 * t**2 / seconds)) * (0.3 + 0.5 * ((4 * t) % 1 < 0.5))
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((wave_form * 32767).astype("<i2").tobytes())
    return buffer.getvalue()


Encode = Callable[[str, bool], list[int]]
"""Text, and whether the tokenizer's own special tokens go around it, to ids."""


def _encoder(tokenizer_json: bytes, vocab: int) -> Encode:
    """Text to ids; those beyond the model's vocabulary (a tokenizer may be larger than its model) are left out."""
    tokenizer = Tokenizer(tokenizer_json)
    return lambda text, special: [i for i in tokenizer.encode(text, add_special_tokens=special) if i < vocab] or [0]


def _no_model(component: str, variant: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
    raise AssertionError("preparing needs no model")
