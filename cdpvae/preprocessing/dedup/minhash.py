"""MinHash signatures: how similar two texts are, from a few numbers each.

A text is the set of its word 5-grams (Broder 1997). A signature holds, for each of P permutations
of the 32-bit integers, the smallest image of a hash of a shingle; two signatures agree at a
position with probability equal to the Jaccard similarity of the sets. The permutations are those
of datasketch's scheme `affine32`, so that both give the same signature for the same hashes.

Words are runs of letters, digits and underscores in lower case: texts that differ in case,
punctuation or spacing only are the same text. In scripts without spaces between words each
character counts as a word.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np

# Thai and Lao, Myanmar, Khmer, kana, Han.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
_ASCII_WORD = re.compile(r"\w+")
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")

# How many shingles are permuted at a time: half of a core's second-level cache.
BLOCK_SHINGLES = 1 << 15
_MIX = np.uint64(0x9E3779B97F4A7C15)


def words(text: str) -> list[str]:
    """Return the words of a text; in a text without words, what stands between its spaces."""
    lowered = text.lower()
    pattern = _ASCII_WORD if lowered.isascii() else _WORD
    return pattern.findall(lowered) or lowered.split()


def shingles(text: str, shingle_words: int) -> frozenset[str]:
    """Return all runs of `shingle_words` words; a shorter or empty text is one shingle."""
    found = words(text)
    last = max(1, len(found) - shingle_words + 1)
    return frozenset(" ".join(found[at : at + shingle_words]) for at in range(last))


def jaccard(left: frozenset[str], right: frozenset[str]) -> float:
    """Return shared elements over all elements of two sets that are not both empty."""
    shared = len(left & right)
    return shared / (len(left) + len(right) - shared)


class Signer:
    """Signs texts; the signatures do not depend on how texts are cut into batches. Picklable.

    num_permutations: P, numbers in a signature. shingle_words: words in a shingle. seed: of the
    permutations. Raises ValueError for numbers below 1.
    """

    def __init__(self, num_permutations: int, shingle_words: int, seed: int = 1) -> None:
        if num_permutations < 1 or shingle_words < 1:
            raise ValueError(
                f"num_permutations={num_permutations} and shingle_words={shingle_words} must be "
                "at least 1"
            )
        self.num_permutations, self.shingle_words = num_permutations, shingle_words
        # h -> a * h + b mod 2**32 with an odd a is a permutation.
        draw = np.random.RandomState(seed)
        self._a = draw.randint(0, 1 << 31, num_permutations, np.uint32) * np.uint32(2) + np.uint32(
            1
        )
        self._b = draw.randint(0, 1 << 32, num_permutations, np.uint32)

    def signatures(self, texts: Sequence[str]) -> np.ndarray:
        """Return the signatures of n texts, (n, P) uint32."""
        # Words are hashed once for all texts of the call.
        signatures = np.empty((len(texts), self.num_permutations), np.uint32)
        hash_of = _WordHashes()
        at = 0
        for block in self._blocks(texts):
            hashes, starts = self._hashes(block, hash_of)
            self._permute(hashes, starts, signatures[at : at + len(block)])
            at += len(block)
        return signatures

    def hashes(self, text: str) -> np.ndarray:
        """Return the hashes of a text's shingles in order, which are permuted: (S,) uint32."""
        return self._hashes([self._padded(text)], _WordHashes())[0]

    def _blocks(self, texts: Sequence[str]) -> Iterator[list[list[str]]]:
        """Yield the words of consecutive texts, about BLOCK_SHINGLES words at a time."""
        block: list[list[str]] = []
        size = 0
        for text in texts:
            block.append(self._padded(text))
            size += len(block[-1])
            if size >= BLOCK_SHINGLES:
                yield block
                block, size = [], 0
        if block:
            yield block

    def _padded(self, text: str) -> list[str]:
        """Return the words of a text, filled up to the length of a shingle."""
        found = words(text)
        return found + [""] * (self.shingle_words - len(found))

    def _hashes(
        self, block: list[list[str]], hash_of: _WordHashes
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the shingle hashes of all texts, (S,) uint32, and where each text begins, (n,)."""
        # Hash each word once, and each run of words from the hashes of its words.
        lengths = np.fromiter(map(len, block), np.int64, len(block))
        flat = chain.from_iterable(block)
        of_words = np.fromiter(map(hash_of.__getitem__, flat), np.uint64, int(lengths.sum()))
        width = self.shingle_words
        count = len(of_words) - width + 1
        rolled = of_words[:count].copy()
        for offset in range(1, width):
            rolled *= _MIX
            rolled += of_words[offset : offset + count]
        # A run that reaches into the next text belongs to neither text.
        inside = np.ones(count, bool)
        ends = np.cumsum(lengths)
        for offset in range(1, width):
            inside[ends[:-1] - offset] = False
        counts = lengths - width + 1
        return _to_32_bits(rolled[inside]), np.concatenate([[0], np.cumsum(counts)[:-1]])

    def _permute(self, hashes: np.ndarray, starts: np.ndarray, out: np.ndarray) -> None:
        """Fill `out` (n, P) with the smallest image of each text's hashes."""
        # One permutation at a time keeps the images in the cache of a core.
        mixed = _murmur_finalizer(hashes)
        images = np.empty_like(mixed)
        smallest = np.empty((self.num_permutations, len(starts)), np.uint32)
        for number in range(self.num_permutations):
            np.multiply(mixed, self._a[number], out=images)
            np.add(images, self._b[number], out=images)
            np.minimum.reduceat(images, starts, out=smallest[number])
        out[:] = smallest.T


class _WordHashes(dict[str, int]):
    """Maps a word to 64 bits, the same in every process, computed once for each word."""

    def __missing__(self, word: str) -> int:
        digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        self[word] = value = int.from_bytes(digest, "little")
        return value


def _to_32_bits(rolled: np.ndarray) -> np.ndarray:
    """Reduce uint64 to uint32 that depends on every bit."""
    return ((rolled ^ (rolled >> np.uint64(29))) * _MIX >> np.uint64(32)).astype(np.uint32)


def _murmur_finalizer(hashes: np.ndarray) -> np.ndarray:
    """Spread hashes before the affine permutations: MurmurHash3's finalizer, a permutation."""
    mixed = hashes ^ (hashes >> np.uint32(16))
    mixed *= np.uint32(0x85EBCA6B)
    mixed ^= mixed >> np.uint32(13)
    mixed *= np.uint32(0xC2B2AE35)
    return mixed ^ (mixed >> np.uint32(16))
