import pytest

from cdpvae.data.example import Example
from cdpvae.preprocessing.formats.convert import CONVERTERS, SHAPES, convert, detect

GOOD = Example("ask", "reply")


def turns(*pairs):
    return [{"from": who, "value": said} for who, said in pairs]


def messages(*pairs):
    return [{"role": who, "content": said} for who, said in pairs]


@pytest.mark.parametrize(
    ("format", "record"),
    [
        pytest.param(
            "alpaca", {"instruction": "ask", "input": "", "output": "reply"}, id="by-the-book"
        ),
        pytest.param("alpaca", {"instruction": "ask", "response": "reply"}, id="gpteacher-dolly"),
        pytest.param("alpaca", {"question": "ask", "answer": "reply"}, id="question-answer"),
        pytest.param("alpaca", {"prompt": "ask", "completion": "reply"}, id="openai-completion"),
        pytest.param("alpaca", {"query": "ask", "response": "reply"}, id="metamath"),
        pytest.param("alpaca", {"input": "ask", "output": "reply"}, id="input-alone-is-asked"),
        pytest.param(
            "alpaca",
            {"instruction": " ", "input": "ask", "output": "reply"},
            id="blank-instruction",
        ),
        pytest.param(
            "alpaca", {"instruction": "ask", "chosen": "reply", "rejected": "no"}, id="preference"
        ),
        pytest.param(
            "alpaca",
            {
                "prompt": "ask",
                "chosen": messages(("user", "ask"), ("assistant", "reply")),
                "rejected": messages(("user", "ask"), ("assistant", "no")),
            },
            id="preference-with-turns",
        ),
        pytest.param(
            "alpaca",
            {"prompt": messages(("user", "ask")), "completion": messages(("assistant", "reply"))},
            id="prompt-and-completion-as-turns",
        ),
        pytest.param(
            "alpaca",
            {"messages": None, "question": "ask", "output": None, "answer": "reply"},
            id="hub-fills-absent-columns-with-null",
        ),
        pytest.param(
            "alpaca",
            {"instruction": "ask", "input": float("nan"), "output": "", "answer": "reply"},
            id="tables-fill-them-with-NaN-and-blanks",
        ),
        pytest.param("alpaca", {"Instruction": "ask", " OUTPUT ": "reply"}, id="keys-in-any-case"),
        pytest.param(
            "alpaca", {"instruction": "ask", "output": "reply", "Output": "no"}, id="first-of-equal"
        ),
        pytest.param(
            "alpaca", {"instruction": "ask", "output": "", "Output": "reply"}, id="filled-of-equal"
        ),
        pytest.param(
            "alpaca",
            {"instruction": "ask", "instances": [{"input": "", "output": "reply"}]},
            id="self-instruct",
        ),
        pytest.param(
            "alpaca",
            {"instruction": "ask", "output": "reply", "text": "Below is an instruction ..."},
            id="an-answered-instruction-goes-before-text",
        ),
        pytest.param("magicoder", {"problem": "ask", "solution": "reply", "lang": "c"}, id="oss"),
        pytest.param("magicoder", {"Problem": "ask", "Solution": "reply"}, id="imobench"),
        pytest.param("magicoder", {"problem": "ask", "answer": "reply"}, id="problem-answer"),
        pytest.param("magicoder", {"text": "ask", "code": "reply"}, id="mbpp"),
        pytest.param("magicoder", {"prompt": "ask", "code": "reply"}, id="mbpp-sanitised"),
        pytest.param("magicoder", {"prompt": "ask", "canonical_solution": "reply"}, id="humaneval"),
        pytest.param(
            "magicoder", {"column_1": "ask", "column_2": "reply"}, id="two-columns-no-header"
        ),
        pytest.param(
            "sharegpt", {"conversations": turns(("human", "ask"), ("gpt", "reply"))}, id="sharegpt"
        ),
        pytest.param(
            "sharegpt",
            {"conversation": messages(("user", "ask"), ("assistant", "reply"))},
            id="lmsys",
        ),
        pytest.param(
            "messages",
            {"messages": messages(("user", "ask"), ("assistant", "reply"))},
            id="messages",
        ),
        pytest.param(
            "messages",
            {"chosen": messages(("user", "ask"), ("assistant", "reply")), "rejected": []},
            id="chosen-is-the-whole-conversation",
        ),
    ],
)
def test_variants_convert_by_name_and_by_detection(format, record):
    assert detect(record) == format
    assert convert(record, format) == [GOOD]
    assert convert(record) == [GOOD]


