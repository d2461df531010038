"""Damaged and degenerate text: what no model should learn to write.

The limits are the original description's ("no control chars, < 10 repeated chars, < 5 repeated
words, < 30 % special chars"), each read so that it finds damage and leaves layout and code alone:

- Control characters: Unicode's category Cc without tab, line feed and carriage return, and the
  replacement character, which stands where a decoder failed.
- Repeated characters: the longest run of one letter or digit. Runs of spaces indent, runs of
  `-=_*#.` draw lines and tables: 56 of the 65 runs of ten in the real files are of that kind.
- Repeated words: the share of words in loops. A loop is a phrase of up to four words, at least one
  of them with a letter (tables are full of zeros), that stands five or more times in a row.
- Special characters: the share of characters that are no letter, mark, digit or white space.
  Vowel signs are marks, without which a third of Thai would be special.

Each side is judged by itself. Shares of a short text mean nothing, so texts below MIN_CHARACTERS
are judged by control and repeated characters only.
"""

from __future__ import annotations

import operator
import re
import unicodedata
from dataclasses import dataclass

from cdpvae.preprocessing.records import Record

MIN_CHARACTERS = 20
MIN_REPEATS = 5
MAX_PHRASE_WORDS = 4

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd]")
_SPECIAL = re.compile(r"[^\w\s]")


@dataclass(frozen=True)
class QualityFilter:
    """Keeps records within upper bounds, the bounds included; shares are from 0 to 1."""

    max_control_share: float
    max_repeated_character_run: int
    max_repeated_word_share: float
    max_special_share: float

    def __call__(self, record: Record) -> str | None:
        """Return None, or the first bound that a side breaks."""
        for text in (record.instruction, record.response):
            reason = self._reason(text)
            if reason is not None:
                return reason
        return None

    def _reason(self, text: str) -> str | None:
        # Damage counts in texts of any length.
        if control_share(text) > self.max_control_share:
            return "control characters"
        if has_character_run(text, self.max_repeated_character_run + 1):
            return "repeated characters"
        # Shares need some characters to mean anything.
        if len(text) < MIN_CHARACTERS:
            return None
        if repeated_word_share(text) > self.max_repeated_word_share:
            return "repeated words"
        if special_share(text) > self.max_special_share:
            return "special characters"
        return None


def control_share(text: str) -> float:
    """Return the share of control and replacement characters among all characters."""
    return len(_CONTROL.findall(text)) / len(text) if text else 0.0


def has_character_run(text: str, length: int) -> bool:
    """Say whether a letter or digit stands `length` times or more in a row."""
    return re.search(rf"([^\W_])\1{{{length - 1}}}", text) is not None


def repeated_word_share(text: str) -> float:
    """Return the share of words in loops, for the phrase length with the largest share."""
    # A word without letters repeats nothing: a number that occurs once takes its place.
    words: list[str | int] = [
        word if any(map(str.isalpha, word)) else number
        for number, word in enumerate(text.lower().split())
    ]
    return max(_looping(words, length) for length in range(1, MAX_PHRASE_WORDS + 1)) / max(
        1, len(words)
    )


def _looping(words: list[str | int], length: int) -> int:
    """Count the words in loops of phrases of `length` words."""
    # A word that equals the word `length` before it is "1": a loop is a long run of ones.
    repeats = "".join("01"[same] for same in map(operator.eq, words[length:], words))
    needed = length * (MIN_REPEATS - 1)
    runs = (len(run) for run in repeats.split("0"))
    return sum(run + length for run in runs if run >= needed)


def special_share(text: str) -> float:
    """Return the share of characters that are no letter, mark, digit or white space."""
    # Marks are not matched by \w, and are no special characters.
    found = _SPECIAL.findall(text)
    if not text.isascii():
        found = [char for char in found if not unicodedata.category(char).startswith("M")]
    return len(found) / len(text) if text else 0.0
