"""Raw records to the pairs that are kept: convert, filter, tokenise; what is dropped is counted.

What preprocessing and streaming have in common.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cdpvae.config import DataConfig
from cdpvae.data.dataset import SPLITS
from cdpvae.data.example import apply_target
from cdpvae.data.tokenizer import LlamaTokenizerWrapper
from cdpvae.preprocessing.counts import Counts, Histogram, count, excerpt
from cdpvae.preprocessing.filters.build import build_text_filters, build_token_filters
from cdpvae.preprocessing.filters.language import detect
from cdpvae.preprocessing.formats.convert import convert
from cdpvae.preprocessing.readers.source import RawRecord
from cdpvae.preprocessing.records import Filter, Record

MAX_KEYS = 20
SIDES = ("instruction", "response")
# A text with this many characters per allowed token cannot fit: tokens have about 4 characters,
# and the longest of a vocabulary, runs of spaces, about 100. It is dropped unread, as a tokenizer
# needs gigabytes for a line of 50 MB.
CHARACTERS_PER_TOKEN = 100


@dataclass(frozen=True)
class Pair:
    """A pair on its way through the filters. split: as the raw record declares it."""

    raw: RawRecord
    position: int  # of the raw record in its input, from 0
    split: str | None
    record: Record


def comparable(record: Record) -> str:
    """The text of a pair that is compared: both sides, as the exact key has them."""
    return f"{record.instruction}\n{record.response}"


@dataclass(frozen=True)
class PairFilters:
    """All filters of the settings. Picklable; made once, as reading evaluation files takes time.

    Raises ValueError when the language model or an evaluation file cannot be read.
    """

    text: list[Filter]
    token: list[Filter]

    @classmethod
    def of(cls, config: DataConfig) -> PairFilters:
        return cls(build_text_filters(config), build_token_filters(config))


class PairMaker:
    """(position, raw record) -> `Pair`s that stay. source: the input's name, for examples.

    tally_languages: fill `languages`, which costs the model one more reading of every text.
    counts, languages (label -> pairs), lengths (side -> histogram before the length filter),
    examples ("stage: reason" -> the first case) and keys (the first seen) say what it has seen.
    """

    def __init__(
        self,
        config: DataConfig,
        wrapper: LlamaTokenizerWrapper,
        filters: PairFilters,
        source: str,
        tally_languages: bool = True,
    ) -> None:
        self.config, self.wrapper, self.filters, self.source = config, wrapper, filters, source
        self.tally_languages = tally_languages and config.language_filter
        self.counts = Counts()
        self.languages: dict[str, int] = {}
        self.lengths = {
            side: Histogram(getattr(self.config, f"max_{side}_tokens")) for side in SIDES
        }
        self.examples: dict[str, dict[str, Any]] = {}
        self.keys: dict[str, None] = {}

    def process(self, chunk: Iterable[tuple[int, RawRecord]]) -> Iterator[Pair]:
        """Raw records with their positions -> pairs, tokenised together."""
        converted = [pair for position, raw in chunk for pair in self._convert(position, raw)]
        pairs = [pair for pair in converted if self._passes(pair, self._text_reason(pair.record))]
        instructions = self.wrapper.encode_instructions(
            [pair.record.instruction for pair in pairs], truncate=False
        )
        responses = self.wrapper.encode_responses(
            [pair.record.response for pair in pairs], truncate=False
        )
        for pair, instruction_ids, response_ids in zip(pairs, instructions, responses, strict=True):
            self.lengths["instruction"].add([len(instruction_ids)])
            self.lengths["response"].add([len(response_ids)])
            record = replace(
                pair.record, instruction_ids=instruction_ids, response_ids=response_ids
            )
            if self._passes(pair, _first_reason(self.filters.token, record)):
                yield replace(pair, record=record)

    def _convert(self, position: int, raw: RawRecord) -> Iterator[Pair]:
        """The pairs of a raw record, counted; none when it does not convert."""
        self.counts.read += 1
        if isinstance(raw.value, Mapping) and len(self.keys) < MAX_KEYS:
            self.keys.update(dict.fromkeys(excerpt(key) for key in raw.value))
        outcome = raw.problem or convert(raw.value, self.config.format, self.config.turns)
        if isinstance(outcome, str):
            count(self.counts.not_converted, outcome)
            self._remember("not converted", outcome, raw)
            return
        self.counts.converted += 1
        for example in outcome:
            self.counts.pairs += 1
            example = apply_target(example, self.config.target)
            record = Record(position, self.source, example.instruction, example.response, [], [])
            yield Pair(raw, position, _declared_split(raw.value), record)

    def _text_reason(self, record: Record) -> str | None:
        """Why the text alone rules a pair out."""
        for side in SIDES:
            highest = getattr(self.config, f"max_{side}_tokens")
            if len(getattr(record, side)) > highest * CHARACTERS_PER_TOKEN:
                self.lengths[side].add([highest + self.lengths[side].width])
                return f"{side} longer than {highest} tokens"
        if self.tally_languages:
            count(self.languages, detect(comparable(record), self.config.language_model))
        return _first_reason(self.filters.text, record)

    def _passes(self, pair: Pair, reason: str | None) -> bool:
        if reason is not None:
            count(self.counts.filtered, reason)
            self._remember("filtered", reason, pair.raw)
        return reason is None

    def _remember(self, stage: str, reason: str, raw: RawRecord) -> None:
        """Keep the first case of a reason; one reason can come from two steps of a chunk."""
        known = self.examples.get(f"{stage}: {reason}")
        if known is None or raw.position < known["position"]:
            self.examples[f"{stage}: {reason}"] = {
                "source": self.source,
                "position": raw.position,
                "excerpt": excerpt(raw.detail or raw.value),
            }


def _first_reason(filters: list[Filter], record: Record) -> str | None:
    return next((reason for keep in filters if (reason := keep(record)) is not None), None)


def _declared_split(value: Any) -> str | None:
    """The record's own `split`, when it is the name of one of ours."""
    split = value.get("split") if isinstance(value, Mapping) else None
    return split if split in SPLITS else None
