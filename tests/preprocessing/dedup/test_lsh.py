"""Candidate pairs: which ones must come, and how many may."""

from __future__ import annotations

import numpy as np
import pytest

from cdpvae.preprocessing.dedup import lsh
from cdpvae.preprocessing.dedup.lsh import band_shape, candidate_rounds, least_agreement


def all_pairs(signatures: np.ndarray, similarity: float, wanted=None) -> list[tuple[int, int]]:
    """Every pair that comes, the smaller number first."""
    wanted = wanted or (lambda left, right: np.ones(len(left), bool))
    rounds = candidate_rounds(signatures, np.arange(len(signatures)), similarity, wanted)
    return [
        (min(a, b), max(a, b))
        for left, right in rounds
        for a, b in zip(left.tolist(), right.tolist(), strict=True)
    ]


def related(rng: np.random.Generator, count: int, similarity: float, positions: int) -> np.ndarray:
    """(2 * count, positions): row 2 i + 1 agrees with row 2 i where a coin of `similarity` says."""
    first = rng.integers(0, 2**32, (count, positions), np.uint32)
    other = rng.integers(0, 2**32, (count, positions), np.uint32)
    second = np.where(rng.random((count, positions)) < similarity, first, other)
    return np.stack([first, second], axis=1).reshape(2 * count, positions)


@pytest.mark.parametrize(
    ("permutations", "similarity"), [(128, 0.85), (128, 0.5), (256, 0.85), (16, 0.95)]
)
def test_shape_misses_one_in_a_million_and_no_shape_of_more_rows_does(permutations, similarity):
    bands, rows = band_shape(permutations, similarity)
    assert bands * rows <= permutations
    assert (1 - similarity**rows) ** bands <= 1e-6
    more = rows + 1
    assert (1 - similarity**more) ** (permutations // more) > 1e-6


def test_the_usual_shape_is_much_finer_than_the_threshold():
    """datasketch takes 8 bands of 16 at a threshold of 0.85, and misses every second pair."""
    assert band_shape(128, 0.85) == (25, 5)
    assert (1 - 0.85**16) ** 8 > 0.5


def test_too_few_numbers_for_a_low_similarity():
    with pytest.raises(ValueError, match="num_permutations=16 .* similarity=0.3 .* raise one"):
        band_shape(16, 0.3)


@pytest.mark.parametrize("similarity", [0.5, 0.85, 1.0])
def test_least_agreement_is_a_binomial_quantile(similarity):
    from scipy.stats import binom

    least = least_agreement(128, similarity)
    assert binom.cdf(least - 1, 128, similarity) <= 1e-6 * (1 + 1e-9)
    assert similarity == 1 or binom.cdf(least, 128, similarity) > 1e-6 * (1 - 1e-9)


def test_similar_pairs_come_and_unlike_ones_do_not():
    rng = np.random.default_rng(0)
    similar = related(rng, 2000, 0.85, 128)
    found = all_pairs(similar, 0.85)
    assert len(found) == len(set(found)), "no pair twice"
    partners = {(2 * i, 2 * i + 1) for i in range(2000)}
    assert partners <= set(found), "one in a million may be missed, none of 2,000"
    assert len(found) < 1.01 * len(partners)
    unlike = related(rng, 2000, 0.4, 128)
    assert len(all_pairs(unlike, 0.85)) < 5


def test_which_pairs_come_does_not_depend_on_the_order_of_equal_rows():
    rng = np.random.default_rng(1)
    signatures = related(rng, 300, 0.9, 128)
    found = set(all_pairs(signatures, 0.85))
    order = rng.permutation(len(signatures))
    back = {
        tuple(sorted((int(order[a]), int(order[b])))) for a, b in all_pairs(signatures[order], 0.85)
    }
    assert back == found


def test_a_large_bucket_gives_a_bounded_number_of_pairs():
    """5,000 texts that all collide in every band: 12 million pairs, of which each text meets
    NEIGHBOURS in a band, until they are connected."""
    signatures = np.tile(np.arange(128, dtype=np.uint32), (5000, 1))
    asked = 0

    def nothing(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        nonlocal asked
        asked += len(left)
        return np.zeros(len(left), bool)

    assert all_pairs(signatures, 0.85, nothing) == []
    bands, _ = band_shape(128, 0.85)
    assert asked <= bands * lsh.NEIGHBOURS * 5000


def test_neighbours_in_a_large_bucket_are_the_most_alike():
    """A bucket of 2,000 texts of one template with pairs hidden in it: each pair still meets."""
    rng = np.random.default_rng(2)
    template = rng.integers(0, 2**32, 128, np.uint32)
    count = 1000
    own = related(rng, count, 0.97, 128)
    # Half of all positions are the template's, so that every band collides for many texts.
    common = rng.random((2 * count, 128)) < 0.5
    common[1::2] = common[::2]
    signatures = np.where(common, template, own)
    found = set(all_pairs(signatures, 0.85))
    partners = {(2 * i, 2 * i + 1) for i in range(count)}
    assert len(partners & found) >= 0.999 * count
