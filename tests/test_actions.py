"""AutoGLM-Phone's answers: every action is read, nothing a model writes raises, and a stream splits as its whole."""

from __future__ import annotations

import ast
import json
import re
import time
from itertools import groupby
from typing import get_args

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edgeexport.errors import UsageError
from edgeexport.session.actions import (
    MAX_ANSWER_CHARS,
    Action,
    AnswerSplitter,
    Back,
    Channel,
    Done,
    Malformed,
    Swipe,
    Tap,
    Thought,
    kind_of,
    parse_action,
    split_answer,
    to_json,
    to_pixels,
)

# the grammar


ACTIONS: list[tuple[str, dict[str, object]]] = [
    # the calls of the model's public system prompt
    ('do(action="Launch", app="微信")', {"action": "Launch", "app": "微信"}),
    ('do(action="Tap", element=[500,300])', {"action": "Tap", "element": [500, 300]}),
    (
        'do(action="Tap", element=[0,999], message="重要操作")',
        {"action": "Tap", "element": [0, 999], "message": "重要操作"},
    ),
    ('do(action="Type", text="hello")', {"action": "Type", "text": "hello"}),
    ('do(action="Type_Name", text="张三")', {"action": "Type_Name", "text": "张三"}),
    ('do(action="Interact")', {"action": "Interact"}),
    ('do(action="Swipe", start=[500,800], end=[500,200])', {"action": "Swipe", "start": [500, 800], "end": [500, 200]}),
    ('do(action="Note", message="True")', {"action": "Note", "message": "True"}),
    ('do(action="Call_API", instruction="sum up")', {"action": "Call_API", "instruction": "sum up"}),
    ('do(action="Long Press", element=[1,2])', {"action": "Long Press", "element": [1, 2]}),
    ('do(action="Double Tap", element=[1,2])', {"action": "Double Tap", "element": [1, 2]}),
    ('do(action="Take_over", message="log in")', {"action": "Take_over", "message": "log in"}),
    ('do(action="Back")', {"action": "Back"}),
    ('do(action="Home")', {"action": "Home"}),
    ('do(action="Wait", duration="2 seconds")', {"action": "Wait", "duration": 2.0}),
    ('finish(message="done")', {"action": "finish", "message": "done"}),
    # the same in other writing
    ('do(element=[5, 6], action="Tap")', {"action": "Tap", "element": [5, 6]}),
    ("do ( action = 'Tap' ,\n element = [ 5 ,\t6 ] , )", {"action": "Tap", "element": [5, 6]}),
    ('do(action="Tap", element=(5,6))', {"action": "Tap", "element": [5, 6]}),
    ('do(action="Tap", element=[5.0, 6.00])', {"action": "Tap", "element": [5, 6]}),
    ('do(action="Wait", duration="1.5s")', {"action": "Wait", "duration": 1.5}),
    ('do(action="Wait", duration="3 秒")', {"action": "Wait", "duration": 3.0}),
    ('do(action="Wait", duration=600)', {"action": "Wait", "duration": 600.0}),
    ('do(action="Type", text="")', {"action": "Type", "text": ""}),
    ('do(action="Type", text="a\nb\t ")', {"action": "Type", "text": "a\nb\t "}),
    (r'do(action="Type", text="a\nb\\ \"c\" \'d\' \u4f60\/")', {"action": "Type", "text": "a\nb\\ \"c\" 'd' 你/"}),
    (r'do(action="Type", text="C:\dir \ud83d")', {"action": "Type", "text": r"C:\dir \ud83d"}),
    ("""do(action="Type", text="it's")""", {"action": "Type", "text": "it's"}),
    ("""finish(message='say "hi"')""", {"action": "finish", "message": 'say "hi"'}),
    ('do(action="Type", text="a, b=[1,2]) (c")', {"action": "Type", "text": "a, b=[1,2]) (c"}),
    ('\n do(action="Back")</answer>\n', {"action": "Back"}),
    ('<|begin_of_box|>do(action="Back")<|end_of_box|><|user|>', {"action": "Back"}),
    (
        'do(action="Swipe", start=[1,2], end=[3,4], speed="slow", by=[ 1 ])',
        {"action": "Swipe", "start": [1, 2], "end": [3, 4], "extra": {"speed": "slow", "by": "[ 1 ]"}},
    ),
    # repaired, and said so
    (
        'do(action="Type", text="say "hi"")',
        {"action": "Type", "text": 'say "hi"', "notes": ["text: its quotes were not escaped"]},
    ),
    (
        'do(action="Type", text=""quoted" at once")',
        {"action": "Type", "text": '"quoted" at once', "notes": ["text: its quotes were not escaped"]},
    ),
    (
        "do(action='Type', text='it's')",
        {"action": "Type", "text": "it's", "notes": ["text: its quotes were not escaped"]},
    ),
    (
        'do(action="Tap", element=[1.5, 998.4])',
        {"action": "Tap", "element": [2, 998], "notes": ["element: rounded to whole numbers"]},
    ),
    (
        'do(action="long_press", element=[1,2])',
        {"action": "Long Press", "element": [1, 2], "notes": ["action: read long_press as Long Press"]},
    ),
    (
        "do(action=Launch, app=Settings)",
        {"action": "Launch", "app": "Settings", "notes": ["app: it was not quoted"]},
    ),
]

