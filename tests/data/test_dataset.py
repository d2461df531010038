import json

import datasets
import numpy as np
import pyarrow as pa
import pytest

from cdpvae.data import LlamaTokenizerWrapper, PreprocessedDataset
from cdpvae.data.dataset import TokenColumn, TokenDataset

ROWS = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10], [11]]


@pytest.mark.parametrize(
    "column",
    [
        TokenColumn.from_lists(ROWS),
        # several chunks, one of them empty, one a slice of a longer array
        TokenColumn.from_arrow(
            pa.chunked_array(
                [
                    pa.array(ROWS[:2], pa.list_(pa.int32())),
                    pa.array([], pa.list_(pa.int32())),
                    pa.array([[99], *ROWS[2:], [98]], pa.list_(pa.int32())).slice(1, 3),
                ]
            )
        ),
    ],
    ids=["lists", "arrow"],
)
def test_token_column_reads_every_row(column):
    assert [column[i].tolist() for i in range(len(column))] == ROWS
    assert column.lengths.tolist() == [3, 1, 2, 4, 1] and column.lengths.dtype == np.int32


def test_data_of_another_tokenizer_is_refused_naming_both(wrapper, build_tokenizer):
    column = TokenColumn.from_lists([[1, 2, 3]])
    dataset = TokenDataset(column, column, wrapper.name, wrapper.fingerprint())
    dataset.check_tokenizer(wrapper)
    other = LlamaTokenizerWrapper(build_tokenizer(("<x>",), bos_token="<s>", eos_token="</s>"))
    other.name = "the-other"
    with pytest.raises(ValueError, match=f"by {wrapper.name} .* this is the-other"):
        dataset.check_tokenizer(other)


def test_what_is_no_processed_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match="python -m cdpvae.preprocess"):
        PreprocessedDataset(tmp_path / "missing")
    with pytest.raises(ValueError, match="split='test' must be one of train, validation"):
        PreprocessedDataset(tmp_path, "test")
    (tmp_path / "manifest.json").write_text('{"name": "something else"}')
    with pytest.raises(ValueError, match="schema=None, this version reads 2"):
        PreprocessedDataset(tmp_path)


def test_processed_rows_are_read_from_the_map(tmp_path):
    """Nothing is copied at start, whatever the size; a row is a view that cannot be written to."""
    ids = [[i % 1000] * 500 for i in range(4000)]
    rows = datasets.Dataset.from_dict({"instruction_ids": ids, "response_ids": ids})
    schema = {name: datasets.List(datasets.Value("int32")) for name in rows.column_names}
    rows.cast(datasets.Features(schema)).save_to_disk(str(tmp_path / "train"))
    manifest = {
        "schema": 2,
        "counts": {"train": 4000, "validation": 0},
        "tokenizer": {"name": "n", "fingerprint": "f"},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    del rows
    before = pa.total_allocated_bytes()
    dataset = PreprocessedDataset(tmp_path)
    row = dataset.rows([3999])[0]["response_ids"]
    assert row.tolist() == ids[3999]
    assert pa.total_allocated_bytes() - before < 100_000  # of 16 MB
    assert row.base is not None and not row.flags.writeable
