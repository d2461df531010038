import pytest

from cdpvae.compatibility.padding import DynamicPaddingCollator

ROWS = [
    {"instruction_ids": [1, 5, 6], "response_ids": [1, 7, 8, 9, 2]},
    {"instruction_ids": [1, 5], "response_ids": [1, 7, 2]},
    {"instruction_ids": [1, 5, 6, 7], "response_ids": [1, 2]},
]


def test_padding_is_the_packed_batch_padded():
    batch = DynamicPaddingCollator(pad_id=0)(ROWS)
    for side in ("instruction", "response"):
        ids, mask = batch[f"{side}_ids"], batch[f"{side}_mask"]
        rows = [row[f"{side}_ids"] for row in ROWS]
        width = max(map(len, rows))
        assert ids.tolist() == [row + [0] * (width - len(row)) for row in rows]
        assert mask.tolist() == [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    assert batch["sample_index"].tolist() == [0, 1, 2]


def test_padding_to_a_fixed_length():
    batch = DynamicPaddingCollator(pad_id=9, max_instruction_tokens=6)(ROWS, [4, 5, 6])
    assert batch["instruction_ids"].tolist()[1] == [1, 5, 9, 9, 9, 9]
    assert batch["instruction_mask"].tolist()[1] == [1, 1, 0, 0, 0, 0]
    assert batch["response_ids"].shape == (3, 5)
    with pytest.raises(ValueError, match="max_response_tokens=4 is below .*5 tokens"):
        DynamicPaddingCollator(pad_id=9, max_response_tokens=4)(ROWS)
