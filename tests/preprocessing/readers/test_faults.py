"""Damaged input: a clear problem in its place, the rest read, nothing lost without a word."""

import gzip
import json
import tracemalloc
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cdpvae.preprocessing.readers import problems
from cdpvae.preprocessing.readers.json_array import AFTER_THE_END, NOT_CLOSED
from cdpvae.preprocessing.readers.json_text import (
    DUPLICATE_KEY,
    MAX_DEPTH,
    NOT_JSON,
    NUMBER_TOO_LONG,
    TOO_DEEP,
)
from cdpvae.preprocessing.readers.parquet import DAMAGED_GROUP
from cdpvae.preprocessing.readers.problems import DAMAGED, NOT_UTF8, NUL_BYTES, TOO_LONG
from cdpvae.preprocessing.readers.source import Source
from cdpvae.preprocessing.readers.tables import BAD_ROW, WRONG_COLUMNS

GOOD = b'{"text": "fine"}'


def read(path):
    return list(Source.parse(str(path)).records())


def values_or_problems(path):
    """Per record: the value, or the problem's name."""
    return [raw.problem or raw.value for raw in read(path)]


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


DAMAGED_JSON = [
    pytest.param(b'{"text": "cut o', NOT_JSON, "cut o", id="truncated"),
    pytest.param(b'{"text": "\xff\xfe"}', NOT_UTF8, r"invalid start byte at byte 10", id="utf-8"),
    pytest.param(b'{"text": "a\0b"}', NUL_BYTES, '{"text": "a', id="nul"),
    pytest.param(b"[" * 100_000 + b"]" * 100_000, TOO_DEEP, "[[[", id="deep-beyond-recursion"),
    pytest.param(b"[" * 101 + b"]" * 101, TOO_DEEP, "[[[", id="one-level-too-deep"),
    pytest.param(
        b'{"text": "a", "n": {"k": 1, "k": 2}}', DUPLICATE_KEY, "key 'k'", id="duplicate-key"
    ),
    pytest.param(b'{"n": 1' + b"0" * 5000 + b"}", NUMBER_TOO_LONG, "5001 digits", id="huge-number"),
    pytest.param(b'{"text": "a",}', NOT_JSON, "line 1 column", id="trailing-comma"),
    pytest.param(b"{'text': 'a'}", NOT_JSON, "'text'", id="python-quotes"),
]


@pytest.mark.parametrize(("damaged", "problem", "detail"), DAMAGED_JSON)
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_damaged_line_costs_itself(write, damaged, problem, detail, ending):
    content = b"\n".join([GOOD, damaged, GOOD])
    path = write("a.jsonl" + ending, gzip.compress(content) if ending else content)
    first, second, third = read(path)
    assert first.value == third.value == {"text": "fine"}
    assert (second.line, second.problem, second.value) == (2, problem, None)
    assert detail in second.detail and len(second.detail) < 500


@pytest.mark.parametrize(
    ("damaged", "problem", "detail"), [case for case in DAMAGED_JSON if case.id != "truncated"]
)
def test_a_damaged_element_of_an_array_costs_itself(write, damaged, problem, detail):
    first, second, third = read(write("a.json", b"[%b,\n%b,\n%b]" % (GOOD, damaged, GOOD)))
    assert first.value == third.value == {"text": "fine"}
    assert (second.line, second.problem, second.value) == (None, problem, None)
    assert detail in second.detail


def test_what_is_no_fault(write):
    """As deep as allowed, numbers as long as Python reads, and what pandas writes for missing."""
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    text = '{"n": %s, "missing": NaN, "more": [-Infinity, 1e999], "d": 0}' % ("9" * 4000)
    values = values_or_problems(write("a.jsonl", f"{text}\n{deep}".encode()))
    assert values[0]["n"] == 10**4000 - 1
    assert values[0]["missing"] is None and values[0]["more"][0] is None
    assert isinstance(values[1], list)


