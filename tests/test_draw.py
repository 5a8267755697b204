"""Actions drawn on pictures: the mark is where the action is and nowhere else, at every size and in every format."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFont

from edgeexport.core import Array
from edgeexport.errors import UsageError
from edgeexport.session.actions import (
    Action,
    Back,
    CallAPI,
    DoubleTap,
    Finish,
    Home,
    Interact,
    Launch,
    LongPress,
    Malformed,
    Note,
    Swipe,
    TakeOver,
    Tap,
    Type,
    TypeName,
    Wait,
    parse_action,
    to_pixels,
)
from edgeexport.session.draw import DARK, DARK_RED, MAX_CAPTION_CHARS, RED, WHITE, caption, draw, mark, wrap

SIZES = [(28, 28), (224, 224), (2400, 1080), (300, 2000)]
MIDDLE = (500, 500)
TAPS: list[Action] = [Tap(element=MIDDLE), DoubleTap(element=MIDDLE), LongPress(element=MIDDLE)]


def flat(height: int, width: int, colour: int = 120) -> Array:
    return np.full((height, width, 3), colour, np.uint8)


def changed(image: Array, marked: Array) -> Any:
    return (image != marked).any(axis=2)


def code(error: pytest.ExceptionInfo[UsageError]) -> str:
    return error.value.findings[0].code


# marks


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("action", TAPS)
def test_a_tap_is_marked_around_its_point(action: Action, size: tuple[int, int]) -> None:
    image = flat(*size)
    before = image.copy()
    marked = mark(image, action)
    assert np.array_equal(image, before), "the picture given is not drawn on"
    assert (marked.shape, marked.dtype) == (image.shape, np.uint8)
    x, y = to_pixels(action, size[1], size[0])["element"]
    rows, columns = np.nonzero(changed(image, marked))
    reach = 14 * max(1.0, min(size) / 150)
    assert np.hypot(rows - y, columns - x).max() < reach
    assert abs(rows.mean() - y) < 0.6, "round about the point"
    assert abs(columns.mean() - x) < 0.6
    assert tuple(marked[y, x]) == (WHITE if isinstance(action, LongPress) else RED)


def test_the_three_taps_differ() -> None:
    """Along the row to the right of the point: how often red begins."""

    def rings(action: Action) -> int:
        red = (mark(flat(1500, 1500), action)[750, 750:] == RED).all(axis=1)
        return int((~red[:-1] & red[1:]).sum())

    # the cross begins at the point itself; a disc of red begins where the white cross on it ends
    assert [rings(action) for action in TAPS] == [1, 2, 1]
    assert [tuple(mark(flat(1500, 1500), action)[750 + 40, 750]) == RED for action in TAPS] == [False, False, True]


@pytest.mark.parametrize("size", SIZES)
def test_a_swipe_runs_from_its_start_to_its_end(size: tuple[int, int]) -> None:
    image = flat(*size)
    swipe = Swipe(start=(500, 800), end=(250, 200))
    marked = mark(image, swipe)
    points = to_pixels(swipe, size[1], size[0])
    (ax, ay), (bx, by) = points["start"], points["end"]
    for part in np.linspace(0, 1, 9):
        found = marked[round(ay + part * (by - ay)), round(ax + part * (bx - ax))]
        assert np.abs(found - np.array(RED)).max() <= 60, "red, but for the smoothing of its edge"
    assert not changed(image, marked)[:, -size[1] // 4 :].any(), "nothing on the right"


def test_the_head_of_an_arrow_is_at_its_end() -> None:
    """The arrow is widest shortly before its end, and wider there than its dot."""
    marks = changed(flat(300, 300), mark(flat(300, 300), Swipe(start=(200, 500), end=(800, 500))))
    widths = marks.sum(axis=0)
    assert 210 < widths.argmax() < 240
    assert widths.max() > 1.3 * widths[40:80].max()


def test_a_swipe_to_where_it_starts_is_a_dot() -> None:
    marked = mark(flat(300, 300), Swipe(start=MIDDLE, end=MIDDLE))
    assert tuple(marked[150, 150]) == RED
    assert changed(flat(300, 300), marked).sum() < 400


@pytest.mark.parametrize("colour", [0, 255, RED])
def test_a_mark_stands_out_from_any_colour(colour: Any) -> None:
    image = np.full((400, 400, 3), colour, np.uint8)
    marked = mark(image, Tap(element=MIDDLE)).reshape(-1, 3)
    for shown in (RED, WHITE, DARK):
        assert (marked == shown).all(axis=1).sum() > 50, "red within white within a dark rim"


@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.tuples(*[st.integers(0, 999)] * 4),
    st.sampled_from(["Tap", "Double Tap", "Long Press", "Swipe"]),
)
@settings(deadline=None)
def test_a_picture_of_any_size_keeps_it(width: int, height: int, point: tuple[int, ...], name: str) -> None:
    a, b, c, d = point
    places = f"start=[{a},{b}], end=[{c},{d}]" if name == "Swipe" else f"element=[{a},{b}], message='pay'"
    image = flat(height, width)
    marked = mark(image, parse_action(f'do(action="{name}", {places})'))
    assert marked.shape == image.shape
    assert changed(image, marked).any()


# captions


CAPTIONS: list[tuple[Action, str]] = [
    (Launch(app="Settings"), "Launch: Settings"),
    (Tap(element=MIDDLE), ""),
    (Tap(element=MIDDLE, message="pay"), "Tap: pay"),
    (Type(text="a\nb\t\x07c "), "Type: a b c"),
    (TypeName(text="张三"), "Type_Name: 张三"),
    (Interact(), "Interact"),
    (Swipe(start=MIDDLE, end=MIDDLE), ""),
    (Note(message="True"), "Note: True"),
    (CallAPI(instruction="sum up"), "Call_API: sum up"),
    (LongPress(element=MIDDLE), ""),
    (DoubleTap(element=MIDDLE), ""),
    (TakeOver(message="log in"), "Take_over: log in"),
    (Back(), "Back"),
    (Home(), "Home"),
    (Wait(duration=2.0), "Wait: 2 s"),
    (Wait(duration=0.5), "Wait: 0.5 s"),
    (Finish(message="done"), "finish: done"),
    (Finish(message=""), "finish:"),
    (Malformed("x", "the answer is empty", 0), "malformed: the answer is empty"),
]


@pytest.mark.parametrize(("action", "text"), CAPTIONS)
def test_caption(action: Action, text: str) -> None:
    assert caption(action) == text


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("action", "background"), [(Launch(app="Settings"), DARK), (parse_action("x"), DARK_RED)])
def test_a_caption_is_a_strip_over_the_lower_edge(
    action: Action, background: tuple[int, int, int], size: tuple[int, int]
) -> None:
    image = flat(*size)
    marked = mark(image, action)
    rows = changed(image, marked)
    first = int(rows.any(axis=1).argmax())
    assert first >= size[0] // 2
    assert rows[first:].all()
    strip = marked[first:].reshape(-1, 3)
    assert (strip == background).all(axis=1).mean() > 0.4
    assert (strip.min(axis=1) > 200).any(), "white letters"


def test_a_long_caption_leaves_the_upper_half_free() -> None:
    for size in SIZES:
        marked = mark(flat(*size), Type(text="word " * 20_000))
        assert not changed(flat(*size), marked)[: size[0] // 2].any()
    assert len(caption(Type(text="x" * 60_000))) == len("Type: ") + MAX_CAPTION_CHARS


def test_a_mark_is_seen_on_its_caption() -> None:
    marked = mark(flat(600, 600), Tap(element=(500, 999), message="pay"))
    x, y = to_pixels(Tap(element=(500, 999)), 600, 600)["element"]
    assert tuple(marked[y, x]) == RED


@pytest.mark.parametrize("text", ["ab", "a\ud800b", "\u202e\u0000", "e\u0301", "👩\u200d🚀", "ﷺ" * 50, "\U0010ffff"])
def test_any_letters_can_be_written(text: str) -> None:
    assert changed(flat(90, 90), mark(flat(90, 90), Type(text=text))).any()


def test_a_font_that_has_the_letters_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two letters that Pillow's own font shows as the same box differ in a font that has them."""
    letters = "жщ"
    asked: list[str] = []
    own = ImageFont.load_default(20)
    boxes = [bytes(own.getmask(letter)) for letter in letters]
    assert boxes[0] == boxes[1], "else this test needs other letters"

    class Other:
        """Latin letters stand in for a font that knows more."""

        def getmask(self, letter: str) -> Any:
            return own.getmask({"ж": "a", "щ": "b"}.get(letter, letter))

    def truetype(name: str, size: int) -> Any:
        asked.append(name)
        if name != "NotoSansCJK-Regular.ttc":
            raise OSError("cannot open resource")
        return Other()

    from edgeexport.session.draw import _font

    monkeypatch.setattr(ImageFont, "truetype", truetype)
    monkeypatch.setattr(ImageFont, "load_default", lambda size: own)
    assert _font("plain", 20) is own
    assert asked == []
    assert isinstance(_font(letters, 20), Other)
    assert _font("\U0010ffff", 20) is own, "nobody has it"


