"""Clusters of duplicates against brute force, on drawn texts and on a real file."""

from __future__ import annotations

import hashlib
import random

import networkx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdpvae.preprocessing.dedup import clusters
from cdpvae.preprocessing.dedup.clusters import (
    EXACT,
    KEPT,
    NEAR,
    Duplicates,
    exact_key,
    find_duplicates,
)
from cdpvae.preprocessing.dedup.minhash import Signer
from cdpvae.preprocessing.formats.convert import convert
from cdpvae.preprocessing.readers.source import Source
from support.overlap import five_grams, pairs_by_brute_force
from support.rows import SHARED

Pairs = list[tuple[str, str]]


def deduplicated(pairs: Pairs, similarity: float = 0.85, near: bool = True) -> Duplicates:
    texts = ["\n".join(pair) for pair in pairs]
    return find_duplicates(
        [exact_key(*pair) for pair in pairs],
        Signer(128, 5).signatures(texts) if near else None,
        texts.__getitem__,
        similarity=similarity,
        shingle_words=5,
    )


def expected_clusters(pairs: Pairs, similarity: float = 0.85) -> list[int]:
    """The first record of each one's connected component, by comparing all with all."""
    texts = ["\n".join(pair) for pair in pairs]
    graph = networkx.Graph()
    graph.add_nodes_from(range(len(texts)))
    graph.add_edges_from(pairs_by_brute_force([five_grams(text) for text in texts], similarity))
    first = [0] * len(texts)
    for component in networkx.connected_components(graph):
        for node in component:
            first[node] = min(component)
    return first


def test_exact_key_is_the_md5_of_the_description():
    assert exact_key("ask ü", "reply") == hashlib.md5("ask ü\nreply".encode()).digest()
    exact_key("a lone surrogate \ud800", "")  # JSON can hold one


def test_the_first_of_equal_records_stays():
    found = deduplicated([("a", "b"), ("a", "c"), ("a", "b"), ("A", "b"), ("a", "c")], near=False)
    assert found.kind.tolist() == [KEPT, KEPT, EXACT, KEPT, EXACT]
    assert found.keeper.tolist() == found.cluster.tolist() == [0, 1, 0, 3, 1]


def test_exact_and_near_are_told_apart():
    base = " ".join(f"word{i}" for i in range(60))
    pairs = [("q", base), ("q", base), ("Q!", base), ("q", base + " more"), ("other", "text")]
    found = deduplicated(pairs)
    assert found.kind.tolist() == [KEPT, EXACT, NEAR, NEAR, KEPT]
    assert found.cluster.tolist() == [0, 0, 0, 0, 4]


def test_an_exact_duplicate_of_a_near_duplicate_names_the_record_that_stays():
    base = " ".join(f"word{i}" for i in range(60))
    found = deduplicated([("q", base), ("q", base + " more"), ("q", base + " more")])
    assert found.kind.tolist() == [KEPT, NEAR, EXACT]
    assert found.keeper.tolist() == [0, 0, 0]


def test_nothing_and_one():
    for pairs in ([], [("a", "b")]):
        assert deduplicated(pairs).kind.tolist() == [KEPT] * len(pairs)


