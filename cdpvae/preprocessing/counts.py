"""Numbers of records by reason, which add up, and histograms of their lengths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

# Bins of a histogram up to the highest length allowed.
BINS = 32


@dataclass
class Counts:
    """Numbers of records by reason.

    read = sum(not_converted) + converted counts raw records.
    pairs = sum(filtered) + sum(duplicates) + kept counts instruction-response pairs, of which a
    conversation gives several under `turns: all`. The keys of the sums are the reasons.
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
        # Numbers are added, tallies merged key by key.
        for name, value in asdict(other).items():
            if isinstance(value, dict):
                merge(getattr(self, name), value)
            else:
                setattr(self, name, getattr(self, name) + value)

    def sort(self) -> None:
        """Bring reasons into an order that does not depend on how the work was divided."""
        for tally in (self.not_converted, self.filtered, self.duplicates):
            ordered = most_first(tally)
            tally.clear()
            tally.update(ordered)


def most_first(tally: dict[str, int]) -> dict[str, int]:
    """Return the tally in falling order of its numbers, equal ones by key."""
    return dict(sorted(tally.items(), key=lambda item: (-item[1], item[0])))


def merge(tally: dict[str, int], other: dict[str, int]) -> None:
    """Add the numbers of `other` to `tally`, key by key."""
    for key, number in other.items():
        tally[key] = tally.get(key, 0) + number


def count(tally: dict[str, int], key: str) -> None:
    """Add 1 to tally[key]."""
    tally[key] = tally.get(key, 0) + 1


class Histogram:
    """Counts lengths in BINS bins of equal width up to `highest`, and one bin for longer ones.

    width: of a bin, in tokens. numbers: (BINS + 1,) how many lengths fell into each bin.
    """

    def __init__(self, highest: int) -> None:
        # Rounded up, so that `highest` falls into the last of the BINS bins.
        self.width = -(-highest // BINS)
        self.numbers = [0] * (BINS + 1)

    def add(self, lengths: Iterable[int]) -> None:
        """Count some lengths."""
        for length in lengths:
            self.numbers[min(max(length - 1, 0) // self.width, BINS)] += 1

    def merge(self, numbers: Sequence[int]) -> None:
        """Add the `numbers` of another histogram with the same bins."""
        self.numbers = [a + b for a, b in zip(self.numbers, numbers, strict=True)]
