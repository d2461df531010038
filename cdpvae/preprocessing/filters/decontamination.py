"""What occurs in evaluation files must not be trained on.

A pair occurs when its instruction, or its instruction and response together, is a near-duplicate
of an instruction or of a whole pair of those files: Jaccard similarity of word 5-grams at least
`similarity`, as between records. The instruction alone is enough, since a question of a test is
seen whatever the answer beside it says.

Evaluation files are small, so no signatures are needed: an inverted index finds every text that is
similar enough, exactly. Each record is judged by itself, so that this is a filter, which workers
run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cdpvae.preprocessing.dedup.minhash import jaccard, shingles, words
from cdpvae.preprocessing.formats.convert import convert
from cdpvae.preprocessing.readers.source import Source
from cdpvae.preprocessing.records import Record, compared_text


class EvaluationTexts:
    """Holds the texts of evaluation files and finds those that are similar to a text. Picklable.

    texts: the texts to look for. similarity: Jaccard similarity from which two texts are the same.
    shingle_words: words in a shingle.
    """

    def __init__(self, texts: Iterable[str], similarity: float, shingle_words: int) -> None:
        self.similarity, self.shingle_words = similarity, shingle_words
        # The index says which texts hold a shingle.
        self._sets = list(dict.fromkeys(shingles(text, shingle_words) for text in texts))
        self._holders: dict[str, list[int]] = {}
        for number, elements in enumerate(self._sets):
            for shingle in elements:
                self._holders.setdefault(shingle, []).append(number)

    def __len__(self) -> int:
        """Return the number of texts with different shingles."""
        return len(self._sets)

    @classmethod
    def read(cls, files: Sequence[str], similarity: float, shingle_words: int) -> EvaluationTexts:
        """Read files in any format that inputs may have.

        Raises ValueError for a file, or a record in it, that cannot be read.
        """
        texts = (text for name in files for text in _texts_of(name, shingle_words))
        return cls(texts, similarity, shingle_words)

    def contains(self, text: str) -> bool:
        """Say whether some text here is at least `similarity` similar to `text`."""
        mine = shingles(text, self.shingle_words)
        # A similar set shares at least this many of mine ...
        least = math.ceil(self.similarity * len(mine) - 1e-9)
        known = [shingle for shingle in mine if shingle in self._holders]
        if len(known) < least:
            return False
        # ... and so at least one of any len(mine) - least + 1 of them, such as the rarest here.
        known.sort(key=lambda shingle: (len(self._holders[shingle]), shingle))
        rarest = known[: len(known) - least + 1]
        holders = {number for shingle in rarest for number in self._holders[shingle]}
        return any(jaccard(mine, self._sets[number]) >= self.similarity for number in holders)

    def contains_pair(self, instruction: str, response: str) -> bool:
        """Say whether the instruction, or the pair as one text, occurs here."""
        return self.contains(instruction) or self.contains(compared_text(instruction, response))


@dataclass(frozen=True)
class EvaluationFilter:
    """Drops records that occur in evaluation files."""

    texts: EvaluationTexts

    def __call__(self, record: Record) -> str | None:
        """Return None, or that the record occurs in an evaluation file."""
        if self.texts.contains_pair(record.instruction, record.response):
            return "in an evaluation file"
        return None


def _texts_of(name: str, least_words: int) -> Iterator[str]:
    """Yield the instructions and whole pairs of a file.

    A record that does not convert gives each of its texts that has `least_words` words (shorter
    ones are labels and names). Raises ValueError for a record that cannot be parsed or holds no
    text, and for a file without records: an evaluation file that is read in part protects nothing.
    """
    count = 0
    for count, raw in enumerate(Source.parse(name).records(), start=1):
        # A record that is a pair gives its instruction, and both sides together.
        converted = raw.problem or convert(raw.value, "auto", "all")
        if not isinstance(converted, str):
            for example in converted:
                yield example.instruction
                yield compared_text(example.instruction, example.response)
            continue
        # Any other record gives the texts in it.
        texts = [] if raw.problem else _strings(raw.value, least_words)
        if not texts:
            raise ValueError(f"decontaminate={name}: record {count}: {converted}; repair the file")
        yield from texts
    if not count:
        raise ValueError(f"decontaminate={name} holds no records; drop it or name another file")


def _strings(value: Any, least_words: int) -> list[str]:
    """Return the texts in a record, however nested, that have at least `least_words` words."""
    # Not recursive, as records may be nested deeply.
    found, waiting = [], [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            if len(words(item)) >= least_words:
                found.append(item)
        elif isinstance(item, Mapping):
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)
    return found
