"""The bounds of the length filter under the default settings, and of what it judges."""

from __future__ import annotations

import pytest

from cdpvae.config import DataConfig
from cdpvae.preprocessing.filters.build import build_token_filters
from cdpvae.preprocessing.filters.length import LengthFilter
from cdpvae.preprocessing.records import Record


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
    (keep,) = build_token_filters(DataConfig())
    assert isinstance(keep, LengthFilter)
    instruction, response = lengths
    assert keep(Record(0, 1, None, "i", "r", [1] * instruction, [1] * response)) == reason
