"""A raw file is converted as the data of a run were, and nothing else of the run's data counts."""

from __future__ import annotations

import json
import shutil

import pytest

from cdpvae.config import Settings
from cdpvae.data import LlamaTokenizerWrapper
from cdpvae.data.dataset import PreprocessedDataset
from cdpvae.evaluation.checkpoint import OpenedRun, RowSelection
from cdpvae.evaluation.whole.raw_input import prepare_input
from cdpvae.preprocessing.pipeline import preprocess


@pytest.mark.parametrize("data_is_there", [True, False], ids=["data", "settings alone"])
def test_files_of_the_validation_split_do_not_leak_in(
    tmp_path, tokenizer_dir, write_records, alpaca_records, data_is_there
):
    """The raw file repeats the run's validation rows, and its own: all of them are evaluated."""
    good = alpaca_records(6)
    data = {
        "input": (write_records("train.jsonl", good[:3]),),
        "validation_input": (write_records("valid.jsonl", good[3:]),),
        "processed_dir": str(tmp_path / "processed"),
        "language_filter": False,
        "min_response_tokens": 5,
        "workers": 1,
    }
    settings = Settings(data=data)
    shutil.copytree(tokenizer_dir, tmp_path / "checkpoint" / "tokenizer")
    if data_is_there:
        wrapper = LlamaTokenizerWrapper.from_pretrained(str(tokenizer_dir))
        preprocess(settings.data, wrapper, progress=False)
    else:
        # Neither the data nor the files that it was made from are needed.
        (tmp_path / "train.jsonl").unlink()
        (tmp_path / "valid.jsonl").unlink()
    records = [*good[3:], good[3], {**good[0], "output": "a"}]
    raw = tmp_path / "raw.jsonl"
    raw.write_text("".join(json.dumps(record) + "\n" for record in records))
    # Evaluation reads nothing of the network here.
    opened = OpenedRun(tmp_path / "checkpoint", settings, None, None)
    selection = RowSelection("validation", None, 10, 2)
    prepared = prepare_input(opened, str(raw), selection, tmp_path / "scratch")
    assert "4 rows of 5 records" in prepared.note
    assert "1 response shorter than 5 tokens" in prepared.note
    assert len(PreprocessedDataset(prepared.rows.processed_dir, prepared.rows.split)) == 4
    assert {path.name for path in (tmp_path / "scratch" / "processed").iterdir()} >= {"train"}
    assert not (tmp_path / "scratch" / "processed" / "validation").exists()
