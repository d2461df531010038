"""The language filter on texts whose language is plain to see, and on code."""

from __future__ import annotations

import shutil

import pytest

from cdpvae.preprocessing.filters import language
from cdpvae.preprocessing.filters.language import (
    UNKNOWN,
    LanguageFilter,
    detect_language,
    model_path,
    without_code,
)
from cdpvae.preprocessing.records import Record

ENGLISH = "The committee met on Tuesday and agreed on a budget for the coming year."
GERMAN = "Der Ausschuss tagte am Dienstag und einigte sich auf einen Haushalt für das neue Jahr."
CHINESE = "委员会星期二开会，就明年的预算达成了一致意见。"
CODE = "for i in range(10):\n    total += values[i] ** 2\nprint(total)"


def judged(instruction: str, response: str, **settings) -> str | None:
    settings = {"languages": ("en",), "min_score": 0.8, "model": None, **settings}
    return LanguageFilter(**settings)(Record(0, 1, None, instruction, response, [], []))


@pytest.mark.parametrize(
    ("instruction", "response", "languages", "kept"),
    [
        (ENGLISH, ENGLISH, ("en",), True),
        (GERMAN, GERMAN, ("en",), False),
        (GERMAN, GERMAN, ("de",), True),
        (CHINESE, CHINESE, ("zh",), True),
        (ENGLISH, GERMAN, ("en",), False),  # one side in another language
        (GERMAN, ENGLISH, ("en",), False),
        (ENGLISH, GERMAN, ("en", "de"), True),
        (ENGLISH, CODE, ("en",), True),  # code is undecided
        (ENGLISH, f"```python\n{CODE}\n```", ("en",), True),
        (GERMAN, f"```python\n{CODE}\n```", ("en",), False),
        ("2 + 2?", "4", ("en",), True),  # nothing to judge
        (ENGLISH, "42", ("en",), True),
        (CHINESE, "42", ("en",), False),
        (ENGLISH.upper(), ENGLISH, ("en",), True),
    ],
)
def test_records(instruction, response, languages, kept):
    reason = judged(instruction, response, languages=languages)
    assert reason == (None if kept else f"language is not {' or '.join(languages)}")


def test_threshold():
    """A text of two halves: kept at a low score only."""
    half = f"{ENGLISH} {GERMAN}"
    scores = [judged(half, "1", min_score=score) is None for score in (0.01, 0.3, 0.99)]
    assert scores == sorted(scores, reverse=True) and scores[0] and not scores[-1]


@pytest.mark.parametrize(
    ("text", "prose"),
    [
        ("Look:\n```\na = 1\n```\nDone.", "Look:\n \nDone."),
        ("Look:\n```py\na = 1", "Look:\n "),  # an open fence reaches to the end
        ("~~~\nx\n~~~ and ```y``` too", "  and   too"),
        ("no fence", "no fence"),
    ],
)
def test_fenced_code_is_no_prose(text, prose):
    assert without_code(text) == prose


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (ENGLISH, "en"),
        (GERMAN, "de"),
        (CHINESE, "zh"),
        ("123 + 456 = 579", UNKNOWN),
        ("", UNKNOWN),
        (f"{GERMAN}\n\n{GERMAN}\x00", "de"),  # line ends and NUL bytes do no harm
        (f"{ENGLISH} \ud800", "en"),  # nor does half of a surrogate pair
    ],
)
def test_detect_language(text, label):
    assert detect_language(text, None) == label


def test_a_model_of_ones_own(tmp_path):
    path = tmp_path / "own.ftz"
    shutil.copy(model_path(None), path)
    assert judged(GERMAN, GERMAN, model=str(path)) == "language is not en"


def test_a_missing_or_wrong_model_says_so(tmp_path):
    missing = str(tmp_path / "lid.176.bin")
    with pytest.raises(ValueError, match="lid.176.bin: no such file"):
        model_path(missing)
    wrong = tmp_path / "wrong.bin"
    wrong.write_bytes(b"no model" * 100)
    with pytest.raises(ValueError, match=r"wrong.bin.*must be lid\.176"):
        judged(ENGLISH, ENGLISH, model=str(wrong))


def test_without_the_package_the_way_out_is_named(monkeypatch):
    monkeypatch.setattr(language.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="language_model.*language_filter=false"):
        model_path(None)