MALFORMED: list[tuple[str, str, int]] = [
    ("", "the answer is empty", 0),
    (" <|user|>\n", "the answer is empty", 10),
    ("I cannot do that.", "neither do(...) nor finish(...)", 0),
    ("""[{'Type", text="库迪咖啡")""", "neither do(...) nor finish(...)", 0),
    ("tap(element=[1,2])", "neither do(...) nor finish(...)", 0),
    ('Sure: do(action="Back")', "neither do(...) nor finish(...)", 0),
    ("do(", "breaks off", 3),
    ('do(action="Back"', "breaks off", 16),
    ('do(action="Tap", element=[5', "breaks off", 27),
    ('do(action="Tap", element=', "breaks off", 25),
    ('do(action="Type", text="cut of', "is not closed", 23),
    ('do(action="Type", text="C:\\")', "is not closed", 23),
    ('do(action="Back") and wait', "more text after the call", 17),
    ('do(action="Back")\ndo(action="Home")', "more text after the call", 17),
    ('do(action="Launch", app="a") do(action="Back")', "more text after the call", 28),
    ('finish(message="say "hi"") do(action="Back")', "could end in several places", 15),
    ('do(action="Type", text="he said "x", app="y")', "could end in several places", 23),
    ('do(action="Type", text="(see "x") now")', "could end in several places", 23),
    ("do(text='it's', action='Type')", "could end in several places", 8),
    ('do(action="Type", text="a" b)', "a comma or ) should stand here", 27),
    ("do()", "no action", 3),
    ('do("Back")', "a keyword and = should stand here", 3),
    ('do(action="Back", Home)', "a keyword and = should stand here", 18),
    ('do(action="Back", action="Home")', "action is given twice", 18),
    ('do(action=, app="x")', "a value should stand here", 10),
    ('do(action="Fly")', "no action is named Fly; ", 10),
    ('do(action="Tapp", element=[1,2])', "did you mean Tap?", 10),
    ("do(action=[Tap])", "no action is named", 10),
    ('do(action="Tap")', "Tap needs element", 15),
    ('do(action="Swipe", from=[1,2])', "Swipe needs start and end", 29),
    ('do(action="Wait")', "Wait needs duration", 16),
    ("finish()", "finish needs message", 7),
    ('do(action="Tap", element=[1000,3])', "1000, which is not in 0..999", 25),
    ('do(action="Tap", element=[3,-1])', "-1, which is not in 0..999", 25),
    ('do(action="Tap", element=[3,999.6])', "999.6, which is not in 0..999", 25),
    ('do(action="Tap", element=[1,2,3,4])', "has 4 numbers; [x,y] has 2", 25),
    ('do(action="Tap", element=[])', "has 0 numbers", 25),
    ('do(action="Tap", element=[[1,2]])', "a number should stand here", 26),
    ('do(action="Tap", element=[1 2])', "a comma or ] should stand here", 28),
    ('do(action="Tap", element=[a,b])', "holds a, which is not a number", 25),
    ('do(action="Tap", element=[nan,1e3])', "holds nan, which is not a number", 25),
    ('do(action="Tap", element=[٣,3])', "which is not a number", 25),
    ('do(action="Tap", element="5,6")', "element is 5,6, not [x,y]", 25),
    ('do(action="Type", text=[1])', "text is a list, not a string", 23),
    ('do(action="Wait", duration="a while")', 'not like "2 seconds"', 27),
    ('do(action="Wait", duration="-1 seconds")', 'not like "2 seconds"', 27),
    ('do(action="Wait", duration="601 seconds")', "at most 600", 27),
]


