"""The report points to the place where a dropped record stands, in every kind of container."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cdpvae.config import DataConfig
from cdpvae.preprocessing.pipeline import preprocess
from support.processed import MIXED

LONG = "the old sailor who keeps a brown horse sold fresh bread at the market hall on a rainy day"
GOOD = {"instruction": "Tell me about the sailor of the village.", "output": LONG}
NEAR = {**GOOD, "output": LONG + " again"}
SHORT = {"instruction": "Say.", "output": LONG}
NO_PAIR = {"title": "no pair"}

# Record by record: the reason why it is dropped, None where it is kept.
RECORDS = (GOOD, NO_PAIR, SHORT, GOOD, NEAR)
REASONS = (
    None,
    "not converted: unknown format",
    "filtered: instruction shorter than 6 tokens",
    "duplicates: exact duplicate",
    "duplicates: near-duplicate",
)


@pytest.fixture
def report(tmp_path, wrapper):
    """report(path, **settings) -> the content of report.json, and the page."""

    def run(path, **settings):
        config = DataConfig(
            input=(str(path),),
            processed_dir=str(tmp_path / "out"),
            **{**MIXED, "min_instruction_tokens": 6, "workers": 1, **settings},
        )
        out = preprocess(config, wrapper, progress=False).path
        return json.loads((out / "report.json").read_text()), (out / "report.html").read_text()

    return run


def places(content: dict) -> dict[str, tuple[int, int | None]]:
    """Reason -> (record_number, line) of its example."""
    return {
        reason: (example["record_number"], example["line"])
        for reason, example in content["examples"].items()
    }


@pytest.mark.parametrize("shard_records", [100, 2], ids=["one shard", "shards of two"])
def test_lines_of_a_file_with_blank_lines(tmp_path, report, shard_records):
    """Before, between and after the records; each example's line is the one in the file."""
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n" + "\n\n \n".join(map(json.dumps, RECORDS)) + "\n\n")
    content, page = report(path, shard_records=shard_records)
    lines = path.read_text().split("\n")
    expected = {}
    for number, (record, reason) in enumerate(zip(RECORDS, REASONS, strict=True)):
        line = 3 + 3 * number
        assert lines[line - 1] == json.dumps(record)
        if reason is not None:
            expected[reason] = (number, line)
    assert places(content) == expected
    for _, line in expected.values():
        assert f"a.jsonl, line {line}</p>" in page


def as_array(path: Path) -> None:
    path.write_text(json.dumps(RECORDS, indent=2))


def as_table(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{"title": None, **record} for record in RECORDS]), path)


@pytest.mark.parametrize(
    ("name", "write"), [("a.json", as_array), ("a.parquet", as_table)], ids=["array", "parquet"]
)
def test_records_of_a_container_without_lines(tmp_path, report, name, write):
    """An array has no lines of its own, over however many lines it is written."""
    write(tmp_path / name)
    content, page = report(tmp_path / name)
    expected = {
        reason: (number, None) for number, reason in enumerate(REASONS) if reason is not None
    }
    assert places(content) == expected
    for number, _ in expected.values():
        assert f"{name}, record {number + 1}</p>" in page