def test_input_or_context_is_appended_to_the_instruction():
    record = {"instruction": "Add them.", "input": "1, 2", "output": "3"}
    assert convert(record) == [Example("Add them.\n\n1, 2", "3")]
    dolly = {"instruction": "Who?", "context": "Ada wrote it.", "response": "Ada."}
    assert convert(dolly) == [Example("Who?\n\nAda wrote it.", "Ada.")]


@pytest.mark.parametrize("record", [{"text": " as it is \n"}, {"content": " as it is \n"}])
def test_text_is_read_and_written_unaltered(record):
    assert detect(record) == "text"
    assert convert(record) == [Example(" as it is \n", " as it is \n")]


def test_a_bare_string_is_a_text():
    assert detect("words") == "text"
    assert convert("words") == [Example("words", "words")]
    assert convert("words", "alpaca").startswith("no key instruction")


def test_instances_share_the_instruction():
    record = {
        "instruction": "Add.",
        "instances": [
            {"input": "1, 1", "output": "2"},
            {"input": "none", "output": ""},
            {"input": "2, 2", "output": "4"},
        ],
    }
    first, last = Example("Add.\n\n1, 1", "2"), Example("Add.\n\n2, 2", "4")
    assert convert(record) == [first]
    assert convert(record, turns="last") == [last]
    assert convert(record, turns="all") == [first, last]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"instruction": "ask"}, "no key output, response, answer, completion or chosen"),
        ({"instruction": "ask", "input": 5, "output": "x"}, "input is not text"),
        ({"instruction": "ask", "output": 42}, "response is not text"),
        ({"instruction": " ", "output": "reply"}, "instruction is empty"),
        ({"instruction": "ask", "output": ""}, "response is empty"),
        ({"instruction": "ask", "instances": []}, "no instance"),
        ({"instruction": "ask", "instances": ["x"]}, "an instance is not an object"),
        ({"instruction": "ask", "instances": [{"output": ""}]}, "response is empty"),
        ({"problem": "ask", "solution": "\n"}, "response is empty"),
        # neither half may pass for a text to reconstruct
        ({"text": "ask", "code": ""}, "response is empty"),
        ({"text": "template", "instruction": "", "output": "reply"}, "instruction is empty"),
        ({"text": "template", "instruction": "ask", "reply": "x"}, "no key output, response"),
        ({"text": "lone \ud800 surrogate"}, "instruction is not valid Unicode"),
        ({"other": "x"}, "unknown format"),
        ({"column_1": "0.5", "column_2": "a", "column_3": "b"}, "unknown format"),
        ({}, "unknown format"),
        (" ", "instruction is empty"),
        (["a"], "record is not an object"),
        (None, "record is not an object"),
    ],
)
def test_what_does_not_convert_has_its_reason(record, reason):
    assert convert(record).startswith(reason)


def test_a_named_format_does_not_fall_back_to_another():
    assert convert({"instruction": "a", "output": "b"}, "sharegpt") == "no list conversations"
    assert convert({"instruction": "a", "output": "b"}, "messages") == "no list messages"
    assert convert({"instruction": "a", "output": "b"}, "text") == "no key text or content"
    assert convert({"text": "a"}, "alpaca") == "no key instruction, question, prompt or query"
    assert convert({"text": "a"}, "magicoder").startswith("no pair of keys problem/solution")


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match="'csv' must be auto or one of sharegpt"):
        convert({}, "csv")
    with pytest.raises(ValueError, match="'second' must be one of first, all, last"):
        convert({}, turns="second")


def test_every_format_says_what_it_looks_like():
    assert SHAPES.keys() == CONVERTERS.keys()
