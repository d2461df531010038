"""One exchange as text: what formats give and data sets of texts are made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One exchange, as text. Neither side is empty."""

    instruction: str
    response: str


def apply_target(example: Example, target: str) -> Example:
    """Choose what the encoder reads and the decoder writes.

    target: "response" leaves the exchange as it is; under "reconstruction" the encoder reads the
    response too. Raises ValueError for another target.
    """
    if target == "response":
        return example
    if target == "reconstruction":
        return Example(example.response, example.response)
    raise ValueError(f"target={target!r} must be response or reconstruction")
