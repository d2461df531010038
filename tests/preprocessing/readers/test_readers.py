"""What is read from files in order, and that reading can go on anywhere, in bounded memory."""

import gzip
import json
import tracemalloc

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cdpvae.preprocessing.readers import lines
from cdpvae.preprocessing.readers.source import PHASES, Source
from cdpvae.preprocessing.records import RawRecord

RECORDS = [{"text": "eins"}, {"text": "zwei ü"}]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)
WINDOWS_LINES = "\ufeff" + LINES.replace("\n", "\r\n")


def read(path, start=0):
    return list(Source.parse(str(path)).records(start))


def values(path):
    return [raw.value for raw in read(path)]


@pytest.fixture
def write(tmp_path):
    """write("a.csv", "...") -> path; text or bytes, compressed where the name says so."""

    def write(name, content):
        path = tmp_path / name
        content = content if isinstance(content, bytes) else content.encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return path

    return write


@pytest.mark.parametrize(
    ("name", "text"),
    [
        pytest.param("a.json", json.dumps(RECORDS), id="array"),
        pytest.param("a.json", "\ufeff\r\n" + json.dumps(RECORDS, indent=2), id="array-indented"),
        pytest.param("a.json", json.dumps(RECORDS)[:-1] + " , ]", id="array-comma-at-end"),
        pytest.param("a.json", LINES, id="lines-under-the-wrong-name"),
        pytest.param("A.JSON", WINDOWS_LINES, id="such-lines-from-windows"),
        pytest.param("a.jsonl", LINES, id="lines"),
        pytest.param("a.ndjson", LINES.rstrip(), id="no-newline-at-end"),
        pytest.param("a.jsonl", WINDOWS_LINES, id="lines-from-windows"),
        pytest.param("a.txt", "eins\n\n \t\nzwei ü", id="blank-lines-are-no-records"),
        pytest.param("a.csv", "text\neins\nzwei ü\n", id="csv"),
        pytest.param("a.csv", '\ufeff"text"\r\n\r\n"eins"\r\nzwei ü', id="csv-from-windows"),
        pytest.param("a.tsv", "text\neins\nzwei ü\n", id="tsv"),
    ],
)
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_every_kind_of_text_file(write, name, text, ending):
    assert values(write(name + ending, text)) == RECORDS


def test_parquet_with_nested_turns(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"{i}"}], "n": i} for i in range(600)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=250)
    assert read(path) == [RawRecord(row) for row in rows]


def test_texts_are_not_altered(write):
    """Only a newline byte ends a line; quotes and line ends inside fields stay."""
    assert values(write("a.txt", " a\u2028b\x85c\vd \r\n")) == [{"text": " a\u2028b\x85c\vd "}]
    content = 'text,code\r\n"a, ""b""\r\n\r\nc","  x"\r\n5" pipe,\t'
    assert values(write("a.csv", content)) == [
        {"text": 'a, "b"\r\n\r\nc', "code": "  x"},
        {"text": '5" pipe', "code": "\t"},
    ]


def test_columns_of_a_table(write):
    """CSV has a header always, TSV when its names make a known format."""
    assert values(write("a.csv", "mr, ref,\n1,2,3")) == [{"mr": "1", "ref": "2", "column_3": "3"}]
    assert values(write("a.tsv", "Question\tAnswer\na\t1")) == [{"Question": "a", "Answer": "1"}]
    assert values(write("a.tsv", "a b\t1\nc d\t2")) == [
        {"column_1": "a b", "column_2": "1"},
        {"column_1": "c d", "column_2": "2"},
    ]


def test_quotes_in_tsv_count_only_where_they_make_sense(write):
    content = '"two\nlines"\tx\n"Hi," she said.\ty\n"open\tz\nlast\t"w"\n'
    assert [raw.value["column_1"] for raw in read(write("a.tsv", content))] == [
        "two\nlines",
        '"Hi," she said.',
        '"open',
        "last",
    ]


def test_lines_count_as_an_editor_counts(write):
    assert [raw.line for raw in read(write("a.jsonl", "\n{}\n\n{}"))] == [2, 4]
    assert [raw.line for raw in read(write("a.txt", "\na\n \nb"))] == [2, 4]
    assert [raw.line for raw in read(write("a.csv", 'text\n"a\nb"\n\nc'))] == [2, 5]
    assert [raw.line for raw in read(write("a.json", "[\n\n{},\n{}]"))] == [None, None]


@pytest.fixture(params=["jsonl", "jsonl.gz", "json", "txt", "csv", "tsv", "parquet"])
def ten_records(request, tmp_path, write):
    """A file of every kind with ten records, where possible with problems among them."""
    if request.param == "parquet":
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"text": [f"t{i}" for i in range(10)]}), path, row_group_size=4)
        return path
    rows = [json.dumps({"text": f"t{i}"}) for i in range(8)] + ['{"text": ', "bad"]
    kind = request.param.removesuffix(".gz")
    content = {
        "jsonl": "\n\n".join(rows),
        "json": f"[{', '.join(rows)}]",
        "txt": "\n\n".join(rows),
        "csv": "text\n" + "\n".join([f'"t\n{i}"' for i in range(8)] + ["a,b", '"open']),
        "tsv": "text\tcode\n" + "\n".join([f"t{i}\tc" for i in range(9)] + ["alone"]),
    }[kind]
    return write(f"a.{request.param}", content)


