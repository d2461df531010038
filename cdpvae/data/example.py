"""One exchange as text: what formats give and data sets of texts are made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One exchange, as text. Neither side is empty."""

    instruction: str
    response: str
