"""A pair of texts on its way through the pipeline, and what may judge it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Record:
    """A converted record; with its tokens, one row on disk.

    record_id: running number over all inputs, from 0. source: file name or hub id.
    instruction: the text the encoder reads; response: the text the decoder writes.
    instruction_ids: [BOS] tokens. response_ids: [BOS] tokens [EOS]. Both empty before tokenization.
    """

    record_id: int
    source: str
    instruction: str
    response: str
    instruction_ids: list[int]
    response_ids: list[int]


# None to keep a record, or a short reason, constant under given settings, to drop it.
Filter = Callable[[Record], str | None]
