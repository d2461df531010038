"""Which records are worth training on.

A filter is a pure function from a `Record` to None (keep) or a short, constant reason, so that
the pipeline can count what it drops and why. Filters are picklable: workers run them.
"""

from __future__ import annotations

from dataclasses import dataclass

from cdpvae.config import DataConfig
from cdpvae.preprocessing.filters.decontamination import EvaluationTexts
from cdpvae.preprocessing.filters.language import LanguageFilter, model_path
from cdpvae.preprocessing.filters.quality import QualityFilter
from cdpvae.preprocessing.records import Filter, Record


@dataclass(frozen=True)
class LengthFilter:
    """Bounds in tokens, BOS and EOS counted, both ends included."""

    min_instruction: int = 10
    max_instruction: int = 512
    min_response: int = 20
    max_response: int = 1024

    def __call__(self, record: Record) -> str | None:
        """None, or which side is too short or too long."""
        sides = (
            ("instruction", record.instruction_ids, self.min_instruction, self.max_instruction),
            ("response", record.response_ids, self.min_response, self.max_response),
        )
        for side, ids, low, high in sides:
            if len(ids) < low:
                return f"{side} shorter than {low} tokens"
            if len(ids) > high:
                return f"{side} longer than {high} tokens"
        return None


@dataclass(frozen=True)
class EvaluationFilter:
    """Drops what occurs in evaluation files."""

    texts: EvaluationTexts

    def __call__(self, record: Record) -> str | None:
        """None, or that the record occurs there."""
        if self.texts.contains_pair(record.instruction, record.response):
            return "in an evaluation file"
        return None


def build_text_filters(config: DataConfig) -> list[Filter]:
    """The filters that need no tokens, in the order they run: the cheapest first.

    Raises ValueError when the language model or an evaluation file cannot be read.
    """
    filters: list[Filter] = []
    if config.quality_filter:
        filters.append(
            QualityFilter(
                config.max_control_share,
                config.max_repeated_character_run,
                config.max_repeated_word_share,
                config.max_special_share,
            )
        )
    if config.language_filter:
        model_path(config.language_model)
        filters.append(
            LanguageFilter(config.languages, config.min_language_score, config.language_model)
        )
    if config.decontaminate:
        texts = EvaluationTexts.read(config.decontaminate, config.similarity, config.shingle_words)
        filters.append(EvaluationFilter(texts))
    return filters


def build_token_filters(config: DataConfig) -> list[Filter]:
    """The filters that count tokens."""
    return [
        LengthFilter(
            config.min_instruction_tokens,
            config.max_instruction_tokens,
            config.min_response_tokens,
            config.max_response_tokens,
        )
    ]