@pytest.mark.parametrize(("answer", "expected"), ACTIONS)
def test_action(answer: str, expected: dict[str, object]) -> None:
    assert to_json(parse_action(answer)) == expected


@pytest.mark.parametrize(("answer", "problem", "position"), MALFORMED)
def test_malformed(answer: str, problem: str, position: int) -> None:
    action = parse_action(answer)
    assert isinstance(action, Malformed), action
    assert problem in action.problem
    assert (action.answer, action.position) == (answer, position)


def test_the_table_has_every_action() -> None:
    assert {shown["action"] for _, shown in ACTIONS} == {kind.__struct_config__.tag for kind in get_args(Done)}


def test_the_name_of_an_action_is_the_model_s() -> None:
    assert kind_of(parse_action('do(action="Long Press", element=[1,2])')) == "Long Press"
    assert kind_of(parse_action("")) == "malformed"


def escaped(text: str, quote: str) -> str:
    return quote + text.replace("\\", "\\\\").replace(quote, "\\" + quote) + quote


@given(st.text(), st.sampled_from("\"'"), st.booleans())
@example('")', '"', True)
@example('", text="', '"', False)
@example("do(action='Back')", "'", True)
def test_any_escaped_text_comes_back_as_it_was(text: str, quote: str, first: bool) -> None:
    keywords = [f"text={escaped(text, quote)}", f"action={quote}Type{quote}"]
    action = parse_action(f"do({', '.join(keywords if first else keywords[::-1])})")
    assert to_json(action) == {"action": "Type", "text": text}


@given(st.integers(0, 999), st.integers(0, 999))
def test_every_point_of_the_screen_is_read(x: int, y: int) -> None:
    assert parse_action(f'do(action="Tap", element=[{x},{y}])') == Tap(element=(x, y))


def test_a_string_of_python_is_read_as_python_reads_it() -> None:
    written = r"""'it\'s "so"\n\t\r\\ \u4f60'"""
    action = parse_action(f"finish(message={written})")
    assert to_json(action) == {"action": "finish", "message": ast.literal_eval(written)}


# nothing raises


PIECES = [
    *(
        "do(",
        "finish(",
        "action=",
        '"Tap"',
        '"Type"',
        "element=",
        "text=",
        "message=",
        "[1,2]",
        "[",
        "]",
        "(",
        ")",
        ",",
    ),
    *(
        '"',
        "'",
        "\\",
        "\n",
        " ",
        "=",
        "“",
        "”",
        "\x00",
        "\ud800",
        "٣",
        "é",
        "<|user|>",
        "</answer>",
        "<think>",
        "-1",
        "1e9",
    ),
]
SOUP = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)


@st.composite
def damaged(draw: st.DrawFn) -> str:
    """An answer of the table with a few of its characters replaced, dropped or doubled."""
    answer = draw(st.sampled_from(ACTIONS))[0]
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(answer)))
        end = draw(st.integers(start, min(len(answer), start + 3)))
        answer = answer[:start] + draw(st.sampled_from(["", *PIECES, answer[start:end] * 2])) + answer[end:]
    return answer


def assert_typed(answer: str) -> None:
    action = parse_action(answer)
    assert isinstance(action, Action)
    shown = to_json(action, (1080, 2400))
    assert json.loads(json.dumps(shown)) == shown
    if isinstance(action, Malformed):
        assert answer.startswith(action.answer)
        assert 0 <= action.position <= len(action.answer)
        assert action.problem
        assert len(action.problem) < 200
    for x, y in to_pixels(action, 1080, 2400).values():
        assert 0 <= x < 1080
        assert 0 <= y < 2400


