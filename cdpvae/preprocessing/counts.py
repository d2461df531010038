"""What became of the records: numbers that add up, and what the report shows beside them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

EXCERPT = 300
BINS = 32


@dataclass
class Counts:
    """read = sum(not_converted) + converted, in records;
    pairs = sum(filtered) + sum(duplicates) + kept, in instruction-response pairs, of which a
    conversation gives several under `turns: all`. Reasons are the keys of the sums.
    """

    read: int = 0
    converted: int = 0
    not_converted: dict[str, int] = field(default_factory=dict)
    pairs: int = 0
    filtered: dict[str, int] = field(default_factory=dict)
    duplicates: dict[str, int] = field(default_factory=dict)
    kept: int = 0
    train: int = 0
    validation: int = 0

    def add(self, other: Counts) -> None:
        """Add all numbers of another part."""
        for name, value in asdict(other).items():
            if isinstance(value, dict):
                merge(getattr(self, name), value)
            else:
                setattr(self, name, getattr(self, name) + value)

    def sort(self) -> None:
        """Reasons in an order that does not depend on how the work was cut."""
        for tally in (self.not_converted, self.filtered, self.duplicates):
            ordered = most_first(tally)
            tally.clear()
            tally.update(ordered)


def most_first(tally: dict[str, int]) -> dict[str, int]:
    """The same, largest numbers first."""
    return dict(sorted(tally.items(), key=lambda item: (-item[1], item[0])))


def merge(tally: dict[str, int], other: dict[str, int]) -> None:
    """Add the numbers of `other` to `tally`, key by key."""
    for key, number in other.items():
        tally[key] = tally.get(key, 0) + number


def count(tally: dict[str, int], key: str) -> None:
    """One more."""
    tally[key] = tally.get(key, 0) + 1


class Histogram:
    """Lengths in BINS bins of equal width up to `highest`, and one for all that is longer."""

    def __init__(self, highest: int, numbers: Sequence[int] | None = None) -> None:
        self.width = -(-highest // BINS)
        self.numbers = list(numbers or [0] * (BINS + 1))

    def add(self, lengths: Iterable[int]) -> None:
        for length in lengths:
            self.numbers[min(max(length - 1, 0) // self.width, BINS)] += 1

    def merge(self, numbers: Sequence[int]) -> None:
        self.numbers = [a + b for a, b in zip(self.numbers, numbers, strict=True)]


def excerpt(value: Any) -> str:
    """The beginning of a text or a record, safe to print, to store and to show."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = text[:EXCERPT].encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)
