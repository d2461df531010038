"""Which records repeat others: equal texts by their key, near-duplicates by MinHash.

Two texts are near-duplicates when the Jaccard similarity of their word 5-grams is at least
`similarity`. `lsh` proposes pairs; each pair is verified on the texts themselves, so that nothing
is called a near-duplicate by mistake. Clusters are the connected components, and the first record
of a cluster in reading order stays.

The clusters are a function of the set of texts: texts are numbered by their key, and all that
follows sees only these numbers. So neither the order of the records nor the number of workers
matters; only which record is the first of its cluster does.

Work grows as n log n whatever the texts are. Equal texts, and texts with equal shingles, are merged
before any pair is looked at. `lsh` bounds the number of pairs of a text. Pairs that are connected
already are skipped. Of the pairs that fail, most fail a bound that is computed for many at once.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cdpvae.preprocessing.dedup.lsh import candidate_rounds, hash_columns
from cdpvae.preprocessing.dedup.minhash import jaccard, shingles
from cdpvae.preprocessing.records import compared_text

KEPT, EXACT, NEAR = range(3)
# What is held in memory at most: sets of about 20 KB, and arrays of about 400 bytes.
CACHED_SETS = 4096
CACHED_SLOTS = 1 << 18
# A table of CHUNK_PAIRS x SLOTS bytes is 1 MiB, which stays in the cache of a core.
SLOTS, CHUNK_PAIRS = 1 << 14, 64


def exact_key(instruction: str, response: str) -> bytes:
    """Return the 16 bytes that two exact duplicates share: the description's MD5 of both sides.

    MD5 serves as a fingerprint here, not as a safeguard.
    """
    text = compared_text(instruction, response).encode("utf-8", "surrogatepass")
    return hashlib.md5(text, usedforsecurity=False).digest()


@dataclass(frozen=True)
class Duplicates:
    """Which of n records are duplicates, and of what; each column (n,).

    keeper: int64, the record that stays in the place of this one; a kept record is its own keeper.
    cluster: int64, the first record of the cluster, equal for all its records.
    kind: int8, KEPT, EXACT (an earlier record has the same texts) or NEAR.
    """

    keeper: np.ndarray
    cluster: np.ndarray
    kind: np.ndarray


def find_duplicates(
    keys: Sequence[bytes] | np.ndarray,
    signatures: np.ndarray | None,
    texts: Callable[[int], str],
    *,
    similarity: float,
    shingle_words: int,
) -> Duplicates:
    """Find exact duplicates, and near-duplicates when there are signatures.

    keys (n,): 16 bytes each (`exact_key`).
    signatures (n, P): uint32 (`minhash.Signer`); None to look for exact duplicates only.
    texts: returns the signed text of a record; asked for texts in proposed pairs, perhaps twice.
    similarity: Jaccard similarity from which two texts are near-duplicates.
    shingle_words: words in a shingle.

    Raises ValueError when the signatures are too short for `similarity`.
    """
    # Number the distinct texts, and cluster them.
    first, text_of = _distinct(np.asarray(keys, "V16"))
    cluster_of_text = np.arange(len(first))
    if signatures is not None and len(first) > 1:
        near = _NearDuplicates(signatures, first, texts, similarity, shingle_words)
        cluster_of_text = near.clusters()
    # The first record of each cluster, in reading order, stays.
    label = cluster_of_text[text_of]
    earliest = np.full(len(first), len(label), np.int64)
    np.minimum.at(earliest, label, np.arange(len(label)))
    keeper = earliest[label]
    number = np.arange(len(label))
    kind = np.where(number != first[text_of], EXACT, np.where(number != keeper, NEAR, KEPT))
    return Duplicates(keeper, keeper.copy(), kind.astype(np.int8))


def _distinct(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Assign numbers to the distinct keys.

    keys: (n,). Returns (u,) the first record of each distinct key, in key order, and (n,) the
    number of each record's key.
    """
    # Sort the 16 bytes as two integers; equal keys then stand together.
    halves = np.ascontiguousarray(keys).view(np.uint64).reshape(-1, 2)
    order = np.lexsort([halves[:, 1], halves[:, 0]])
    new = np.ones(len(order), bool)
    new[1:] = np.any(halves[order][1:] != halves[order][:-1], axis=1)
    number = np.empty(len(order), np.int64)
    number[order] = np.cumsum(new) - 1
    # lexsort is stable: the first of equal keys is the first record.
    return order[new], number