@given(st.one_of(st.text(), SOUP, damaged(), SOUP.map(lambda inner: f'do(action="Type", text="{inner}")')))
@example("do(action=" + "9" * 400 + ")")
@example('do(action="Wait", duration="' + "9" * 400 + '")')
@example('do(action="Tap", element=[' + "9" * 5000 + ",1])")
def test_any_text_is_an_action_or_malformed(answer: str) -> None:
    assert_typed(answer)
    thought = split_answer(answer)
    assert_typed(thought.answer)


FULL = MAX_ANSWER_CHARS
HUGE = {
    "brackets": 'do(action="Tap", element=' + "[" * 60_000,
    "calls": "do(action=" * 6_000,
    "round brackets": "do(" + "(" * 60_000,
    "quotes": 'finish(message="' + '"' * 60_000,
    "quotes that could end": 'finish(message="' + '")' * 30_000,
    "quotes and spaces": 'finish(message="' + ('" ' * 30_000),
    "quotes and keywords": 'do(a="' + '",b="x' * 10_000,
    "quotes of both kinds": "do(" + "a='\" b=\"'" * 6_000,
    "keywords": "do(" + ",".join(f"k{number}=1" for number in range(6_000)) + ")",
    "backslashes": 'finish(message="' + "\\" * 60_000,
    "spaces": "do(" + " " * 60_000,
    "spaces before": " " * 60_000 + "do(",
    "numbers": 'do(action="Tap", element=[' + "1," * 30_000 + "1])",
    "a word": "d" * FULL,
    "special tokens": "<|" * 30_000,
    "tags": "<answer>" * 8_000,
    "cut tags": "<think" * 10_000,
}


@pytest.mark.parametrize("name", HUGE)
def test_time_is_linear_in_the_text(name: str) -> None:
    answer = HUGE[name]
    assert len(answer) <= FULL
    start = time.process_time()
    assert_typed(answer)
    split_answer(answer)
    assert time.process_time() - start < 1


def test_more_than_a_model_can_say_is_not_parsed() -> None:
    longest = 'finish(message="' + "x" * (FULL - 18) + '")'
    assert len(longest) == FULL
    assert kind_of(parse_action(longest)) == "finish"
    action = parse_action(longest + " ")
    assert action == Malformed(longest, f"the answer has {FULL + 1} characters; at most {FULL} are read", FULL)
    start = time.process_time()
    assert_typed("do(" * 5_000_000)
    assert time.process_time() - start < 1


# thought and answer

BACK = 'do(action="Back")'
SPLITS: list[tuple[str, Thought]] = [
    (f"<think>go back</think><answer>{BACK}</answer>", Thought("go back", BACK, True)),
    (f"<think>\ngo back\n</think>\n<answer>\n{BACK}\n</answer>\n", Thought("go back", BACK, True)),
    # the closing tag is a stop token, or was cut
    (f"<think>go back</think><answer>{BACK}", Thought("go back", BACK, True)),
    (f"<think>go back</think><answer>{BACK}</ans", Thought("go back", BACK, True)),
    (f"<answer>{BACK}<|user|>", Thought(None, f"{BACK}<|user|>", True)),
    # the opening tag is in the prompt
    (f"go back</think><answer>{BACK}</answer>", Thought("go back", BACK, True)),
    # no tags: special tokens are gone in many decoders
    (BACK, Thought(None, BACK, True)),
    (f"The page is wrong.\n{BACK}", Thought("The page is wrong.", BACK, True)),
    ("The page is wrong.", Thought(None, "The page is wrong.", True)),
    (f"<think>a</think>{BACK}", Thought("a", BACK, True)),
    # broken off
    ("", Thought(None, "", False)),
    ("<think>", Thought(None, "", False)),
    ("<think>so far", Thought("so far", "", False)),
    ("<think>so far</think>", Thought("so far", "", False)),
    ("<think>so far</think><answer>", Thought("so far", "", False)),
    ('<think>a</think><answer>do(action="Tap", elem', Thought("a", 'do(action="Tap", elem', False)),
    ('I will do(action="Tap", elem', Thought("I will", 'do(action="Tap", elem', False)),
    # around, nested, repeated
    (f"Well: <think>a</think> so <answer>{BACK}</answer> there", Thought("a", BACK, True)),
    (f"<think>a<think>b</think><answer>{BACK}</answer>", Thought("a\nb", BACK, True)),
    (f"<think>a</think><think>b</think><answer>{BACK}</answer>", Thought("a\nb", BACK, True)),
    (f"<answer>{BACK}</answer><answer>no</answer>", Thought(None, BACK, True)),
    (f"<answer>no<answer>{BACK}", Thought(None, BACK, True)),
    (f"<answer><answer>{BACK}</answer></answer>", Thought(None, BACK, True)),
]


