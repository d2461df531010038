"""The same rows are the same bytes: whatever the workers, the shards, the executor."""

from __future__ import annotations

import pytest

from cdpvae.config import DataConfig
from cdpvae.preprocessing.pipeline import preprocess
from support.processed import MIXED, files_of, mixed_records


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[str, ...]:
    """Two files with duplicates within and across them, and records that do not convert."""
    directory = tmp_path_factory.mktemp("inputs")
    return mixed_records(directory, count=300)


@pytest.fixture
def run(tmp_path, wrapper, inputs):
    def run(out: str, **settings):
        config = DataConfig(
            input=inputs, processed_dir=str(tmp_path / out), **{**MIXED, **settings}
        )
        done = preprocess(config, wrapper, progress=False)
        return files_of(done.path), done.manifest

    return run


@pytest.mark.parametrize(
    "how",
    [
        {"workers": 2, "shard_records": 37},
        {"workers": 3, "shard_records": 100},  # several shards at a time, of unequal length
        {"workers": 1, "shard_records": 1},  # every record a shard
    ],
    ids=["two workers", "three workers", "one record a shard"],
)
@pytest.mark.parametrize(
    "what",
    [{}, {"max_samples": 97}, {"turns": "all", "max_samples": 200}],
    ids=["all", "some", "all turns, some"],
)
def test_workers_and_shards_leave_no_trace(run, what, how):
    expected, whole = run("one", workers=1, **what)
    found, manifest = run("other", **what, **how)
    assert found == expected
    assert manifest["run"]["shard_records"] == how["shard_records"]
    assert whole["counts"]["kept"] > 50 and sum(whole["counts"]["duplicates"].values()) > 5


def test_max_samples_is_the_input_cut_after_the_last_record_kept(tmp_path, wrapper, inputs):
    """The records read, given as the whole input, are kept to the last."""
    some = DataConfig(
        input=inputs[:1], max_samples=97, processed_dir=str(tmp_path / "some"), **MIXED
    )
    done = preprocess(some, wrapper, progress=False)
    read = done.manifest["counts"]["read"]
    lines = open(inputs[0]).read().splitlines(keepends=True)
    beginning = tmp_path / "beginning" / "mixed-0.jsonl"
    beginning.parent.mkdir()
    beginning.write_text("".join(lines[:read]))
    whole = DataConfig(input=(str(beginning),), processed_dir=str(tmp_path / "whole"), **MIXED)
    cut = preprocess(whole, wrapper, progress=False)
    assert cut.manifest["counts"] == done.manifest["counts"]
    assert done.manifest["counts"]["kept"] == 97 and read < len(lines)