def test_reading_goes_on_at_any_record(ten_records):
    whole = read(ten_records)
    # The array's broken ninth element swallows the tenth.
    assert len(whole) == (9 if ten_records.suffix == ".json" else 10)
    for start in range(len(whole) + 2):
        assert read(ten_records, start) == whole[start:]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 4096])
def test_elements_are_found_wherever_chunks_end(write, monkeypatch, chunk):
    """Strings, escapes and brackets cut at every byte."""
    monkeypatch.setattr("cdpvae.preprocessing.readers.json_array.CHUNK", chunk)
    records = [
        'one " ]}, [{',
        {"a": 'quote " and \\ and \\" ]}', "b": ["[", {"c": "\\"}]},
        [],
        "],[",
        "\\\\",
        -1.5e3,
        None,
        {"ü": "ü\u2028"},
        {},
    ]
    for text in (json.dumps(records), json.dumps(records, ensure_ascii=False, indent=1)):
        assert values(write("a.json", text)) == records


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.txt", "a.csv", "a.parquet"])
def test_memory_does_not_grow_with_the_file(write, tmp_path, name):
    """32 MB are read within 8 MB: some chunks of 1 MiB, never the file."""
    text, count = "word " * 400, 16_000
    row = json.dumps({"text": text})
    if name == "a.parquet":
        path = tmp_path / name
        table = pa.table({"text": [f"{i} {text}" for i in range(count)]})
        pq.write_table(table, path, row_group_size=count, compression="none", use_dictionary=False)
    elif name == "a.json":
        path = write(name, f"[{','.join([row] * count)}]")
    else:
        path = write(name, "text\n" + f"{text if name == 'a.csv' else row}\n" * count)
    before = pa.default_memory_pool().bytes_allocated()
    tracemalloc.start()
    number = highest = 0
    for raw in Source.parse(str(path)).records():
        number += raw.problem is None
        if number % 1000 == 0:
            arrow = pa.default_memory_pool().bytes_allocated() - before
            highest = max(highest, arrow + tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    assert number == count + (name == "a.txt")
    assert highest < 8 * lines.CHUNK


def test_names_that_are_neither_file_nor_hub_id(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        Source.parse("data/missing.jsonl")
    with pytest.raises(ValueError, match="no such file"):
        Source.parse("data/missing.parquet")
    with pytest.raises(ValueError, match="is a directory"):
        Source.parse(str(tmp_path))
    with pytest.raises(ValueError, match="cannot be read: File name too long"):
        Source.parse("a/" + "b" * 5000)


def test_kinds_of_files(write):
    with pytest.raises(ValueError, match="readable are .json, .jsonl, .ndjson, .txt, .csv"):
        Source.parse(str(write("a.xlsx", "x")))
    with pytest.raises(ValueError, match="each but the last also with .gz"):
        Source.parse(str(write("a.parquet.gz", "x")))


class Hub:
    """In place of `datasets.load_dataset`: streams of the library's own kind."""

    def __init__(self, rows, fails_after=None):
        self.rows, self.fails_after, self.asked, self.skipped = rows, fails_after, [], []

    def __call__(self, name, split, streaming):
        self.asked.append((name, split, streaming))
        stream = datasets.IterableDataset.from_generator(self._generate)
        skip = stream.skip
        stream.skip = lambda count: self.skipped.append(count) or skip(count)
        return stream

    def _generate(self):
        for number, row in enumerate(self.rows):
            if number == self.fails_after:
                raise ConnectionError("connection\nlost")
            yield row


def test_hub_ids_are_streamed(monkeypatch):
    hub = Hub(RECORDS)
    monkeypatch.setattr("datasets.load_dataset", hub)
    for phase in (1, 2, 3):
        for name in PHASES[phase]:
            source = Source.parse(name)
            assert list(source.records()) == [RawRecord(RECORDS[0]), RawRecord(RECORDS[1])]
            assert source.identity() == {"hub": name}
    assert len(hub.asked) == 5 and {asked[1:] for asked in hub.asked} == {("train", True)}


def test_the_hub_goes_on_at_any_record(monkeypatch):
    hub = Hub([{"text": str(i)} for i in range(5)])
    monkeypatch.setattr("datasets.load_dataset", hub)
    found = list(Source.parse("owner/name").records(3))
    assert found == [RawRecord({"text": "3"}), RawRecord({"text": "4"})]
    assert hub.skipped == [3]  # the library skips: shards before it are not decoded here


def test_an_unreachable_hub_is_one_clear_error(monkeypatch):
    def load_dataset(name, split, streaming):
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    message = "owner/name: cannot be loaded: no network; try again, or give local files with"
    with pytest.raises(ValueError, match=message):
        list(Source.parse("owner/name").records())


def test_a_hub_that_stops_answering_is_an_error_and_not_an_end(monkeypatch):
    rows = [{"text": str(i)} for i in range(9)]
    monkeypatch.setattr("datasets.load_dataset", Hub(rows, fails_after=5))
    records = Source.parse("owner/name").records(2)
    assert [next(records).value for _ in range(3)] == rows[2:5]
    with pytest.raises(ValueError, match="owner/name: stopped after row 5: connection lost"):
        next(records)
