import pytest

from cdpvae.data.formats import Example, convert, detect

GOOD = Example("ask", "reply")


def turns(*pairs):
    return [{"from": who, "value": said} for who, said in pairs]


def messages(*pairs):
    return [{"role": who, "content": said} for who, said in pairs]


@pytest.mark.parametrize(
    ("format", "record"),
    [
        ("sharegpt", {"conversations": turns(("human", "ask"), ("gpt", "reply"))}),
        # first exchange of several; system and leading assistant turns passed over
        (
            "sharegpt",
            {
                "conversations": turns(
                    ("system", "be kind"),
                    ("gpt", "hello"),
                    ("human", "ask"),
                    ("gpt", "reply"),
                    ("human", "more"),
                    ("gpt", "no"),
                )
            },
        ),
        # preference data: the answer is `chosen`, as a turn, a list of turns, or text
        (
            "sharegpt",
            {
                "conversations": turns(("human", "ask")),
                "chosen": {"from": "gpt", "value": "reply"},
                "rejected": {"from": "gpt", "value": "no"},
            },
        ),
        (
            "messages",
            {
                "messages": messages(("user", "ask")),
                "chosen": messages(("user", "ask"), ("assistant", "reply")),
            },
        ),
        ("messages", {"messages": messages(("user", "ask")), "chosen": "reply"}),
        ("messages", {"messages": messages(("user", "ask"), ("assistant", "reply"))}),
        # content as a list of parts, an image among them
        (
            "messages",
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "ask"}, {"type": "image", "url": "x"}],
                    },
                    {"role": "assistant", "content": "reply"},
                ]
            },
        ),
        ("alpaca", {"instruction": "ask", "input": "", "output": "reply"}),
        ("alpaca", {"instruction": "ask", "input": None, "response": "reply"}),
        ("alpaca", {"question": "ask", "answer": "reply"}),
        ("alpaca", {"instruction": "ask", "chosen": "reply", "rejected": "no"}),
        # hub data fills absent columns with null
        ("alpaca", {"messages": None, "question": "ask", "output": None, "answer": "reply"}),
        ("alpaca", {"instruction": "", "input": "ask", "output": "reply"}),
        ("magicoder", {"problem": "ask", "solution": "reply", "lang": "python"}),
        ("magicoder", {"text": "ask", "code": "reply"}),
        ("magicoder", {"prompt": "ask", "canonical_solution": "reply"}),
    ],
)
def test_variants_convert_by_name_and_by_detection(format, record):
    assert detect(record) == format
    assert convert(record, format) == GOOD
    assert convert(record) == GOOD


def test_input_is_appended_to_the_instruction():
    record = {"instruction": "Add them.", "input": "1, 2", "output": "3"}
    assert convert(record) == Example("Add them.\n\n1, 2", "3")


def test_text_is_read_and_written():
    assert convert({"text": " as it is \n"}) == Example(" as it is \n", " as it is \n")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"conversations": turns(("human", "ask"))}, "ends on the user turn"),
        ({"conversations": turns(("gpt", "hello"))}, "no user turn"),
        ({"conversations": []}, "no user turn"),
        (
            {"conversations": turns(("human", "ask"), ("function_call", "{}"), ("gpt", "reply"))},
            "the first user turn is answered by a tool or another role",
        ),
        (
            {"messages": messages(("user", "a"), ("user", "b"), ("assistant", "c"))},
            "two user turns before an answer",
        ),
        ({"conversations": "text"}, "no list conversations"),
        ({"conversations": ["text"]}, "a turn is not an object"),
        ({"conversations": [{"from": 3, "value": "x"}]}, "no user turn"),
        ({"instruction": "ask"}, "no key output, response, answer or chosen"),
        ({"instruction": "ask", "input": 5, "output": "x"}, "input is not text"),
        ({"instruction": "ask", "output": 42}, "response is not text"),
        ({"instruction": " ", "output": "reply"}, "instruction is empty"),
        ({"problem": "ask", "solution": "\n"}, "response is empty"),
        ({"text": "lone \ud800 surrogate"}, "instruction is not valid Unicode"),
        ({"other": "x"}, "unknown format"),
        ({}, "unknown format"),
        (["a"], "record is not an object"),
        (None, "record is not an object"),
    ],
)
def test_what_does_not_convert_has_its_reason(record, reason):
    assert convert(record) == reason


def test_a_named_format_does_not_fall_back_to_another():
    assert convert({"instruction": "a", "output": "b"}, "sharegpt") == "no list conversations"
    assert convert({"instruction": "a", "output": "b"}, "text") == "no key text"
    assert convert({"text": "a"}, "alpaca") == "no key instruction or question"
    assert convert({"text": "a"}, "magicoder").startswith("no pair of keys problem/solution")


def test_unknown_format_is_refused():
    with pytest.raises(ValueError, match="'csv' must be auto or one of sharegpt"):
        convert({}, "csv")
