"""Raw records to the records that are kept: convert, filter, tokenise, and count what is dropped.

Preprocessing and streaming both use this module.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cdpvae.config import DataConfig
from cdpvae.data.dataset import SPLITS
from cdpvae.data.example import apply_target
from cdpvae.data.tokenizer import LlamaTokenizerWrapper
from cdpvae.preprocessing.counts import Counts, Histogram, count
from cdpvae.preprocessing.filters.build import build_text_filters, build_token_filters
from cdpvae.preprocessing.filters.language import detect_language
from cdpvae.preprocessing.formats.convert import convert
from cdpvae.preprocessing.records import Filter, RawRecord, Record, compared_text, excerpt

# How many keys of an unknown format an error message shows.
MAX_KEYS = 20
SIDES = ("instruction", "response")
# A text with this many characters per allowed token cannot fit: tokens have about 4 characters,
# and the longest of a vocabulary, runs of spaces, about 100. Such a text is dropped without being
# tokenised, as a tokenizer needs gigabytes for a line of 50 MB.
CHARACTERS_PER_TOKEN = 100


@dataclass(frozen=True)
class RecordFilters:
    """All filters of the settings: `text` before and `token` after tokenisation.

    Picklable. Built once, as reading evaluation files takes time.
    """

    text: list[Filter]
    token: list[Filter]

    @classmethod
    def from_config(cls, config: DataConfig) -> RecordFilters:
        """Build the filters.

        Raises ValueError when the language model or an evaluation file cannot be read.
        """
        return cls(build_text_filters(config), build_token_filters(config))


class RecordProcessor:
    """Converts, filters and tokenises the raw records of one input, and counts what it sees.

    config: the settings of the data.
    wrapper: the tokenizer.
    filters: the filters to apply.
    source: the name of the input, for examples.
    tally_languages: fill `languages`, for which the language model reads every text once more.

    What has been seen so far:

    counts: numbers of records by reason.
    languages: label -> records in that language.
    lengths: side -> histogram of tokens before the length filter.
    examples: "category: reason" -> the first record that was dropped so.
    keys: the first keys that raw records had.
    """

    def __init__(
        self,
        config: DataConfig,
        wrapper: LlamaTokenizerWrapper,
        filters: RecordFilters,
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

    def process(self, chunk: Iterable[tuple[int, RawRecord]]) -> Iterator[Record]:
        """Yield the records that are kept, tokenised. chunk: (record_number, raw record) pairs."""
        # Convert, and drop by text what needs no tokens to be dropped.
        converted = [
            (raw, record) for number, raw in chunk for record in self._convert(number, raw)
        ]
        kept = [
            (raw, record)
            for raw, record in converted
            if self._is_kept(raw, record, self._text_reason(record))
        ]
        # Tokenise all texts of the chunk in two calls, which is several times faster than one by
        # one.
        instructions = self.wrapper.encode_instructions(
            [record.instruction for _, record in kept], truncate=False
        )
        responses = self.wrapper.encode_responses(
            [record.response for _, record in kept], truncate=False
        )
        # Drop by length.
        for (raw, record), instruction_ids, response_ids in zip(
            kept, instructions, responses, strict=True
        ):
            self.lengths["instruction"].add([len(instruction_ids)])
            self.lengths["response"].add([len(response_ids)])
            record = replace(record, instruction_ids=instruction_ids, response_ids=response_ids)
            if self._is_kept(raw, record, _first_reason(self.filters.token, record)):
                yield record

    def _convert(self, record_number: int, raw: RawRecord) -> Iterator[Record]:
        """Yield the records of a raw record, without tokens; nothing when it does not convert."""
        # The keys are shown when nothing of an input converts.
        self.counts.read += 1
        if isinstance(raw.value, Mapping) and len(self.keys) < MAX_KEYS:
            self.keys.update(dict.fromkeys(excerpt(key) for key in raw.value))
        # A record that cannot be read, or has no known format, is counted by its reason.
        converted = raw.problem or convert(raw.value, self.config.format, self.config.turns)
        if isinstance(converted, str):
            count(self.counts.not_converted, converted)
            self._keep_example("not converted", converted, record_number, raw)
            return
        # A conversation gives several examples, each of which is a record from here on.
        self.counts.converted += 1
        for example in converted:
            self.counts.pairs += 1
            example = apply_target(example, self.config.target)
            yield Record(
                record_number,
                raw.line,
                _declared_split(raw.value),
                example.instruction,
                example.response,
                instruction_ids=[],
                response_ids=[],
            )

    def _text_reason(self, record: Record) -> str | None:
        """Return why the text alone rules a record out, or None."""
        # A text that is much too long must reach neither the filters nor the tokenizer.
        for side in SIDES:
            highest = getattr(self.config, f"max_{side}_tokens")
            if len(getattr(record, side)) > highest * CHARACTERS_PER_TOKEN:
                self.lengths[side].add([highest + self.lengths[side].width])
                return f"{side} longer than {highest} tokens"
        if self.tally_languages:
            text = compared_text(record.instruction, record.response)
            count(self.languages, detect_language(text, self.config.language_model))
        return _first_reason(self.filters.text, record)

    def _is_kept(self, raw: RawRecord, record: Record, reason: str | None) -> bool:
        """Count a record as filtered when there is a reason."""
        if reason is not None:
            count(self.counts.filtered, reason)
            self._keep_example("filtered", reason, record.record_number, raw)
        return reason is None

    def _keep_example(self, category: str, reason: str, record_number: int, raw: RawRecord) -> None:
        """Keep the first record that is dropped for a reason.

        category: not converted, or filtered.
        reason: why it is dropped. The same reason can come from two steps of a chunk, and then
            out of order.
        record_number: number of the raw record within its input.
        raw: the raw record.
        """
        key = f"{category}: {reason}"
        known = self.examples.get(key)
        if known is None or record_number < known["record_number"]:
            self.examples[key] = {
                "source": self.source,
                "record_number": record_number,
                "line": raw.line,
                "excerpt": excerpt(raw.detail or raw.value),
            }


def _first_reason(filters: list[Filter], record: Record) -> str | None:
    return next((reason for keep in filters if (reason := keep(record)) is not None), None)


def _declared_split(value: Any) -> str | None:
    """Return the raw record's own `split` when it is the name of one of our splits."""
    split = value.get("split") if isinstance(value, Mapping) else None
    return split if split in SPLITS else None
