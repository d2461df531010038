"""Scores of texts whose scores can be worked out by hand."""

import math

import pytest

from cdpvae.metrics import ReconstructionMetrics


def score(hypotheses, references, *ids):
    metrics = ReconstructionMetrics()
    metrics.update(hypotheses, references, *ids)
    return metrics.compute()


def test_equal_texts():
    text = "the cat sat on the red mat today"
    result = score([text, text], [text, text], [[1, 2]] * 2, [[1, 2]] * 2)
    assert result.bleu4 == 1.0
    assert (result.rouge_l, result.exact_match, result.token_accuracy) == (1.0, 1.0, 1.0)
    assert "tok:13a" in result.signature and "version:" in result.signature
    assert result.texts == 2


def test_bleu_is_that_of_the_corpus():
    """One word in eight differs in the first text; the second is equal.

    Matches of 1- to 4-grams: 15/16, 12/14, 9/12, 6/10 (the wrong word spoils 1, 2, 3, 4 n-grams).
    """
    equal = "one two three four five six seven eight"
    result = score([equal.replace("four", "FOUR"), equal], [equal, equal])
    precisions = [15 / 16, 12 / 14, 9 / 12, 6 / 10]
    assert result.bleu4 == pytest.approx(math.prod(precisions) ** 0.25)
    assert result.exact_match == 0.5


def test_bleu_punishes_short_hypotheses():
    reference = "one two three four five six seven eight"
    result = score(["one two three four"], [reference])
    assert result.bleu4 == pytest.approx(math.exp(1 - 8 / 4))


def test_rouge_l_is_the_mean_f1_of_the_longest_common_subsequence():
    """LCS "a c" of 3 and 4 words: P 2/3, R 2/4, F1 4/7; nothing in common: 0."""
    result = score(["a x c", "q"], ["a b c d", "r"])
    assert result.rouge_l == pytest.approx((4 / 7 + 0) / 2)


def test_token_accuracy_is_by_position_over_the_reference():
    """2 of 4, then 1 of 1 with a tail that costs nothing: 3/5. A shifted text matches nowhere."""
    result = score(["", ""], ["a", "b"], [[5, 6, 9], [3, 8, 8]], [[5, 6, 7, 8], [3]])
    assert result.token_accuracy == pytest.approx(3 / 5)
    shifted = score([""], ["a"], [[2, 3, 4]], [[1, 2, 3]])
    assert shifted.token_accuracy == 0.0


def test_updates_add_up_to_one_corpus():
    hypotheses = ["one two three four five", "a b c d e f"]
    references = ["one two three four six", "a b c d e f"]
    ids = ([[1, 2, 3], [4]], [[1, 2, 9], [4]])
    metrics = ReconstructionMetrics()
    for i in range(2):
        metrics.update(hypotheses[i : i + 1], references[i : i + 1], *(x[i : i + 1] for x in ids))
    assert metrics.compute() == score(hypotheses, references, *ids)


def test_without_ids_there_is_no_token_accuracy():
    assert score(["a"], ["a"]).token_accuracy is None


def test_lists_of_different_lengths_and_no_text_are_refused():
    metrics = ReconstructionMetrics()
    with pytest.raises(ValueError, match=r"\[1, 2\]"):
        metrics.update(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="update"):
        metrics.compute()


def test_ids_of_one_side_only_are_refused():
    metrics = ReconstructionMetrics()
    with pytest.raises(ValueError, match="reference_ids is None"):
        metrics.update(["a"], ["a"], [[1]])
    with pytest.raises(ValueError, match="hypothesis_ids is None"):
        metrics.update(["a"], ["a"], None, [[1]])


def test_rouge_l_does_not_stem():
    assert score(["he jumps"], ["he jumping"]).rouge_l == pytest.approx(0.5)
