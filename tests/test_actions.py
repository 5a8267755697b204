"""AutoGLM-Phone's answers: every action is read, nothing a model writes raises, and a stream splits as its whole."""

from __future__ import annotations

import ast
import json
import re
import time
from itertools import groupby

import msgspec
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
        "do(text='it's', action='Type')",
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
    ('tap(element=[1,2])', "neither do(...) nor finish(...)", 0),
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


def test_table_has_every_action() -> None:
    kinds = {str(kind.__struct_config__.tag) for kind in msgspec.inspect.multi_type_info([Action])[0].types and KINDS}
    assert {shown["action"] for _, shown in ACTIONS} == kinds - {"malformed"}
