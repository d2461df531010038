"""Which records are worth training on.

A filter is a pure function from a `Record` to None (keep) or a short, constant reason, so that
the pipeline can count what it drops and why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cdpvae.config import DataConfig


@dataclass(frozen=True)
class Record:
    """A converted, tokenised record: one row on disk.

    record_id: running number over all inputs, from 0. source: file name or hub id.
    instruction: the text the encoder reads; response: the text the decoder writes.
    instruction_ids: [BOS] tokens. response_ids: [BOS] tokens [EOS].
    """

    record_id: int
    source: str
    instruction: str
    response: str
    instruction_ids: list[int]
    response_ids: list[int]


Filter = Callable[[Record], str | None]


@dataclass(frozen=True)
class LengthFilter:
    """Bounds in tokens, BOS and EOS counted, both ends included."""

    min_instruction: int = 10
    max_instruction: int = 512
    min_response: int = 20
    max_response: int = 1024

    def __call__(self, record: Record) -> str | None:
        """None, or which side is too short or too long."""
        sides = (
            ("instruction", record.instruction_ids, self.min_instruction, self.max_instruction),
            ("response", record.response_ids, self.min_response, self.max_response),
        )
        for side, ids, low, high in sides:
            if len(ids) < low:
                return f"{side} shorter than {low} tokens"
            if len(ids) > high:
                return f"{side} longer than {high} tokens"
        return None


def build_filters(config: DataConfig) -> list[Filter]:
    """The filters the settings ask for, in the order they run."""
    return [
        LengthFilter(
            config.min_instruction_tokens,
            config.max_instruction_tokens,
            config.min_response_tokens,
            config.max_response_tokens,
        )
    ]
