import hashlib

import pytest

from cdpvae.config import DataConfig
from cdpvae.data.deduplication import ExactDeduplicator, exact_key
from cdpvae.data.filters import LengthFilter, Record, build_filters


def record(instruction: int, response: int) -> Record:
    return Record(0, "s", "i", "r", [1] * instruction, [1] * response)


@pytest.mark.parametrize(
    ("lengths", "reason"),
    [
        ((10, 20), None),  # both ends of both ranges are kept
        ((512, 1024), None),
        ((9, 20), "instruction shorter than 10 tokens"),
        ((513, 20), "instruction longer than 512 tokens"),
        ((10, 19), "response shorter than 20 tokens"),
        ((10, 1025), "response longer than 1024 tokens"),
    ],
)
def test_length_filter_bounds(lengths, reason):
    assert LengthFilter()(record(*lengths)) == reason


def test_filters_follow_the_settings():
    config = DataConfig(min_instruction_tokens=3, max_response_tokens=5, min_response_tokens=4)
    (length,) = build_filters(config)
    assert length(record(3, 5)) is None
    assert length(record(2, 5)) == "instruction shorter than 3 tokens"
    assert length(record(3, 6)) == "response longer than 5 tokens"


def test_exact_key_is_the_md5_of_the_description():
    assert exact_key("ask ü", "reply") == hashlib.md5("ask ü\nreply".encode()).digest()


def test_the_first_of_equal_records_stays():
    deduplicator = ExactDeduplicator()
    pairs = [("a", "b"), ("a", "c"), ("a", "b"), ("A", "b"), ("a", "c")]
    assert [deduplicator.is_duplicate(*pair) for pair in pairs] == [False, False, True, False, True]
