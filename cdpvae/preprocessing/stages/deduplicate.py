"""Stage 2: which candidates stay, and which of them belong on one side of the split.

Of exact duplicates, and of each cluster of near-duplicates, the first candidate in reading order
stays. Candidates of `validation_input` come first in it. They are judged among themselves, so that
they are the same whatever is trained on; what shares a group with them is not trained on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from cdpvae.config import DataConfig
from cdpvae.preprocessing.dedup.clusters import EXACT, KEPT, NEAR, Duplicates, find_duplicates
from cdpvae.preprocessing.stages.candidates import Candidates

# What a training candidate has in common with the files of the validation split.
HELD_OUT, HELD_OUT_INSTRUCTION = 3, 4
# Stored number -> name of what is decided about a candidate.
DECISIONS = {
    KEPT: "kept",
    EXACT: "exact duplicate",
    NEAR: "near-duplicate",
    HELD_OUT: "duplicate of a validation row",
    HELD_OUT_INSTRUCTION: "instruction of a validation row",
}


@dataclass(frozen=True)
class Decisions:
    """What is decided about n candidates; each column (n,).

    decision: int8, a key of DECISIONS. keeper: int64, the candidate that stays in the place of this
    one; a kept candidate is its own keeper. group: int64, the first candidate of the group that a
    split must not part: near-duplicates, equal instructions, exchanges of one conversation.
    """

    decision: np.ndarray
    keeper: np.ndarray
    group: np.ndarray

    def __len__(self) -> int:
        return len(self.decision)

    @property
    def kept(self) -> np.ndarray:
        """The candidates that stay, ascending."""
        return np.flatnonzero(self.decision == KEPT)

    def counts(self) -> dict[str, int]:
        """Return how often each decision was made, by its name."""
        return {
            name: int(np.count_nonzero(self.decision == decision))
            for decision, name in DECISIONS.items()
        }

    def to_table(self) -> pa.Table:
        """Return the columns as a table, for the disk."""
        return pa.table({name: getattr(self, name) for name in ("decision", "keeper", "group")})

    @classmethod
    def from_table(cls, table: pa.Table) -> Decisions:
        """Read the columns of `to_table`."""
        return cls(*(table.column(name).to_numpy() for name in ("decision", "keeper", "group")))


def connected(labellings: list[np.ndarray]) -> np.ndarray:
    """Return the smallest index of each index's component, (n,).

    Two indices are connected when their labels are equal in at least one labelling.
    labellings: (n,) non-negative integers each.
    """
    # Begin with each index as its own component, and labels that count from 0.
    dense = [np.unique(labels, return_inverse=True)[1] for labels in labellings]
    group = np.arange(len(dense[0]))
    while True:
        # Spread the smallest index of a label to all indices with that label.
        before = group
        for labels in dense:
            smallest = np.full(labels.max(initial=0) + 1, len(labels))
            np.minimum.at(smallest, labels, group)
            group = smallest[labels]
        # Following the index found so far lets a chain of n links end after log n rounds.
        group = group[group]
        if np.array_equal(group, before):
            return group


class Deduplicator:
    """Decides which of the first `count` candidates stay."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config

    def __call__(self, candidates: Candidates, count: int) -> Decisions:
        """Return the decisions about candidates 0 .. count-1, as if there were no others."""
        # Equal instructions, and the exchanges of one record, must not be parted by the split.
        instruction_hash = candidates.column("instruction_hash", count)
        together = [instruction_hash, candidates.record_ids()[:count]]
        if self.config.deduplication == "none" or not count:
            kept = np.full(count, KEPT, np.int8)
            return Decisions(kept, np.arange(count), connected(together))
        # Find duplicates; clusters of near-duplicates must not be parted either.
        found = self._duplicates(candidates, count)
        group = connected([found.cluster, *together])
        # With files of the validation split, clusters and instructions of both sides are compared.
        held_out = candidates.count_before(len(self.config.validation_input), count)
        if not held_out:
            return Decisions(found.kind, found.keeper, group)
        alone = self._duplicates(candidates, held_out)
        kind, keeper = hold_out(found, alone, instruction_hash)
        return Decisions(kind, keeper, group)

    def _duplicates(self, candidates: Candidates, count: int) -> Duplicates:
        """Return the duplicates among candidates 0 .. count-1."""
        near = self.config.deduplication == "minhash"
        return find_duplicates(
            candidates.keys(count),
            candidates.matrix("signature", count) if near else None,
            candidates.text,
            similarity=self.config.similarity,
            shingle_words=self.config.shingle_words,
        )


def hold_out(
    found: Duplicates, alone: Duplicates, instruction_hash: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Drop training candidates that would tell of validation rows -> decision and keeper, (n,).

    found: the duplicates among all n candidates, those of the validation split first.
    alone: the duplicates among those of the validation split only, (v,).
    instruction_hash (n,): equal for equal instructions.

    A cluster goes as a whole when one of its texts is in the validation split, or the instruction
    of one of them is.
    """
    # Instructions connect clusters where a validation row has them, not two training candidates.
    count, held_out = len(found.kind), len(alone.kind)
    kept_hashes = instruction_hash[:held_out][alone.kind == KEPT]
    shares = np.isin(instruction_hash, kept_hashes)
    number = np.unique(instruction_hash, return_inverse=True)[1]
    group = connected([found.cluster, np.where(shares, number, count + np.arange(count))])
    # Where validation rows are in a group or cluster, its first candidate is one that stays.
    repeats, near_one = found.cluster < held_out, group < held_out
    decision = np.where(repeats, HELD_OUT, np.where(near_one, HELD_OUT_INSTRUCTION, found.kind))
    keeper = np.where(repeats, found.cluster, np.where(near_one, group, found.keeper))
    # Validation rows are not judged by what is trained on.
    decision[:held_out], keeper[:held_out] = alone.kind, alone.keeper
    return decision.astype(np.int8), keeper
