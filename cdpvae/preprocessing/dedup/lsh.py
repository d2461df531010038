"""Locality-sensitive hashing: pairs of signatures that may be similar, without comparing all.

A signature is cut into `bands` of `rows` numbers; two signatures that agree in all numbers of some
band are proposed as a pair. A pair of similarity s is missed with probability (1 - s**rows)**bands:

    128 numbers     missed at 0.85     proposed at 0.5      at 0.3
    8 x 16          0.54               0.0001               0.0000
    16 x 8          0.006              0.06                 0.001
    25 x 5          0.0000004          0.55                 0.06

`datasketch.MinHashLSH(threshold=0.85)` uses the first shape, its `threshold=0.5` the last. Proposed
pairs are verified, so that only a missed pair is an error: `band_shape` takes the fewest bands that
miss at most one pair in a million.

Buckets are found by sorting, which costs n log n and 8 bytes a record whatever the data. A bucket
of m texts holds m * (m - 1) / 2 pairs, too many when 100,000 texts follow one template: the texts
of a bucket are sorted by further rows of their signatures, and each is paired with the next
NEIGHBOURS texts only. That loses nothing in buckets up to NEIGHBOURS + 1; in larger buckets, texts
that agree in most rows stand together, in another order for every band.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

# Share of the pairs at `similarity` that may be missed.
MISSED = 1e-6
# How many of the texts after it, in its bucket, a text is paired with.
NEIGHBOURS = 64
# Further rows by which a large bucket is sorted: 0.5**16 leaves two texts of 100,000.
SORTED_ROWS = 16
# Pairs whose signatures are compared at a time: 32 MiB a side at 128 numbers.
PAIRS_AT_A_TIME = 1 << 16
_MIX = np.uint64(0x9E3779B97F4A7C15)


def band_shape(num_permutations: int, similarity: float) -> tuple[int, int]:
    """Return (bands, rows) with the most rows that miss at most one pair in a million.

    similarity: that of the pairs. Raises ValueError when even bands of single rows miss more.
    """
    for rows in range(num_permutations, 0, -1):
        bands = num_permutations // rows
        missed = (1 - similarity**rows) ** bands
        if missed <= MISSED:
            return bands, rows
    raise ValueError(
        f"num_permutations={num_permutations} misses pairs at similarity={similarity} with "
        f"probability {missed:.2g}, more than {MISSED:g}; raise one of them"
    )


def least_agreement(num_permutations: int, similarity: float) -> int:
    """Return in how many numbers all but one in a million pairs of this similarity agree at least.

    The number is binomial with `num_permutations` trials.
    """
    # Sum up the distribution until less than that is left out.
    total = 0.0
    for agreeing in range(num_permutations + 1):
        total += _binomial(num_permutations, agreeing, similarity)
        if total > MISSED:
            return agreeing
    return num_permutations


def _binomial(trials: int, hits: int, probability: float) -> float:
    """Return the probability of so many hits. Logarithms keep large factorials finite."""
    if probability >= 1:
        return float(hits == trials)
    logarithm = math.lgamma(trials + 1) - math.lgamma(hits + 1) - math.lgamma(trials - hits + 1)
    logarithm += hits * math.log(probability) + (trials - hits) * math.log1p(-probability)
    return math.exp(logarithm)


def candidate_rounds(
    signatures: np.ndarray,
    rows_of: np.ndarray,
    similarity: float,
    wanted: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield rounds of pairs that may be similar: two (m,) arrays of indices into `rows_of`.

    signatures (n, P): uint32.
    rows_of (d,): the rows of `signatures` that are compared.
    similarity: Jaccard similarity that the pairs may have.
    wanted: says which pairs (left (m,), right (m,)) are of use, (m,) bool; asked before a round.

    Apart from `wanted`, the pairs depend on the signatures in `rows_of` and their order alone. No
    pair comes twice, except pairs in large buckets.
    Raises ValueError when the signatures are too short for `similarity`.
    """
    bands, rows = band_shape(signatures.shape[1], similarity)
    least = least_agreement(signatures.shape[1], similarity)
    # Texts whose bucket was compared in full, by band.
    in_full = np.zeros((bands, len(rows_of)), bool)
    for band in range(bands):
        order, bucket, size = _buckets(signatures, rows_of, band * rows, rows)
        # Pair each text with the text `offset` places after it in its bucket.
        for offset in range(1, NEIGHBOURS + 1):
            same = np.flatnonzero(bucket[offset:] == bucket[:-offset])
            if not len(same):
                break
            left, right = order[same], order[same + offset]
            useful = wanted(left, right)
            left, right = left[useful], right[useful]
            # Propose those that agree often enough, and that no earlier band has proposed.
            for at in range(0, len(left), PAIRS_AT_A_TIME):
                one, other = left[at : at + PAIRS_AT_A_TIME], right[at : at + PAIRS_AT_A_TIME]
                equal = signatures[rows_of[one]] == signatures[rows_of[other]]
                likely = np.count_nonzero(equal, axis=1) >= least
                if band:
                    before = equal[:, : band * rows].reshape(-1, band, rows).all(axis=2)
                    likely &= ~np.any(before & in_full[:band, one].T, axis=1)
                yield one[likely], other[likely]
        in_full[band, order[size <= NEIGHBOURS + 1]] = True


def _buckets(
    signatures: np.ndarray, rows_of: np.ndarray, first: int, rows: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the texts in buckets of two or more, bucket by bucket.

    signatures (n, P): uint32.
    rows_of (d,): the rows of `signatures` that are compared.
    first: the first number of the band in a signature.
    rows: how many numbers the band has.

    Returns three (m,) arrays: index into `rows_of`, number of the bucket, size of the bucket.
    """
    # Texts with equal numbers in the band stand together after sorting.
    code = hash_columns(signatures, rows_of, range(first, first + rows))
    order = np.argsort(code, kind="stable")
    bucket = np.concatenate([[0], np.cumsum(code[order][1:] != code[order][:-1])])
    size = np.bincount(bucket)[bucket]
    order, bucket, size = order[size > 1], bucket[size > 1], size[size > 1]
    # Sort large buckets by further numbers, so that similar texts are neighbours.
    large = np.flatnonzero(size > NEIGHBOURS + 1)
    if len(large):
        count = signatures.shape[1]
        further = [
            signatures[rows_of[order[large]], (first + rows + step) % count]
            for step in range(min(SORTED_ROWS, count - rows))
        ]
        # lexsort counts the last key first; equal texts keep their order.
        order[large] = order[large][np.lexsort([*reversed(further), bucket[large]])]
    return order, bucket, size


def hash_columns(signatures: np.ndarray, rows_of: np.ndarray, columns: range) -> np.ndarray:
    """Hash some columns of each text to (d,) uint64. A collision costs a comparison, no more."""
    code = np.zeros(len(rows_of), np.uint64)
    for column in columns:
        code ^= signatures[rows_of, column]
        code *= _MIX
        code ^= code >> np.uint64(32)
    return code
