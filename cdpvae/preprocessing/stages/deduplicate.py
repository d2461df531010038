"""Stage 2: which candidates stay, and which of them belong on one side of the split.

Of exact duplicates, and of each cluster of near-duplicates, the first candidate in reading order
stays.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from cdpvae.config import DataConfig
from cdpvae.preprocessing.dedup.clusters import EXACT, KEPT, NEAR, find_duplicates
from cdpvae.preprocessing.stages.candidates import Candidates

# What can become of a candidate; the number is what is stored.
OUTCOMES = {KEPT: "kept", EXACT: "exact duplicate", NEAR: "near-duplicate"}


@dataclass(frozen=True)
class Decisions:
    """One row per candidate, all (n,).

    outcome: key of OUTCOMES. keeper: the candidate that stays in its place, itself when kept.
    group: the first candidate of all that a split must not part: near-duplicates, equal
    instructions, exchanges of one conversation.
    """

    outcome: np.ndarray
    keeper: np.ndarray
    group: np.ndarray

    def __len__(self) -> int:
        return len(self.outcome)

    @property
    def kept(self) -> np.ndarray:
        """Indices of the candidates that stay, ascending."""
        return np.flatnonzero(self.outcome == KEPT)

    def counts(self) -> dict[str, int]:
        """How many came to what."""
        return {
            name: int(np.count_nonzero(self.outcome == outcome))
            for outcome, name in OUTCOMES.items()
        }

    def to_table(self) -> pa.Table:
        return pa.table({name: getattr(self, name) for name in ("outcome", "keeper", "group")})

    @classmethod
    def from_table(cls, table: pa.Table) -> Decisions:
        return cls(*(table.column(name).to_numpy() for name in ("outcome", "keeper", "group")))


def connected(labellings: list[np.ndarray]) -> np.ndarray:
    """(n,) the smallest index of each component, where equal labels in any labelling connect.

    labellings: (n,) non-negative integers each.
    """
    dense = [np.unique(labels, return_inverse=True)[1] for labels in labellings]
    group = np.arange(len(dense[0]))
    while True:
        before = group
        for labels in dense:
            smallest = np.full(labels.max(initial=0) + 1, len(labels))
            np.minimum.at(smallest, labels, group)
            group = smallest[labels]
        group = group[group]
        if np.array_equal(group, before):
            return group


class Deduplicator:
    """(candidates, count) -> Decisions about the first `count` of them."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config

    def __call__(self, candidates: Candidates, count: int) -> Decisions:
        together = [
            candidates.column("instruction_hash", count),
            candidates.record_ids()[:count],
        ]
        if self.config.deduplication == "none" or not count:
            kept = np.full(count, KEPT, np.int8)
            return Decisions(kept, np.arange(count), connected(together))
        near = self.config.deduplication == "minhash"
        found = find_duplicates(
            candidates.keys(count),
            candidates.matrix("signature", count) if near else None,
            candidates.text,
            similarity=self.config.similarity,
            shingle_words=self.config.shingle_words,
        )
        return Decisions(found.kind, found.keeper, connected([found.cluster, *together]))
