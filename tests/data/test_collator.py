import numpy as np
import pytest

from cdpvae.data import VAECollator

ROWS = [
    {"instruction_ids": [1, 5, 6], "response_ids": [1, 7, 8, 9, 2]},
    {"instruction_ids": [1, 5], "response_ids": [1, 7, 2]},
    {"instruction_ids": [1, 5, 6, 7], "response_ids": [1, 2]},
]


# Rows as a caller writes them, and as a data set gives them.
@pytest.mark.parametrize("make", [list, lambda ids: np.array(ids, dtype=np.int32)])
def test_packing_loses_no_token(make):
    rows = [{name: make(ids) for name, ids in row.items()} for row in ROWS]
    batch = VAECollator()(rows, [30, 10, 20])
    for name, packed in (("instruction_ids", batch.instruction), ("response_ids", batch.response)):
        assert [row.tolist() for row in packed.rows()] == [row[name] for row in ROWS]
        assert packed.max_len == max(len(row[name]) for row in ROWS)
    assert batch.sample_index.tolist() == [30, 10, 20]
    assert batch.targets.tolist() == [7, 8, 9, 2, 7, 2, 2]
    assert batch.augmented is None


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ValueError, match="instruction_ids: cannot pack rows of lengths"):
        VAECollator()([], [])
    with pytest.raises(ValueError, match=r"response_ids: cannot pack rows of lengths \[0\]"):
        VAECollator()([{"instruction_ids": [1], "response_ids": []}], [0])
    with pytest.raises(ValueError, match="3 rows but 2 sample indices"):
        VAECollator()(ROWS, [0, 1])
