"""Which records repeat others: equal texts by their key, near-duplicates by MinHash.

Two texts are near-duplicates when the Jaccard similarity of their word 5-grams is at least
`similarity`. Candidates come from `banding`; each is verified on the texts themselves, so what is
called a near-duplicate is one. Clusters are the connected components, and the first record of a
cluster in reading order stays.

The clusters are a function of the set of texts: texts are numbered by their key, and all that
follows sees only these numbers. So neither the order of the records nor the number of workers
matters; only which record is the first of its cluster does.

Work grows as n log n whatever the texts are: equal texts, and texts of equal shingles, become one
before any pair is looked at; `banding` bounds the candidates of a text; pairs that are connected
already are passed over; and of those that fail, most fail a bound computed for many at once.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cdpvae.preprocessing.dedup.lsh import candidate_rounds, hash_columns
from cdpvae.preprocessing.dedup.minhash import jaccard, shingles

KEPT, EXACT, NEAR = range(3)
# In memory at most: sets of about 20 KB, and arrays of about 400 bytes.
CACHED_SETS = 4096
CACHED_SLOTS = 1 << 18
# Pairs of a chunk times slots: 1 MiB, which stays in the cache of a core.
SLOTS, CHUNK_PAIRS = 1 << 14, 64


def exact_key(instruction: str, response: str) -> bytes:
    """The 16 bytes that two exact duplicates share: the description's MD5 of both sides.

    MD5 is a fingerprint here, not a safeguard.
    """
    text = f"{instruction}\n{response}".encode("utf-8", "surrogatepass")
    return hashlib.md5(text, usedforsecurity=False).digest()


@dataclass(frozen=True)
class Duplicates:
    """What became of n records, all (n,).

    keeper: int64, the record that stays in this one's place; itself when it stays.
    cluster: int64, equal for records of one cluster: its first record.
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
    """Exact duplicates, and near-duplicates when there are signatures.

    keys: (n,) of 16 bytes (`exact_key`). signatures: (n, P) uint32 (`minhash.Signer`).
    texts: index -> the text that was signed; asked for candidates only, perhaps twice.
    Raises ValueError when the signatures are too short for `similarity`.
    """
    first, text_of = _distinct(np.asarray(keys, "V16"))
    cluster_of_text = np.arange(len(first))
    if signatures is not None and len(first) > 1:
        near = _NearDuplicates(signatures, first, texts, similarity, shingle_words)
        cluster_of_text = near.clusters()
    label = cluster_of_text[text_of]
    earliest = np.full(len(first), len(label), np.int64)
    np.minimum.at(earliest, label, np.arange(len(label)))
    keeper = earliest[label]
    number = np.arange(len(label))
    kind = np.where(number != first[text_of], EXACT, np.where(number != keeper, NEAR, KEPT))
    return Duplicates(keeper, keeper.copy(), kind.astype(np.int8))