@pytest.mark.parametrize(
    ("text", "room", "lines"),
    [
        ("one two three", 7, ["one two", "three"]),
        ("one two three", 6, ["one", "two", "three"]),
        ("abcdefgh ij", 5, ["abcde", "fgh", "ij"]),
        ("", 5, [""]),
    ],
)
def test_lines_are_broken_at_spaces_where_there_are_any(text: str, room: float, lines: list[str]) -> None:
    assert wrap(text, [1.0] * len(text), room) == lines


@given(st.text("ab ", max_size=60), st.floats(1, 12))
def test_lines_fit_and_lose_nothing_but_spaces(text: str, room: float) -> None:
    text = " ".join(text.split())
    lines = wrap(text, [1.0] * len(text), room)
    assert all(len(line) <= room for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    for line, following in pairwise(lines):
        assert len(line) + 1 + len(following.split(" ")[0]) > room, "lines are filled"


# files


@pytest.mark.parametrize(("suffix", "name"), [("png", "PNG"), ("jpg", "JPEG"), ("JPEG", "JPEG"), ("webp", "WEBP")])
def test_the_suffix_is_the_format(suffix: str, name: str, tmp_path: Path) -> None:
    out = tmp_path / f"marked.{suffix}"
    image = flat(240, 160)
    draw(image, Tap(element=(250, 250)), out)
    with Image.open(out) as saved:
        assert saved.format == name
        found = np.array(saved.convert("RGB")).astype(int)
    exact = mark(image, Tap(element=(250, 250)))
    assert found.shape == exact.shape
    assert np.abs(found - exact).max() <= (60 if name == "JPEG" else 0)
    assert np.abs(found[60, 40] - np.array(RED)).max() <= 60


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("marked.tga", "unknown-picture-suffix"),
        ("marked", "unknown-picture-suffix"),
        ("missing/marked.png", "picture-not-written"),
        ("folder.png", "picture-not-written"),
        ("a\0b.png", "picture-not-written"),
        ("x" * 300 + ".png", "picture-not-written"),
    ],
)
def test_a_file_that_cannot_be_written(name: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UsageError) as error:
        draw(flat(20, 20), Back(), tmp_path / name)
    assert code(error) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_a_picture_too_long_for_its_format(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        draw(flat(1, 70_000), Tap(element=MIDDLE), tmp_path / f"out.{suffix}")
    assert code(error) == "picture-not-written"
    draw(flat(1, 70_000), Tap(element=MIDDLE), tmp_path / "out.png")


def test_another_array_is_no_picture() -> None:
    with pytest.raises(UsageError) as error:
        mark(np.zeros((4, 4, 3), np.float32), Back())
    assert code(error) == "not-an-image"
