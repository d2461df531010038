import gzip
import json

import pytest

from cdpvae.data import readers
from cdpvae.data.readers import Source

RECORDS = [{"text": "eins"}, {"text": "zwei ü"}]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", json.dumps(RECORDS)),
        ("a.json", LINES),  # one object a line under the wrong name
        ("a.jsonl", LINES),
        ("a.jsonl", "\ufeff" + LINES.replace("\n", "\r\n")),  # what Windows writes
        ("a.txt", "eins\n\nzwei ü"),  # blank lines are no records
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_every_kind_of_file(tmp_path, name, text, compressed):
    path = tmp_path / (name + ".gz" if compressed else name)
    content = text.encode()
    path.write_bytes(gzip.compress(content) if compressed else content)
    assert [raw.value for raw in Source.parse(str(path)).records()] == RECORDS


def test_bad_lines_are_handed_on_with_their_number(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "b\n\n\xff\xfe{}\n{"text": "c"}\n' + b"[" * 10**5)
    raws = list(Source.parse(str(path)).records())
    assert [(raw.position, raw.problem) for raw in raws] == [
        (1, None),
        (2, "line is not valid JSON"),
        (4, "line is not UTF-8"),
        (5, None),
        (6, "line is not valid JSON"),
    ]
    assert '{"text": "b' in raws[1].detail


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"text": "a"}', "not valid JSON"),
        ("a.json", b"3", "must hold a JSON array"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(LINES.encode() * 99)[:-20], "cannot be read"),
        ("a.parquet", b"", "unknown kind of file"),
    ],
)
def test_files_that_cannot_be_read_are_one_clear_error(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        list(Source.parse(str(path)).records())
    assert str(path) in str(error.value)


def test_names_that_are_neither_file_nor_hub_id(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        Source.parse("data/missing.jsonl")
    with pytest.raises(ValueError, match="is a directory"):
        Source.parse(str(tmp_path))


def test_hub_ids_go_through_load_dataset(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return RECORDS

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for phase in (1, 2, 3):
        for name in readers.PHASES[phase]:
            source = Source.parse(name)
            assert [raw.value for raw in source.records()] == RECORDS
            assert source.identity() == {"hub": name}
    assert len(asked) == 5 and {split for _, split in asked} == {"train"}


def test_an_unreachable_hub_is_one_clear_error(monkeypatch):
    def load_dataset(name, split):
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(ValueError, match="owner/name: cannot be loaded: no network; local files"):
        list(Source.parse("owner/name").records())
