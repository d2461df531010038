"""Repetition of texts, on texts whose scores are known."""

from __future__ import annotations

import pytest
from sacrebleu.metrics import BLEU

from cdpvae.metrics import distinct, seen_shares, self_bleu

TEXTS = [
    "the red house stands by the river and the road",
    "the red house stands near the river",
    "a horse runs by the river and the garden",
    "nothing is shared here at all",
    "the the the the house",
]


def test_equal_texts_have_a_self_bleu_of_one():
    assert self_bleu(["one two three four five"] * 3) == pytest.approx([1.0] * 3)


def test_texts_without_a_common_word_have_none():
    assert self_bleu(["a b c d e", "f g h i j", ""]) == [0.0, 0.0, 0.0]


def test_self_bleu_is_that_of_sacrebleu_against_all_others():
    bleu = BLEU(tokenize="none", effective_order=True)
    expected = [
        bleu.sentence_score(text, [other for o, other in enumerate(TEXTS) if o != t]).score / 100
        for t, text in enumerate(TEXTS)
    ]
    assert self_bleu(TEXTS) == pytest.approx(expected, abs=1e-9)


def test_self_bleu_needs_another_text():
    with pytest.raises(ValueError, match="at least two"):
        self_bleu(["alone"])


def test_distinct_counts_exactly():
    # Words: a b a b c; pairs: ab ba ab, and none in "c".
    texts = ["a b a b", "c"]
    assert distinct(texts, 1) == 3 / 5
    assert distinct(texts, 2) == 2 / 3
    assert distinct(texts, 5) == 0.0


def test_seen_ngrams_count_exactly_and_short_texts_are_left_out():
    texts = ["a b c d e f", "a b c d", "x y"]
    # Of abcd, bcde, cdef the corpus holds the first two; n-grams do not cross its texts.
    assert seen_shares(texts, ["a b c d e", "d e f"], 4) == [2 / 3, 1.0]
    assert seen_shares(texts, [], 4) == [0.0, 0.0]
