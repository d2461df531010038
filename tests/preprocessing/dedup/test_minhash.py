"""Shingles and signatures, against datasketch and against what MinHash promises."""

from __future__ import annotations

import numpy as np
import pytest
from datasketch import MinHash
from hypothesis import given, settings
from hypothesis import strategies as st

from cdpvae.preprocessing.dedup.minhash import Signer, jaccard, shingles, words

TEXTS = st.lists(
    st.sampled_from("alpha Beta gamma 1,000 Änderung 東京 \n -".split(" ")), max_size=30
)


SIGNATURE = [
    *(181289469, 91630856, 23951253, 532421790),
    *(331339007, 750546351, 137979096, 66145086),
]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't  STOP_me, now!", ["don", "t", "stop_me", "now"]),
        ("Ärger über 3 Äpfel", ["ärger", "über", "3", "äpfel"]),
        ("東京で会う", list("東京で会う")),  # no spaces between words: character by character
        ("GPU版の試験", ["gpu", *"版の試験"]),
        ("ภาษา", list("ภาษา")),
        ("한국어 문장", ["한국어", "문장"]),  # Korean has spaces
        ("+++ --- ???", ["+++", "---", "???"]),  # no word at all: what stands between spaces
        ("", []),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


def test_shingles_are_the_runs_of_words():
    assert shingles("a b c d e f", 5) == {"a b c d e", "b c d e f"}
    assert shingles("a b a b a b a b", 2) == {"a b", "b a"}  # a set
    assert shingles("a b c", 5) == {"a b c"}  # a short text is one
    assert shingles("", 5) == {""}


def test_punctuation_case_and_spacing_make_no_difference():
    assert shingles("The cat,\n sat: on THE mat", 3) == shingles("the cat sat on the mat.", 3)


def test_jaccard():
    left, right = frozenset("abc"), frozenset("bcd")
    assert jaccard(left, right) == 0.5
    assert jaccard(left, left) == 1.0


@pytest.mark.parametrize(("permutations", "seed"), [(128, 1), (16, 7)])
def test_signatures_are_those_of_datasketch(permutations, seed):
    """The same hashes of shingles under the library's permutations; its scheme is `affine32`."""
    texts = ["one two three four five six seven", "short", "x " * 400, "", "one two three four"]
    signer = Signer(permutations, 3, seed=seed)
    found = signer.signatures(texts)
    for text, signature in zip(texts, found, strict=True):
        theirs = MinHash(permutations, seed=seed, hashfunc=lambda h: h, scheme="affine32")
        theirs.update_batch(signer.hashes(text).tolist())
        assert signature.tolist() == theirs.hashvalues.tolist()


def test_signatures_are_the_same_everywhere_and_always():
    """Numbers that were written to disk once: they must not depend on the process or a release."""
    signature = Signer(8, 5).signatures(["What is the capital of France? It is Paris."])
    assert signature.dtype == np.uint32
    assert signature.tolist() == [SIGNATURE]


@given(st.lists(TEXTS.map(" ".join), min_size=1, max_size=12), st.data())
@settings(deadline=None)
def test_batches_do_not_matter(texts, data):
    """Cut anywhere, in any order, each text has its signature; equal shingles have equal ones."""
    signer = Signer(16, 3)
    whole = signer.signatures(texts)
    cut = data.draw(st.integers(0, len(texts)))
    parts = [signer.signatures(part) for part in (texts[:cut], texts[cut:])]
    assert np.array_equal(np.concatenate(parts), whole)
    order = data.draw(st.permutations(range(len(texts))))
    assert np.array_equal(signer.signatures([texts[i] for i in order]), whole[list(order)])
    for i, one in enumerate(texts):
        for j, other in enumerate(texts[:i]):
            if shingles(one, 3) == shingles(other, 3):
                assert np.array_equal(whole[i], whole[j])


def test_a_block_larger_than_the_cache_changes_nothing(monkeypatch):
    texts = [" ".join(f"w{i * j % 97}" for j in range(60)) for i in range(50)]
    whole = Signer(32, 5).signatures(texts)
    monkeypatch.setattr("cdpvae.preprocessing.dedup.minhash.BLOCK_SHINGLES", 100)
    assert np.array_equal(Signer(32, 5).signatures(texts), whole)


@pytest.mark.parametrize("similarity", [0.2, 0.5, 0.85])
def test_agreement_estimates_jaccard(similarity):
    """P(two positions agree) = Jaccard: over 64 pairs of 128 positions, within four deviations."""
    rng = np.random.default_rng(3)
    signer, union = Signer(128, 1), 400
    shared = round(similarity * union)
    agreed = []
    for pair in range(64):
        names = [f"w{pair}x{n}" for n in rng.permutation(union)]
        rest = union - shared
        left = names[: shared + rest // 2]
        right = names[:shared] + names[shared + rest // 2 :]
        assert jaccard(frozenset(left), frozenset(right)) == pytest.approx(similarity)
        one, other = signer.signatures([" ".join(left), " ".join(right)])
        agreed.append(np.mean(one == other))
    deviation = (similarity * (1 - similarity) / (64 * 128)) ** 0.5
    assert abs(np.mean(agreed) - similarity) < 4 * deviation


@pytest.mark.parametrize(("permutations", "width"), [(0, 5), (128, 0)])
def test_sizes_are_checked(permutations, width):
    with pytest.raises(ValueError, match=f"{permutations}.*{width}.*at least 1"):
        Signer(permutations, width)
