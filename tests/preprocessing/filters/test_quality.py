"""Each bound of the quality filter: what breaks it, and what looks like it and is in order."""

from __future__ import annotations

import pytest

from cdpvae.config import DataConfig
from cdpvae.preprocessing.filters.quality import (
    QualityFilter,
    control_share,
    has_character_run,
    repeated_word_share,
    special_share,
)
from cdpvae.preprocessing.records import Record

FINE = "A plain sentence of a dozen words that has nothing wrong with it."
TABLE = "year and month | sum of all\n--------------\n1990 in winter | 0 0 0 0 0 0 0"
PROGRAM = (
    "def norm(v):\n            # ==============\n            return sum(x * x for x in v) ** 0.5"
)


BOUNDS = {
    name: getattr(DataConfig(), name)
    for name in (
        "max_control_share",
        "max_repeated_character_run",
        "max_repeated_word_share",
        "max_special_share",
    )
}


def reason(text: str, **bounds) -> str | None:
    """On either side the same; the bounds of the default settings unless given."""
    keep = QualityFilter(**{**BOUNDS, **bounds})
    found = {keep(Record(0, 1, None, *sides, [], [])) for sides in ((text, FINE), (FINE, text))}
    assert len(found) == 1
    return found.pop()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (FINE, None),
        (FINE + "\x00", "control characters"),
        (FINE + "\x1b[0m", "control characters"),
        (FINE + "\ufffd", "control characters"),
        (FINE.replace(" ", "\t") + "\r\n", None),  # layout
        ("so g" + "o" * 9 + "d, he said to her", None),
        ("so g" + "o" * 10 + "d, he said to her", "repeated characters"),
        ("1000000000 is a number of ten digits", None),
        ("10000000000 is a number with ten zeros", "repeated characters"),
        ("-" * 12 + " a line below a heading that is long enough to be one", None),
        ("              indented by fourteen spaces", None),
        ("ha ha ha ha and that was all he had to say", None),  # four
        ("ha ha ha ha ha and that was all he had to say", "repeated words"),
        ("I do not know. " * 5 + "What a day it was", "repeated words"),  # a phrase of four words
        (TABLE, None),  # zeros in a row are numbers of a table
        ("$%&/()=?!§ $%&/()=?!§ and no more", "special characters"),
        (PROGRAM, None),
        ("สวัสดีครับ ผมชื่อสมชาย ผมมาจากกรุงเทพฯ", None),  # vowel signs are marks
        ("?!?!?!", None),  # too short for a share
        ("", None),
    ],
)
def test_texts(text, expected):
    assert reason(text) == expected


def test_bounds_are_settings():
    text = "so g" + "o" * 10 + "d " + "ha " * 6 + "%%%%%%%%%%%%%%%%%%%%\x00"
    loose = {
        "max_control_share": 1.0,
        "max_repeated_character_run": 10,
        "max_repeated_word_share": 1.0,
        "max_special_share": 1.0,
    }
    assert reason(text, **loose) is None
    for name, expected in (
        ("max_control_share", "control characters"),
        ("max_repeated_character_run", "repeated characters"),
        ("max_repeated_word_share", "repeated words"),
        ("max_special_share", "special characters"),
    ):
        assert reason(text, **{**loose, name: BOUNDS[name]}) == expected


def test_shares():
    assert control_share("ab\x00\x01") == 0.5
    assert special_share("ab, c!") == pytest.approx(2 / 6)
    assert repeated_word_share("a a a a a b c d e f") == 0.5
    assert repeated_word_share("a b a b a b a b a b") == 1.0
    assert repeated_word_share("a b a b a b a b") == 0.0  # four times
    for share in (control_share, special_share, repeated_word_share):
        assert share("") == 0.0
    assert has_character_run("aaa", 3) and not has_character_run("aa_a", 3)
    assert not has_character_run("_" * 20, 3)
