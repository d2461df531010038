"""Damaged and degenerate text: what no model should learn to write.

The limits are the description's ("no control chars, < 10 repeated chars, < 5 repeated words,
< 30 % special chars"), each read so that it finds damage and leaves layout and code alone:

- Control characters: Unicode's category Cc but for tab, line feed and carriage return, and the
  replacement character, which stands where a decoder failed.
- Repeated characters: the longest run of one letter or digit. Runs of spaces indent, runs of
  `-=_*#.` draw lines and tables: 56 of the 65 runs of ten in the real files are of that kind.
- Repeated words: the share of words in loops, which are five or more repeats of a phrase of up to
  four words one of which has a letter (tables are full of zeros).
- Special characters: the share of characters that are no letter, mark, digit or white space.
  Vowel signs are marks, without which a third of Thai would be special.

Both sides are judged by themselves. Shares of a short text mean nothing, so texts below
MIN_CHARACTERS only answer for control and repeated characters.
"""

from __future__ import annotations

import operator
import re
import unicodedata
from dataclasses import dataclass

from cdpvae.preprocessing.records import Record

DEFAULT_MAX_CONTROL_SHARE = 0.0
DEFAULT_MAX_REPEATED_CHARACTER_RUN = 9
DEFAULT_MAX_REPEATED_WORD_SHARE = 0.0
DEFAULT_MAX_SPECIAL_SHARE = 0.3

MIN_CHARACTERS = 20
MIN_REPEATS = 5
MAX_PHRASE_WORDS = 4

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd]")
_SPECIAL = re.compile(r"[^\w\s]")


@dataclass(frozen=True)
class QualityFilter:
    """Upper bounds, themselves allowed; shares are of 0 to 1."""

    max_control_share: float = DEFAULT_MAX_CONTROL_SHARE
    max_repeated_character_run: int = DEFAULT_MAX_REPEATED_CHARACTER_RUN
    max_repeated_word_share: float = DEFAULT_MAX_REPEATED_WORD_SHARE
    max_special_share: float = DEFAULT_MAX_SPECIAL_SHARE

    def __call__(self, record: Record) -> str | None:
        """None, or the first bound that a side breaks."""
        for text in (record.instruction, record.response):
            reason = self._reason(text)
            if reason is not None:
                return reason
        return None

    def _reason(self, text: str) -> str | None:
        if control_share(text) > self.max_control_share:
            return "control characters"
        if has_character_run(text, self.max_repeated_character_run + 1):
            return "repeated characters"
        if len(text) < MIN_CHARACTERS:
            return None
        if repeated_word_share(text) > self.max_repeated_word_share:
            return "repeated words"
        if special_share(text) > self.max_special_share:
            return "special characters"
        return None


def control_share(text: str) -> float:
    """Control and replacement characters, of all characters."""
    return len(_CONTROL.findall(text)) / len(text) if text else 0.0


def has_character_run(text: str, length: int) -> bool:
    """Whether a letter or digit stands `length` times or more in a row."""
    return re.search(rf"([^\W_])\1{{{length - 1}}}", text) is not None


def repeated_word_share(text: str) -> float:
    """Words in loops, of all words; of the phrase length that gives the most."""
    # What has no letter repeats nothing: a number of its own stands for it.
    words: list[str | int] = [
        word if any(map(str.isalpha, word)) else number
        for number, word in enumerate(text.lower().split())
    ]
    return max(_looping(words, length) for length in range(1, MAX_PHRASE_WORDS + 1)) / max(
        1, len(words)
    )


def _looping(words: list[str | int], length: int) -> int:
    """Words that are in loops of phrases of `length` words."""
    repeats = "".join("01"[same] for same in map(operator.eq, words[length:], words))
    needed = length * (MIN_REPEATS - 1)
    runs = (len(run) for run in repeats.split("0"))
    return sum(run + length for run in runs if run >= needed)


def special_share(text: str) -> float:
    """Characters that are no letter, mark, digit or white space, of all characters."""
    found = _SPECIAL.findall(text)
    if not text.isascii():
        found = [char for char in found if not unicodedata.category(char).startswith("M")]
    return len(found) / len(text) if text else 0.0
