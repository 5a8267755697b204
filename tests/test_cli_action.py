"""`edgeexport run --action --draw`: a picture and a prompt in, one JSON action and a marked picture out.

Only the model is scripted: command line, session, placeholders, splitting, parsing and drawing are the real ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgeexport import cli_chat
from edgeexport.cli_edge import execute
from edgeexport.core import Array
from edgeexport.session.draw import DARK_RED, RED
from edgeexport.session.image_contract import PatchContract
from edgeexport.session.inputs import Inputs
from edgeexport.session.preprocess import Preprocess
from edgeexport.session.session import Session

PLACEHOLDER = "▣"
STOP = 4
TAP = '<think>The button is there.</think><answer>do(action="Tap", element=[250,500])</answer>'
PICTURES = PatchContract(14, 2, 2, 1, 28 * 28 * 8, 1 / 255, (0.0,) * 3, (1.0,) * 3, grids=((2, 4),))


class Scripted:
    """A decoder that says `answer`, whatever it is fed, and then stops. A token is a character."""

    context = 4000
    vocab = 1 << 16
    runtime_seconds = 0.0

    def __init__(self, answer: str) -> None:
        self.left = [*map(ord, answer), STOP]
        self.fed: list[int] = []

    def step(self, tokens: Any, position: int, rope: Any = None) -> Any:
        self.fed += [int(value) for value in tokens[:, 0]]
        logits = np.zeros(self.vocab, np.float32)
        logits[self.left.pop(0)] = 1000  # the frequency penalty must not change the script
        return logits

    def close(self) -> None: ...


def encoders(component: str, variant: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
    """A token's embedding is its id; a picture's features are -1."""
    if component == "embed":
        return {"inputs_embeds": inputs["input_ids"][..., None].astype(np.float32)}
    assert (component, variant, inputs["patches"].shape) == ("vision", "2x4", (8, 3 * 2 * 14 * 14))
    return {"features": np.full((2, 1), -1, np.float32)}


class Bundle:
    path = Path("dist/m")
    stop_ids = (STOP,)
    stand_in = ""

    def __init__(self, runner: Scripted) -> None:
        self.runner = runner

    def session(self, threads: int | None = None) -> Session:
        contract = Preprocess(image=PICTURES, image_token_id=ord(PLACEHOLDER))
        return Session(self.runner, Inputs(contract, encoders))

    def tokenizer(self) -> Bundle:
        return self

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) for letter in text]

    def stream(self) -> Bundle:
        return self

    def push(self, token: int) -> str:
        return chr(token)

    def flush(self) -> str:
        return ""

    def chat_template(self) -> Bundle:
        return self

    def warm(self) -> None: ...

    def render(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool) -> str:
        (message,) = messages
        return "".join(part.get("text", PLACEHOLDER) for part in message["content"])


Says = Callable[[str], Scripted]


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Says:
    """Sets what the model will answer."""

    def script(answer: str) -> Scripted:
        runner = Scripted(answer)
        monkeypatch.setattr(cli_chat, "open_bundle", lambda path: Bundle(runner))
        return runner

    return script


@pytest.fixture
def shot(tmp_path: Path) -> str:
    """A grey screen 400 wide and 200 high."""
    path = tmp_path / "shot.png"
    Image.new("RGB", (400, 200), (90, 90, 90)).save(path)
    return str(path)


def pixel(path: Path, x: int, y: int) -> Any:
    with Image.open(path) as picture:
        assert picture.size == (400, 200)
        return picture.convert("RGB").getpixel((x, y))


def test_a_tap_is_printed_and_drawn(says: Says, shot: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runner = says(TAP)
    out = tmp_path / "marked.png"
    assert execute(["run", "dist/m", "-i", shot, "-p", "tap it", "--action", "--draw", str(out)]) == 0
    shown, narrated = capsys.readouterr()
    assert json.loads(shown) == {
        "think": "The button is there.",
        "complete": True,
        "action": {"action": "Tap", "element": [250, 500], "element_pixels": [100, 100]},
    }
    assert "(stop)" in narrated
    assert runner.fed[:4] == [-1, -1, ord("t"), ord("a")], "the picture's two features, then the prompt"
    assert pixel(out, 100, 100) == RED
    assert pixel(out, 399, 199) == (90, 90, 90)


def test_with_json_it_is_one_document(
    says: Says, shot: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    says('finish(message="完成")')
    out = tmp_path / "marked.webp"
    assert execute(["run", "dist/m", "-i", shot, "-p", "go", "--action", "--draw", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["text"] == 'finish(message="完成")'
    assert document["token_ids"] == [ord(letter) for letter in document["text"]]
    assert document["finish_reason"] == "stop"
    assert (document["think"], document["complete"]) == (None, True)
    assert document["action"] == {"action": "finish", "message": "完成"}
    assert pixel(out, 399, 199) != (90, 90, 90), "the caption"


def test_what_is_no_action_is_said_and_drawn_as_such(
    says: Says, shot: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    says("I cannot see a button.")
    out = tmp_path / "marked.png"
    assert execute(["run", "dist/m", "-i", shot, "-p", "go", "--action", "--draw", str(out)]) == 0
    action = json.loads(capsys.readouterr().out)["action"]
    assert (action["action"], action["answer"]) == ("malformed", "I cannot see a button.")
    assert pixel(out, 399, 199) == DARK_RED


@pytest.mark.parametrize(("length", "think"), [(10, "The"), (60, "The button is there.")])
def test_an_answer_that_broke_off_is_not_complete(
    length: int, think: str, says: Says, shot: str, capsys: pytest.CaptureFixture[str]
) -> None:
    says(TAP)
    arguments = ["run", "dist/m", "-i", shot, "-p", "go", "--action", "--max-tokens", str(length)]
    assert execute(arguments) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["think"], document["complete"]) == (think, False)
    assert document["action"]["action"] == "malformed"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["-p", "go", "--action"], "action-needs-picture"),
        (["-p", "go", "-i", "SHOT", "--draw", "out.png"], "action-needs-picture"),
        (["-i", "SHOT", "--action"], "json-needs-prompt"),
        (["-p", "go", "-i", "SHOT", "--action", "--draw", "out.pdf"], "unknown-picture-suffix"),
        (["-p", "go", "-i", "SHOT", "--action", "--draw", "missing/out.png"], "picture-not-written"),
    ],
)
def test_what_cannot_work_is_refused_before_the_model_runs(
    arguments: list[str], code: str, says: Says, shot: str, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = says(TAP)
    assert execute(["run", "dist/m", *[shot if each == "SHOT" else each for each in arguments]]) == 2
    assert f"error[{code}]" in capsys.readouterr().err
    assert runner.fed == []
