import json

import pytest

from cdpvae.data import PreprocessedDataset
from cdpvae.preprocess import main


@pytest.fixture
def call(tmp_path, tokenizer_dir, write_records, alpaca_records):
    path = write_records("a.jsonl", alpaca_records(8))

    def run(*flags: str) -> int:
        return main(
            ["--input", path, "--tokenizer", str(tokenizer_dir), "--no-language-filter"]
            + ["--processed-dir", str(tmp_path / "out"), *flags]
        )

    return run


def test_writes_and_reports(call, tmp_path, capsys):
    assert call("--max-samples", "5", "--validation-fraction", "0") == 0
    assert len(PreprocessedDataset(tmp_path / "out")) == 5
    said = capsys.readouterr().out.splitlines()
    assert said[0].split()[:3] == ["source", "read", "converted"]
    assert said[1].split() == ["a.jsonl", "5", "5", "0", "0", "5", "5", "0"]
    assert call("--max-samples", "5", "--validation-fraction", "0") == 0
    assert "reused" in capsys.readouterr().out
    assert call() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: processed_dir=") and error.count("\n") == 1
    assert call("--overwrite", "--validation-fraction", "0") == 0
    assert len(PreprocessedDataset(tmp_path / "out")) == 8


def test_settings_file_and_flags(call, tmp_path, capsys):
    config = tmp_path / "settings.json"
    config.write_text(json.dumps({"data": {"max_samples": 3, "target": "reconstruction"}}))
    assert call("--config", str(config), "--max-samples", "4") == 0
    settings = json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]
    assert (settings["max_samples"], settings["target"]) == (4, "reconstruction")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format", "csv"], "format"),
        (["--input", "missing.jsonl"], "no such file"),
        (["--tokenizer", "/missing"], "cannot be loaded"),
        (["--min-response-tokens", "2000"], "--min-response-tokens 2000 must not be above"),
    ],
)
def test_errors_are_one_line_and_status_2(call, capsys, flags, message):
    assert call(*flags) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and message in said.err
    assert said.err.count("\n") == 1 and said.out == ""