@st.composite
def families(draw) -> Pairs:
    """Texts and chains of their edits: a cluster's ends need not be alike."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    pairs: Pairs = []
    for _ in range(draw(st.integers(1, 6))):
        words = [f"w{rng.randrange(50)}" for _ in range(rng.randrange(3, 60))]
        for _ in range(rng.randrange(1, 8)):
            pairs.append((" ".join(words[:3]), " ".join(words[3:])))
            for _ in range(rng.randrange(3)):
                words[rng.randrange(len(words))] = f"w{rng.randrange(50)}"
    rng.shuffle(pairs)
    return pairs


@given(families(), st.sampled_from([0.6, 0.85]))
@settings(deadline=None, max_examples=60)
def test_clusters_are_those_of_brute_force(pairs, similarity):
    assert deduplicated(pairs, similarity).cluster.tolist() == expected_clusters(pairs, similarity)


@given(families(), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_order_changes_the_record_that_stays_and_nothing_else(pairs, rng):
    order = list(range(len(pairs)))
    rng.shuffle(order)

    def partition(cluster: np.ndarray, names: list[int]) -> set[frozenset[int]]:
        groups: dict[int, set[int]] = {}
        for label, name in zip(cluster.tolist(), names, strict=True):
            groups.setdefault(label, set()).add(name)
        return set(map(frozenset, groups.values()))

    straight = deduplicated(pairs)
    shuffled = deduplicated([pairs[i] for i in order])
    assert partition(straight.cluster, list(range(len(pairs)))) == partition(
        shuffled.cluster, order
    )
    assert (straight.kind == KEPT).sum() == (shuffled.kind == KEPT).sum()
    assert (straight.cluster <= np.arange(len(pairs))).all(), "the first record stays"


@given(families())
@settings(deadline=None, max_examples=60)
def test_what_is_left_has_no_duplicates(pairs):
    kept = [pair for pair, kind in zip(pairs, deduplicated(pairs).kind, strict=True) if not kind]
    assert (deduplicated(kept).kind == KEPT).all()


def test_texts_of_equal_shingles_are_compared_once_each(monkeypatch):
    """3,000 records that differ in punctuation: 4.5 million pairs, none of which is looked at."""
    base = " ".join(f"word{i}" for i in range(40))
    pairs = [
        ("q", base.replace(" ", " " * (1 + n % 7) + "." * (n // 7) + " ")) for n in range(3000)
    ]
    assert len(set(pairs)) == 3000
    monkeypatch.setattr(clusters, "jaccard", None)
    found = deduplicated(pairs)
    assert (found.cluster == 0).all() and (found.kind[1:] == NEAR).all()


def test_one_template_many_times(monkeypatch):
    """2,000 letters that differ in a name: one cluster, from a few comparisons a text."""
    rng = random.Random(0)
    body = " ".join(f"word{i}" for i in range(120))
    pairs = [("write", f"Dear name{rng.randrange(10**9)} {body}") for _ in range(2000)]
    asked = 0

    def counted(left: frozenset[str], right: frozenset[str]) -> float:
        nonlocal asked
        asked += 1
        return jaccard(left, right)

    jaccard = clusters.jaccard
    monkeypatch.setattr(clusters, "jaccard", counted)
    found = deduplicated(pairs)
    assert (found.cluster == 0).all()
    assert asked < 3 * len(pairs)


def test_too_few_permutations_are_refused():
    with pytest.raises(ValueError, match="num_permutations=16"):
        find_duplicates(
            [exact_key("a", "b"), exact_key("c", "d")],
            Signer(16, 5).signatures(["a", "c"]),
            ["a", "c"].__getitem__,
            similarity=0.4,
            shingle_words=5,
        )


def test_recall_and_precision_on_a_real_file():
    """Every row with a partner at 0.85, none without: against all pairs of the file."""
    path = SHARED / "gpteacher" / "toolformer-dedupe-only-dataset.json"
    if not path.exists():
        pytest.skip(f"{path} is missing: real data lies beside the repository, not in it")
    examples = [convert(raw.value)[0] for raw in Source.parse(str(path)).records()]
    pairs = [(example.instruction, example.response) for example in examples]
    found = deduplicated(pairs)
    size = np.bincount(found.cluster, minlength=len(pairs))
    rows = set(np.flatnonzero(size[found.cluster] > 1).tolist())
    grams = [five_grams("\n".join(pair)) for pair in pairs]
    expected = pairs_by_brute_force(grams, 0.85)
    assert rows == {row for pair in expected for row in pair}
    assert len(rows) == 357 and len({later for _, later in expected}) == 202
    assert (found.kind == EXACT).sum() == 0 and (found.kind == NEAR).sum() == 205