class _NearDuplicates:
    """Clusters texts 0 .. d-1, no two of which have the same key.

    signatures (n, P): the signatures of all records.
    record_of (d,): the record that each text belongs to.
    texts: returns the text of a record.
    similarity: Jaccard similarity from which two texts are near-duplicates.
    shingle_words: words in a shingle.
    """

    def __init__(
        self,
        signatures: np.ndarray,
        record_of: np.ndarray,
        texts: Callable[[int], str],
        similarity: float,
        shingle_words: int,
    ) -> None:
        self.signatures, self.record_of, self.similarity = signatures, record_of, similarity
        self.components = _Components(len(record_of))
        self.set_of = functools.lru_cache(CACHED_SETS)(
            lambda text: shingles(texts(int(record_of[text])), shingle_words)
        )
        self.slots_of = functools.lru_cache(CACHED_SLOTS)(lambda text: _slots(self.set_of(text)))

    def clusters(self) -> np.ndarray:
        """Return for each text the number of one text of its cluster, equal within it, (d,)."""
        distinct = self._join_equal_sets()
        rounds = candidate_rounds(
            self.signatures,
            self.record_of[distinct],
            self.similarity,
            lambda left, right: self._unconnected(distinct[left], distinct[right]),
        )
        for left, right in rounds:
            for at in range(0, len(left), CHUNK_PAIRS):
                part = slice(at, at + CHUNK_PAIRS)
                self._join_similar(distinct[left[part]], distinct[right[part]])
        return self.components.label

    def _join_equal_sets(self) -> np.ndarray:
        """Join texts with equal shingles; return one text of each such group, ascending.

        Equal sets have the same similarity to every other set, so that one represents all. Of
        100,000 texts that differ in punctuation only, no two are compared.
        """
        # Equal signatures are needed for equal sets, and are quickly found.
        every = range(self.signatures.shape[1])
        code = hash_columns(self.signatures, self.record_of, every)
        _, group, size = np.unique(code, return_inverse=True, return_counts=True)
        # Of those, texts whose sets are equal are joined.
        represents = np.ones(len(group), bool)
        seen: dict[bytes, int] = {}
        for text in np.flatnonzero(size[group] > 1).tolist():
            representative = seen.setdefault(_fingerprint(self.set_of(text)), text)
            if representative != text:
                self.components.join(representative, text)
                represents[text] = False
        return np.flatnonzero(represents)

    def _unconnected(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Say which pairs are not connected yet, (m,) bool."""
        label = self.components.label
        return label[left] != label[right]

    def _join_similar(self, left: np.ndarray, right: np.ndarray) -> None:
        """Join the pairs whose texts are similar. left, right: (m,) with m <= CHUNK_PAIRS.

        Equal shingles are in equal slots, so that shared slots bound the shared shingles from
        above, whatever the slots are.
        """
        # Rule out most pairs by the bound, all of them at once.
        one, other = left.tolist(), right.tolist()
        slots = [self.slots_of(text) for text in one], [self.slots_of(text) for text in other]
        sizes = [np.fromiter(map(len, side), np.int64, len(side)) for side in slots]
        shared = _shared_slots(*slots, *sizes)
        possible = shared >= self.similarity * (sizes[0] + sizes[1] - shared) - 1e-6
        # Compare the shingles of the others.
        for pair in np.flatnonzero(possible).tolist():
            if self.components.label[one[pair]] == self.components.label[other[pair]]:
                continue
            if jaccard(self.set_of(one[pair]), self.set_of(other[pair])) >= self.similarity:
                self.components.join(one[pair], other[pair])


def _slots(elements: frozenset[str]) -> np.ndarray:
    """Return a slot below SLOTS for each element, (len,) uint16."""
    # Hashes of texts differ between processes; what is decided by the slots does not.
    hashes = np.fromiter(map(hash, elements), np.int64, len(elements))
    return (hashes & (SLOTS - 1)).astype(np.uint16)


def _shared_slots(
    left: list[np.ndarray],
    right: list[np.ndarray],
    left_sizes: np.ndarray,
    right_sizes: np.ndarray,
) -> np.ndarray:
    """Count for each of m pairs the right elements whose slot a left element has too, (m,).

    left, right: the slots of both sides.
    left_sizes (m,): their numbers on the left.
    right_sizes (m,): their numbers on the right.
    """
    # Mark the slots of each left side, then look up those of its right side.
    table = np.zeros((len(left), SLOTS), bool)
    pairs = np.arange(len(left))
    table[np.repeat(pairs, left_sizes), np.concatenate(left)] = True
    found = table[np.repeat(pairs, right_sizes), np.concatenate(right)]
    starts = np.concatenate([[0], np.cumsum(right_sizes)[:-1]])
    return np.add.reduceat(found, starts, dtype=np.int64)


def _fingerprint(elements: frozenset[str]) -> bytes:
    """Return 16 bytes that are equal for equal sets."""
    joined = "\n".join(sorted(elements)).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(joined, digest_size=16).digest()


class _Components:
    """Connected components of 0 .. n-1 under joins. label: (n,), equal within a component.

    The smaller component takes the label of the larger one: n log n relabellings in all.
    """

    def __init__(self, count: int) -> None:
        self.label = np.arange(count)
        self._members: dict[int, list[int]] = {}

    def join(self, one: int, other: int) -> None:
        """Merge the components of two members."""
        keep, give = int(self.label[one]), int(self.label[other])
        if keep == give:
            return
        kept, given = (self._members.pop(label, [label]) for label in (keep, give))
        if len(kept) < len(given):
            keep, kept, given = give, given, kept
        self.label[given] = keep
        kept += given
        self._members[keep] = kept