@pytest.mark.parametrize(("text", "thought"), SPLITS)
def test_thought_and_answer(text: str, thought: Thought) -> None:
    assert split_answer(text) == thought


TAGGED = st.lists(
    st.sampled_from(
        ["<think>", "</think>", "<answer>", "</answer>", "<", ">", "/", "</", "think", "answer>", "a", " "]
    ),
    max_size=30,
).map("".join)


def pushed(pieces: list[str]) -> list[tuple[Channel, str]]:
    """What the splitter gives for these pieces, neighbours of one channel joined."""
    splitter = AnswerSplitter()
    found = [part for piece in pieces for part in splitter.push(piece)] + splitter.flush()
    return [(channel, "".join(text for _, text in parts)) for channel, parts in groupby(found, lambda part: part[0])]


@given(TAGGED | st.text(), st.data())
def test_a_stream_cut_anywhere_is_as_its_whole(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert pushed(pieces) == pushed([text])
    assert pushed(list(text)) == pushed([text])
    assert "".join(part for _, part in pushed(pieces)) == re.sub("</?(?:think|answer)>", "", text)


@given(st.text("ab (<=>", max_size=20), st.text("ab (<=>", max_size=20))
def test_a_stream_has_the_thought_and_the_answer(think: str, answer: str) -> None:
    whole = f"<think>{think}</think>\n<answer>{answer}</answer>"
    parts = [("think", think), ("text", "\n"), ("answer", answer)]
    assert pushed(list(whole)) == [part for part in parts if part[1]]
    assert split_answer(whole).answer == answer.strip()


def test_text_is_handed_out_as_soon_as_it_is_no_tag() -> None:
    splitter = AnswerSplitter()
    assert splitter.push("a <thi") == [("text", "a ")]
    assert splitter.push("s") == [("text", "<this")]
    assert splitter.push("<think>b</think") == [("think", "b")]
    assert splitter.flush() == [("think", "</think")]
    assert splitter.push("c") == [("text", "c")], "it starts anew"


# pixels


def test_pixels_are_those_of_the_public_agent() -> None:
    swipe = Swipe(start=(500, 300), end=(999, 0))
    assert to_pixels(swipe, 1080, 2400) == {"start": (540, 720), "end": (1078, 0)}
    assert to_json(swipe, (1080, 2400)) == {
        "action": "Swipe",
        "start": [500, 300],
        "end": [999, 0],
        "start_pixels": [540, 720],
        "end_pixels": [1078, 0],
    }
    assert to_pixels(Back(), 1080, 2400) == {}
    assert to_json(Back(), (1080, 2400)) == {"action": "Back"}


@given(st.integers(0, 999), st.integers(0, 999), st.integers(1, 100_000), st.integers(1, 100_000))
@example(999, 999, 1, 1)
def test_pixels_are_always_inside(x: int, y: int, width: int, height: int) -> None:
    left, top = to_pixels(Tap(element=(x, y)), width, height)["element"]
    assert (left, top) == (int(x / 1000 * width), int(y / 1000 * height))
    assert 0 <= left < width
    assert 0 <= top < height


@pytest.mark.parametrize(
    ("point", "width", "height"), [((1, 1), 0, 5), ((1, 1), 5, -1), ((1000, 1), 5, 5), ((1, -1), 5, 5)]
)
def test_a_point_outside_is_refused(point: tuple[int, int], width: int, height: int) -> None:
    with pytest.raises(UsageError) as error:
        to_pixels(Tap(element=point), width, height)
    assert error.value.findings[0].code == "no-pixels"