@pytest.mark.parametrize(
    ("tail", "read_before", "problem", "detail"),
    [
        pytest.param(b'{"text": "cut o', 2, NOT_CLOSED, '{"text": "cut o', id="in-a-string"),
        pytest.param(b'{"text": ["x", ', 2, NOT_CLOSED, '{"text": ["x"', id="in-an-element"),
        pytest.param(GOOD, 3, NOT_CLOSED, "", id="after-an-element"),
        pytest.param(GOOD + b",\n", 3, NOT_CLOSED, "", id="after-a-comma"),
        pytest.param(b'{"text": {"a": 1}\n, ' + GOOD + b"]", 2, NOT_CLOSED, "{", id="no-bracket"),
        pytest.param(GOOD + b"]\n[" + GOOD + b"]", 3, AFTER_THE_END, '[{"text"', id="a-second-one"),
    ],
)
def test_a_broken_array_keeps_what_is_before_the_break(write, tail, read_before, problem, detail):
    *before, broken = read(write("a.json", b"[%b, %b, " % (GOOD, GOOD) + tail))
    assert [raw.value for raw in before] == [{"text": "fine"}] * read_before
    assert (broken.line, broken.problem) == (None, problem)
    assert broken.detail.startswith(detail)


def test_a_bracket_too_many_costs_its_element(write):
    content = b"[%b}, %b, %b]" % (GOOD, GOOD, GOOD)
    assert values_or_problems(write("a.json", content)) == [
        NOT_JSON,
        {"text": "fine"},
        {"text": "fine"},
    ]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.txt.gz", "a.csv.gz"])
