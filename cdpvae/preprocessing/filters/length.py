"""Bounds on the length of both sides, in tokens."""

from __future__ import annotations

from dataclasses import dataclass

from cdpvae.preprocessing.records import Record


@dataclass(frozen=True)
class LengthFilter:
    """Keeps records within bounds in tokens, BOS and EOS counted, both bounds included."""

    min_instruction: int
    max_instruction: int
    min_response: int
    max_response: int

    def __call__(self, record: Record) -> str | None:
        """Return None, or which side is too short or too long."""
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
