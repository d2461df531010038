"""Score texts without references: how much they repeat each other, and a training corpus.

Words are what white space separates. Orders of n-grams: a text shorter than n words has none.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

BLEU_ORDER = 4
NGram = tuple[str, ...]


def ngrams(text: str, n: int) -> Counter[NGram]:
    """Count the n-grams of words of a text."""
    words = text.split()
    return Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1))


def self_bleu(texts: Sequence[str]) -> list[float]:
    """Score every text by BLEU-4 against all other texts as references -> one value a text, 0 to 1.

    Zhu et al. 2018 (Texygen). Counts are clipped by the largest count of any other text, the
    brevity penalty is that of the other text nearest in length, orders without n-grams are left
    out, and an order without a match counts 1 / 2^k, as sacreBLEU's exponential smoothing does.
    The result depends on the number of texts: compare equal numbers only.
    Raises ValueError for fewer than two texts.
    """
    if len(texts) < 2:
        raise ValueError(f"self-BLEU of {len(texts)} texts: give at least two")
    # The largest two counts of every n-gram tell the largest one among the others.
    counted = [[ngrams(text, n) for n in range(1, BLEU_ORDER + 1)] for text in texts]
    tops: list[dict[NGram, tuple[int, int]]] = [{} for _ in range(BLEU_ORDER)]
    for orders in counted:
        for top, counts in zip(tops, orders, strict=True):
            for gram, count in counts.items():
                first, second = top.get(gram, (0, 0))
                top[gram] = (max(first, count), max(second, min(first, count)))
    # Each text is scored against what the others hold.
    lengths = Counter(len(text.split()) for text in texts)
    return [
        _bleu(orders, tops, _nearest(lengths, len(text.split())), len(text.split()))
        for text, orders in zip(texts, counted, strict=True)
    ]


def _bleu(
    orders: Sequence[Counter[NGram]],
    tops: Sequence[dict[NGram, tuple[int, int]]],
    reference_length: int,
    length: int,
) -> float:
    """Return the BLEU of one text.

    orders: its n-grams of each order.
    tops: largest and second largest count of every n-gram over all texts, order by order.
    reference_length: words of the other text nearest in length.
    length: its words.
    """
    logs, smoothing, matches = [], 1.0, 0
    for top, counts in zip(tops, orders, strict=True):
        total = counts.total()
        if not total:
            continue
        # Where this text itself has the largest count, the others have at most the second one.
        clipped = 0
        for gram, count in counts.items():
            first, second = top[gram]
            clipped += min(count, second if count == first else first)
        matches += clipped
        if not clipped:
            smoothing *= 2
        logs.append(math.log((clipped or 1 / smoothing) / total))
    # Smoothing helps single orders; a text that shares no word has nothing to smooth.
    if not matches:
        return 0.0
    penalty = min(0.0, 1 - reference_length / length)
    return math.exp(penalty + sum(logs) / len(logs))


def _nearest(lengths: Counter[int], length: int) -> int:
    """Return the length of another text nearest to `length`, the shorter one of two."""
    others = [other for other, count in lengths.items() if count - (other == length) > 0]
    return min(others, key=lambda other: (abs(other - length), other))


def distinct(texts: Iterable[str], n: int) -> float:
    """Return the share of different n-grams among all of the texts; 0 without any.

    Li et al. 2016. Falls with the number of words: compare equal amounts of text only.
    """
    total: Counter[NGram] = Counter()
    for text in texts:
        total.update(ngrams(text, n))
    return len(total) / total.total() if total else 0.0


def seen_shares(texts: Iterable[str], corpus: Iterable[str], n: int) -> list[float]:
    """Return for every text the share of its n-grams that occur in a corpus.

    texts: those shorter than n words are left out. corpus: read once; what is kept of it are the
    n-grams of `texts` that it holds. n: words in an n-gram.
    """
    counted = [counts for text in texts if (counts := ngrams(text, n))]
    wanted: set[NGram] = set().union(*counted) if counted else set()
    # Only n-grams that can be asked for are kept, so that a large corpus needs little memory.
    seen: set[NGram] = set()
    for text in corpus:
        seen |= wanted & ngrams(text, n).keys()
    return [
        sum(count for gram, count in counts.items() if gram in seen) / counts.total()
        for counts in counted
    ]
