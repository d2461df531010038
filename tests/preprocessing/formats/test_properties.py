"""What holds for any record and any bytes, looked for by hypothesis."""

import copy
import csv
import io
import json

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cdpvae.data.example import Example
from cdpvae.preprocessing.formats.convert import (
    ANSWER_KEYS,
    CONVERSATION_KEYS,
    CONVERTERS,
    HEADERLESS_PAIR,
    INPUT_KEYS,
    INSTRUCTION_KEYS,
    PROBLEM_KEYS,
    TEXT_KEYS,
    convert,
)
from cdpvae.preprocessing.readers import json_array
from cdpvae.preprocessing.readers.source import Source

# Any machine may be slow; one file of a test is written again and again.
SETTINGS = settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

TEXT = st.text(st.characters(exclude_categories=()), max_size=8)  # lone surrogates too
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
KEYS = sorted(
    {
        *CONVERSATION_KEYS,
        *INSTRUCTION_KEYS,
        *INPUT_KEYS,
        *ANSWER_KEYS,
        *TEXT_KEYS,
        *HEADERLESS_PAIR,
        *(key for pair in PROBLEM_KEYS for key in pair),
        "messages",
        "instances",
        "Output",
    }
)
ROLES = st.sampled_from(["user", "human", "gpt", "assistant", "system", "tool", "x"]) | JSON
PARTS = st.lists(st.fixed_dictionaries({"text": JSON}) | JSON, max_size=3)
TURN = st.fixed_dictionaries(
    {},
    optional={
        "from": ROLES,
        "role": ROLES,
        "value": TEXT | PARTS,
        "content": TEXT | PARTS,
        "tool_calls": JSON,
    },
)
VALUES = (
    TEXT
    | st.lists(TURN, max_size=5)
    | st.lists(st.dictionaries(st.sampled_from(KEYS), TEXT | PARTS, max_size=3), max_size=3)
    | st.dictionaries(st.sampled_from(["from", "value", "role"]), st.lists(JSON, max_size=2))
    | JSON
)
RECORDS = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4) | JSON

REASONS = {
    "a turn is not an object",
    "an instance is not an object",
    "context is not text",
    "ends on the user turn",
    "input is not text",
    "no instance",
    "no key instruction, question, prompt or query",
    "no key output, response, answer, completion or chosen",
    "no key text or content",
    "no list conversations",
    "no list messages",
    "no pair of keys problem/solution, problem/answer, text/code, prompt/code or "
    "prompt/canonical_solution",
    "no user turn",
    "record is not an object",
    "the user turn is answered by a tool call",
    "the user turn is answered by an unknown role",
    "unknown format",
    *(
        f"{side} is {fault}"
        for side in ("instruction", "response")
        for fault in ("not text", "empty", "not valid Unicode")
    ),
}


@SETTINGS
@given(RECORDS, st.sampled_from(["auto", *CONVERTERS]))
def test_any_json_gives_examples_or_a_known_reason(record, format):
    """And is left as it was. The reasons are a closed list, so that they can be counted."""
    before = copy.deepcopy(record)
    for turns in ("first", "all", "last"):
        converted = convert(record, format, turns)
        if isinstance(converted, str):
            assert converted in REASONS
            continue
        assert converted
        for example in converted:
            assert isinstance(example, Example)
            assert example.instruction.strip() and example.response.strip()
            (example.instruction + example.response).encode()
    assert repr(record) == repr(before)  # NaN is not equal to itself


@SETTINGS
@given(RECORDS)
def test_first_and_last_are_ends_of_all(record):
    first, everything, last = (convert(record, turns=turns) for turns in ("first", "all", "last"))
    if isinstance(everything, str):
        assert first == last == everything
    else:
        assert last == everything[-1:]
        assert isinstance(first, str) or first == everything[:1]


@SETTINGS
@given(st.lists(JSON, max_size=6), st.sampled_from([None, 1]), st.booleans(), st.integers(1, 9))
def test_an_array_is_read_as_json_reads_it(tmp_path, monkeypatch, values, indent, ascii, chunk):
    monkeypatch.setattr(json_array, "CHUNK", chunk)
    text = json.dumps(values, indent=indent, ensure_ascii=ascii).encode("utf-8", "replace")
    path = tmp_path / "a.json"
    path.write_bytes(text)
    expected = json.loads(text, parse_constant=lambda name: None)
    assert [raw.value for raw in Source.parse(str(path)).records()] == expected


CELL = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=6)


@SETTINGS
@given(st.lists(st.tuples(CELL, CELL), max_size=6), st.sampled_from(["\n", "\r\n"]))
def test_what_the_csv_module_writes_is_read_back(tmp_path, rows, newline):
    file = io.StringIO()
    writer = csv.writer(file, lineterminator=newline, quoting=csv.QUOTE_ALL)
    writer.writerows([("text", "code"), *rows])
    path = tmp_path / "a.csv"
    path.write_bytes(file.getvalue().encode())
    found = [raw.value or raw.problem for raw in Source.parse(str(path)).records()]
    assert found == [{"text": text, "code": code} for text, code in rows]


PIECES = st.sampled_from(
    [b'{"text": "a"}', b"[", b"]", b",", b'"', b"\n", b"\\", b"\t", b"\xff", b"\0", b"text,code"]
)
BYTES = st.lists(PIECES | st.binary(max_size=4), max_size=20).map(b"".join)


@SETTINGS
@given(BYTES, st.sampled_from([".json", ".jsonl", ".txt", ".csv", ".tsv", ".parquet"]))
def test_any_bytes_are_records_or_one_clear_error(tmp_path, content, kind):
    """And reading can go on at any of them."""
    path = tmp_path / f"a{kind}"
    path.write_bytes(content)
    source = Source.parse(str(path))
    try:
        raws = list(source.records())
    except ValueError as error:
        assert str(path) in str(error)
        return
    for start in range(len(raws) + 1):
        assert list(source.records(start)) == raws[start:]
    for raw in raws:
        assert raw.value is None if raw.problem else raw.detail == ""
    if kind in (".jsonl", ".txt"):
        lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        assert len(raws) == sum(bool(line.strip()) for line in lines)