def test_a_truncated_gz_gives_what_is_before_the_cut(write, name):
    texts = [f"number {i:x} " * 9 for i in range(20_000)]
    rows = texts if name in ("a.txt.gz", "a.csv.gz") else [json.dumps({"text": t}) for t in texts]
    if name == "a.json.gz":
        content = f"[{','.join(rows)}]"
    else:
        content = "\n".join(["text", *rows] if name == "a.csv.gz" else rows)
    whole = gzip.compress(content.encode())
    cut = whole[: len(whole) // 2]
    given = zlib.decompressobj(wbits=31).decompress(cut).count(b"number") // 9
    *before, broken = read(write(name, cut))
    assert broken.problem == DAMAGED and "end-of-stream" in broken.detail
    assert [raw.value for raw in before] == [{"text": text} for text in texts[: len(before)]]
    assert given - 1 <= len(before) <= given < len(texts)


def test_bytes_after_a_gz_are_a_problem(write):
    path = write("a.jsonl.gz", gzip.compress(GOOD + b"\n") + b"garbage")
    assert values_or_problems(path) == [{"text": "fine"}, DAMAGED]


def test_a_disk_that_fails_on_the_way(write, monkeypatch):
    """After the first record damage is a problem in its place; before it nothing can be read."""
    path = write("a.jsonl", GOOD + b"\n")

    class Failing:
        def __init__(self, good):
            self.lines = [GOOD + b"\n"] * good

        def readline(self, size):
            if not self.lines:
                raise OSError(5, "Input/output error")
            return self.lines.pop()

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    monkeypatch.setattr("cdpvae.preprocessing.readers.lines.open_file", lambda path: Failing(2))
    assert values_or_problems(path) == [{"text": "fine"}] * 2 + [DAMAGED]
    monkeypatch.setattr("cdpvae.preprocessing.readers.lines.open_file", lambda path: Failing(0))
    with pytest.raises(ValueError, match="a.jsonl: cannot be read: .*Input/output error"):
        read(path)


def test_a_line_of_50_mb_is_read(write):
    text = "word " * 10 * 2**20
    path = write("a.jsonl", b"\n".join([GOOD, json.dumps({"text": text}).encode(), GOOD]))
    assert values_or_problems(path) == [{"text": "fine"}, {"text": text}, {"text": "fine"}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv", "a.json"])
def test_records_above_the_limit_are_passed_over(write, monkeypatch, name):
    monkeypatch.setattr(problems, "MAX_RECORD_BYTES", 1000)
    longest = b'{"text": "' + b"x" * 988 + b'"}'
    rows = [GOOD, longest, longest[:-2] + b'x"}', GOOD]
    if name == "a.csv":
        rows = [b"text", GOOD.replace(b'"', b""), b"x" * 999, b"x" * 1000, b"fine"]
    content = b"[%b]" % b",".join(rows) if name == "a.json" else b"\n".join(rows)
    if name != "a.json":  # a line counts with its newline
        content = content.replace(b"x" * 988 + b'"}', b"x" * 987 + b'"}', 1)
    raws = read(write(name, content))
    assert [raw.problem for raw in raws] == [None, None, TOO_LONG, None]
    assert "1,00" in raws[2].detail and "x" in raws[2].detail


@pytest.mark.parametrize("head", [b"", b'[{"text": "fine"}, "'], ids=["line", "element"])
def test_a_record_without_end_is_not_held(tmp_path, head):
    """300 MB of zeros, as a crash leaves them: memory stays near the limit of 64 MiB."""
    path = tmp_path / ("a.json" if head else "a.jsonl")
    path.write_bytes(head)
    with path.open("r+b") as file:
        file.truncate(300 * 2**20)
    tracemalloc.start()
    raws = read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [raw.problem for raw in raws] == ([None, NOT_CLOSED] if head else [TOO_LONG])
    assert peak < 3 * problems.MAX_RECORD_BYTES


ROWS = b"text,code\n%b\nfine,1\nfine,2\n"


@pytest.mark.parametrize(
    ("row", "problems"),
    [
        pytest.param(b"a,b,c", [WRONG_COLUMNS], id="a-field-too-many"),
        pytest.param(b"a", [WRONG_COLUMNS], id="a-field-too-few"),
        pytest.param(b'"a\nb",c,d', [WRONG_COLUMNS], id="too-many-over-two-lines"),
        pytest.param(b'"never closed,b', [BAD_ROW], id="quote-to-the-end-of-the-file"),
        pytest.param(b'"a" b,c', [BAD_ROW], id="quote-not-doubled"),
        pytest.param(b"a\xff,b", [NOT_UTF8], id="utf-8"),
        pytest.param(b"a\0,b", [NUL_BYTES], id="nul"),
    ],
)
def test_a_damaged_row_costs_itself(write, row, problems):
    raws = read(write("a.csv", ROWS % row))
    fine = [{"text": "fine", "code": "1"}, {"text": "fine", "code": "2"}]
    assert [raw.problem or raw.value for raw in raws] == problems + fine
    assert raws[0].line == 2 and raws[0].detail


def test_a_quote_is_not_looked_for_without_end(write, monkeypatch):
    monkeypatch.setattr("cdpvae.preprocessing.readers.tables.MAX_ROW_LINES", 10)
    content = b'text,code\n"open,1\n' + b"a,b\n" * 10 + b'"' + b"\n" * 8 + b'",c\n'
    raws = read(write("a.csv", content))
    assert [raw.problem for raw in raws] == [BAD_ROW] + [None] * 11
    assert "within 10 lines" in raws[0].detail
    assert raws[-1].value == {"text": "\n" * 8, "code": "c"}


def test_fields_above_the_limit_of_the_csv_module(write):
    import csv

    before = csv.field_size_limit()
    long = "x" * 3 * before
    assert values_or_problems(write("a.csv", f"text,code\n{long},1\n".encode())) == [
        {"text": long, "code": "1"}
    ]
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"text,text\na,b", "column 'text' twice"),
        (b"te\xffxt\na", "header cannot be read: record is not UTF-8"),
    ],
)
def test_a_header_that_cannot_be_used(write, header, message):
    with pytest.raises(ValueError, match=message):
        read(write("a.csv", header))


