"""Rules of turns; `records` are the same conversation in both spellings."""

import pytest

from cdpvae.data.example import Example
from cdpvae.preprocessing.formats.convert import convert

ROLES = {"u": "user", "a": "assistant", "s": "system", "t": "tool", "c": "function_call"}
TOOL = "the user turn is answered by a tool call"


def spoken(script):
    """ "u:hi a:hello" -> [("user", "hi"), ("assistant", "hello")]."""
    pairs = (part.split(":", 1) for part in script.split())
    return [(ROLES.get(who, who), said) for who, said in pairs]


def as_messages(script, **more):
    return {"messages": [{"role": who, "content": said} for who, said in spoken(script)], **more}


def as_sharegpt(script, **more):
    return {"conversations": [{"from": who, "value": said} for who, said in spoken(script)], **more}


def pairs(converted):
    if isinstance(converted, str):
        return converted
    return [f"{example.instruction}>{example.response}" for example in converted]


@pytest.mark.parametrize("record", [as_messages, as_sharegpt])
@pytest.mark.parametrize(
    ("script", "first", "all", "last"),
    [
        pytest.param("u:1 a:2 u:3 a:4 u:5 a:6", ["1>2"], ["1>2", "3>4", "5>6"], ["5>6"], id="long"),
        pytest.param("s:x u:1 a:2", ["1>2"], ["1>2"], ["1>2"], id="system-passed-over"),
        pytest.param("u:1 s:x a:2", ["1>2"], ["1>2"], ["1>2"], id="system-in-between"),
        pytest.param("a:0 u:1 a:2", ["1>2"], ["1>2"], ["1>2"], id="starts-with-assistant"),
        pytest.param("u:1 a:2 u:3", ["1>2"], ["1>2"], ["1>2"], id="ends-on-user"),
        pytest.param("u:1 u:2 a:3", ["1\n\n2>3"], ["1\n\n2>3"], ["1\n\n2>3"], id="user-twice"),
        pytest.param("u:1 a:2 a:3", ["1>2\n\n3"], ["1>2\n\n3"], ["1>2\n\n3"], id="reply-twice"),
        # what follows a tool's result answers more than the user's turn says
        pytest.param("u:1 c:x t:y a:2", TOOL, TOOL, TOOL, id="tool-call"),
        pytest.param("u:1 c:x t:y a:2 u:3 a:4", TOOL, ["3>4"], ["3>4"], id="tool-call-first"),
        pytest.param("u:1 a:2 u:3 c:x t:y a:4", ["1>2"], ["1>2"], ["1>2"], id="tool-call-later"),
        pytest.param("u:1 observation:x", TOOL, TOOL, TOOL, id="observation"),
        *(
            pytest.param(script, reason, reason, reason, id=reason.replace(" ", "-"))
            for script, reason in [
                ("u:1", "ends on the user turn"),
                ("s:x a:1", "no user turn"),
                ("", "no user turn"),
                ("u:1 narrator:x", "the user turn is answered by an unknown role"),
            ]
        ),
    ],
)
def test_which_turns_make_exchanges(record, script, first, all, last):
    for turns, expected in (("first", first), ("all", all), ("last", last)):
        assert pairs(convert(record(script), turns=turns)) == expected


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param("good", id="text"),
        pytest.param({"from": "gpt", "value": "good"}, id="turn"),
        pytest.param([{"role": "assistant", "content": "good"}], id="list-of-one"),
        pytest.param(
            [{"role": "user", "content": "3"}, {"role": "assistant", "content": "good"}],
            id="whole-conversation",
        ),
    ],
)
def test_chosen_answers_the_last_user_turn(chosen):
    record = as_sharegpt("u:1 a:2 u:3", chosen=chosen, rejected="bad")
    assert pairs(convert(record, turns="all")) == ["1>2", "3>good"]
    assert pairs(convert(as_messages("s:x u:1", chosen=chosen, rejected="bad"))) == ["1>good"]


def test_chosen_does_not_replace_an_answer():
    assert pairs(convert(as_sharegpt("u:1 a:2", chosen="good"))) == ["1>2"]


def test_an_assistant_turn_that_calls_a_tool_is_no_answer():
    record = as_messages("u:1 a:2")
    record["messages"][1].update(content=None, tool_calls=[{"function": {"name": "f"}}])
    assert convert(record) == TOOL
    record["messages"][1]["tool_calls"] = []
    assert convert(record) == "response is not text"


@pytest.mark.parametrize(
    "content",
    [
        pytest.param([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], id="text"),
        pytest.param(
            [{"type": "text", "text": "a"}, {"type": "image", "url": "x"}, {"text": "b"}],
            id="an-image-among-them",
        ),
        pytest.param(["a", "b"], id="plain-strings"),
    ],
)
def test_content_as_parts_is_its_text_parts(content):
    record = as_messages("u:1 a:2")
    record["messages"][0]["content"] = content
    assert convert(record) == [Example("a\nb", "2")]


def test_an_image_alone_is_not_text():
    record = as_messages("u:1 a:2")
    record["messages"][0]["content"] = [{"type": "image", "url": "x"}]
    assert convert(record) == "instruction is not text"


def test_empty_turns_are_no_exchange():
    record = as_messages("u:1 a:2 u:3 a:4")
    record["messages"][1]["content"] = " "
    assert convert(record) == "response is empty"
    assert pairs(convert(record, turns="all")) == ["3>4"]


def test_turns_as_columns_are_read_as_rows():
    record = {"conversations": {"from": ["human", "gpt"], "value": ["1", "2"]}}
    assert convert(record) == [Example("1", "2")]
    record["conversations"]["value"].pop()
    assert convert(record) == "a turn is not an object"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("text", "no list conversations"),
        (3, "no list conversations"),
        (["text"], "a turn is not an object"),
        ({}, "a turn is not an object"),
        ([{"from": 3, "value": "x"}], "no user turn"),
        ([{"value": "x"}], "no user turn"),
    ],
)
def test_what_is_no_list_of_turns_has_its_reason(value, reason):
    assert convert({"conversations": value}) == reason