def _distinct(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n,) keys -> (u,) first record of each distinct key, in key order; (n,) number of its key."""
    halves = np.ascontiguousarray(keys).view(np.uint64).reshape(-1, 2)
    order = np.lexsort([halves[:, 1], halves[:, 0]])
    new = np.ones(len(order), bool)
    new[1:] = np.any(halves[order][1:] != halves[order][:-1], axis=1)
    number = np.empty(len(order), np.int64)
    number[order] = np.cumsum(new) - 1
    # lexsort is stable: the first of equal keys is the first record.
    return order[new], number


class _NearDuplicates:
    """Texts 0 .. d-1, which are the records `record_of`; no two have the same key."""

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
        """(d,) equal for texts of one cluster, each the number of a text of it."""
        distinct = self._join_equal_sets()
        rounds = candidate_rounds(
            self.signatures,
            self.record_of[distinct],
            self.similarity,
            lambda left, right: self._open(distinct[left], distinct[right]),
        )
        for left, right in rounds:
            for at in range(0, len(left), CHUNK_PAIRS):
                part = slice(at, at + CHUNK_PAIRS)
                self._join_similar(distinct[left[part]], distinct[right[part]])
        return self.components.label

    def _join_equal_sets(self) -> np.ndarray:
        """Join texts of equal shingles -> one of each, ascending.

        Equal sets have the same similarity to every third set, so one stands for all. Of 100,000
        such texts, as a changed date in the punctuation makes them, no two are compared.
        """
        every = range(self.signatures.shape[1])
        code = hash_columns(self.signatures, self.record_of, every)
        _, group, size = np.unique(code, return_inverse=True, return_counts=True)
        stands = np.ones(len(group), bool)
        seen: dict[bytes, int] = {}
        for text in np.flatnonzero(size[group] > 1).tolist():
            representative = seen.setdefault(_fingerprint(self.set_of(text)), text)
            if representative != text:
                self.components.join(representative, text)
                stands[text] = False
        return np.flatnonzero(stands)

    def _open(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """(m,) which pairs are not connected."""
        label = self.components.label
        return label[left] != label[right]

    def _join_similar(self, left: np.ndarray, right: np.ndarray) -> None:
        """Join the pairs that are alike, which the texts themselves say; m is CHUNK_PAIRS or less.

        Equal shingles are in equal slots, so that shared slots bound the shared shingles from
        above, whatever the slots are.
        """
        one, other = left.tolist(), right.tolist()
        slots = [self.slots_of(text) for text in one], [self.slots_of(text) for text in other]
        sizes = [np.fromiter(map(len, side), np.int64, len(side)) for side in slots]
        shared = _shared_slots(*slots, *sizes)
        possible = shared >= self.similarity * (sizes[0] + sizes[1] - shared) - 1e-6
        for pair in np.flatnonzero(possible).tolist():
            if self.components.label[one[pair]] == self.components.label[other[pair]]:
                continue
            if jaccard(self.set_of(one[pair]), self.set_of(other[pair])) >= self.similarity:
                self.components.join(one[pair], other[pair])


def _slots(elements: frozenset[str]) -> np.ndarray:
    """(len,) uint16 below SLOTS, one for each element."""
    # Differs between processes, but what is decided by it does not.
    hashes = np.fromiter(map(hash, elements), np.int64, len(elements))
    return (hashes & (SLOTS - 1)).astype(np.uint16)


def _shared_slots(
    left: list[np.ndarray],
    right: list[np.ndarray],
    left_sizes: np.ndarray,
    right_sizes: np.ndarray,
) -> np.ndarray:
    """(m,) elements of each right array whose slot some element of its left array has."""
    table = np.zeros((len(left), SLOTS), bool)
    pairs = np.arange(len(left))
    table[np.repeat(pairs, left_sizes), np.concatenate(left)] = True
    found = table[np.repeat(pairs, right_sizes), np.concatenate(right)]
    starts = np.concatenate([[0], np.cumsum(right_sizes)[:-1]])
    return np.add.reduceat(found, starts, dtype=np.int64)


def _fingerprint(elements: frozenset[str]) -> bytes:
    """16 bytes, equal for equal sets."""
    joined = "\n".join(sorted(elements)).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(joined, digest_size=16).digest()


class _Components:
    """Connected components of 0 .. n-1 under joins; label: (n,) equal within a component.

    The smaller component takes the larger one's label: n log n relabellings in all.
    """

    def __init__(self, count: int) -> None:
        self.label = np.arange(count)
        self._members: dict[int, list[int]] = {}

    def join(self, one: int, other: int) -> None:
        """Make the components of two members one."""
        keep, give = int(self.label[one]), int(self.label[other])
        if keep == give:
            return
        kept, given = (self._members.pop(label, [label]) for label in (keep, give))
        if len(kept) < len(given):
            keep, kept, given = give, given, kept
        self.label[given] = keep
        kept += given
        self._members[keep] = kept
