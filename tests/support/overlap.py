"""Similarity of texts by comparing all with all: the oracle of deduplication."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence


def five_grams(text: str) -> frozenset[tuple[str, ...]]:
    """Runs of five words in lower case, without punctuation; a shorter text is one run.

    For texts in scripts with spaces, with at least one word.
    """
    words = re.findall(r"\w+", text.lower())
    return frozenset(tuple(words[at : at + 5]) for at in range(max(1, len(words) - 4)))


def pairs_by_brute_force(
    sets: Sequence[frozenset[Hashable]], similarity: float
) -> list[tuple[int, int]]:
    """(earlier, later) of all pairs with Jaccard >= similarity, none left out.

    Shared elements are counted through an inverted index: pairs without any are not alike.
    """
    holders: dict[Hashable, list[int]] = defaultdict(list)
    found = []
    for later, elements in enumerate(sets):
        shared: Counter[int] = Counter()
        for element in elements:
            shared.update(holders[element])
            holders[element].append(later)
        found += [
            (earlier, later)
            for earlier, count in shared.items()
            if count >= similarity * (len(elements) + len(sets[earlier]) - count)
        ]
    return found