@pytest.fixture
def parquet(tmp_path):
    """Three row groups of 1000; the second one's bytes can be spoilt."""

    def make(spoil):
        path = tmp_path / "a.parquet"
        table = pa.table({"text": [f"row {i}" for i in range(3000)]})
        pq.write_table(
            table,
            path,
            row_group_size=1000,
            use_dictionary=False,
            compression="none",
            write_page_checksum=True,
        )
        column = pq.read_metadata(path).row_group(1).column(0)
        content = bytearray(path.read_bytes())
        spoil(content, column.data_page_offset, column.total_compressed_size)
        path.write_bytes(content)
        return path

    return make


def test_a_changed_byte_is_found_where_the_file_has_checksums(parquet):
    def spoil(content, offset, size):
        content[offset + size // 2] ^= 1

    raws = read(parquet(spoil))
    damaged = [number for number, raw in enumerate(raws) if raw.problem]
    assert damaged and set(damaged) <= set(range(1000, 2000))
    for number, raw in enumerate(raws):
        assert raw.problem or raw.value == {"text": f"row {number}"}


def test_a_damaged_row_group_costs_its_rows(parquet):
    def spoil(content, offset, size):
        content[offset + size // 2 : offset + size] = b"\xa5" * (size - size // 2)

    path = parquet(spoil)
    raws = read(path)
    assert len(raws) == 3000 and {raw.line for raw in raws} == {None}
    damaged = [number for number, raw in enumerate(raws) if raw.problem == DAMAGED_GROUP]
    assert damaged and set(damaged) <= set(range(1000, 2000))
    fine = [raw.value for raw in raws if not raw.problem]
    assert fine[:1000] == [{"text": f"row {i}"} for i in range(1000)]
    assert fine[-1000:] == [{"text": f"row {i}"} for i in range(2000, 3000)]
    # Reading can go on in the middle of the damage.
    assert list(Source.parse(str(path)).records(1500)) == raws[1500:]


def test_a_truncated_parquet_file_is_unreadable(parquet):
    with pytest.raises(ValueError, match="a.parquet: is no whole Parquet file"):
        read(parquet(lambda content, *_: content.__delitem__(slice(len(content) // 2, None))))


def test_parquet_text_that_is_not_utf8_costs_its_row(tmp_path):
    path = tmp_path / "a.parquet"
    texts = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    pq.write_table(pa.table({"text": texts}), path)
    assert values_or_problems(path) == [{"text": "a"}, NOT_UTF8, {"text": "c"}]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.txt", "a.csv", "a.tsv", "a.jsonl.gz"])
@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", b"\n \n"], ids=["empty", "bom", "blank"])
def test_an_empty_file_has_no_records(write, name, content):
    assert read(write(name, gzip.compress(content) if name.endswith(".gz") else content)) == []


def test_utf16_is_told_apart(write):
    problems = {raw.problem for raw in read(write("a.txt", "words\nmore\n".encode("utf-16")))}
    assert problems <= {NOT_UTF8, NUL_BYTES} and problems


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"3", "must hold a JSON array of records, or one object a line"),
        ("a.json", b'{\n "data": []\n}', "one object over several lines"),
        ("a.jsonl.gz", b"not gzip", "cannot be read: Not a gzipped file"),
        ("a.json.gz", b"not gzip", "cannot be read: Not a gzipped file"),
        ("a.parquet", b"", "is no whole Parquet file"),
        ("a.parquet", b"PAR1 and more PAR1", "is no whole Parquet file"),
    ],
)
def test_files_of_which_nothing_can_be_read_are_one_clear_error(write, name, content, message):
    path = write(name, content)
    with pytest.raises(ValueError, match=message) as error:
        read(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_a_file_that_may_not_be_read(write, monkeypatch, name):
    source = Source.parse(str(write(name, b"x")))

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    monkeypatch.setattr("pyarrow.parquet.ParquetFile", refuse)
    for use in (source.identity, lambda: list(source.records())):
        with pytest.raises(ValueError, match=f"{name}: .*Permission denied"):
            use()


def test_a_dangling_link_is_no_file(tmp_path):
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(ValueError, match="no such file"):
        Source.parse(str(tmp_path / "a.jsonl"))
