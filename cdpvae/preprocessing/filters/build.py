"""The filters that the settings ask for."""

from __future__ import annotations

from cdpvae.config import DataConfig
from cdpvae.preprocessing.filters.decontamination import EvaluationFilter, EvaluationTexts
from cdpvae.preprocessing.filters.language import LanguageFilter, model_path
from cdpvae.preprocessing.filters.length import LengthFilter
from cdpvae.preprocessing.filters.quality import QualityFilter
from cdpvae.preprocessing.records import Filter


def build_text_filters(config: DataConfig) -> list[Filter]:
    """Build the filters that need no tokens, in the order they run: the cheapest first.

    Raises ValueError when the language model or an evaluation file cannot be read.
    """
    filters: list[Filter] = []
    if config.quality_filter:
        filters.append(
            QualityFilter(
                max_control_share=config.max_control_share,
                max_repeated_character_run=config.max_repeated_character_run,
                max_repeated_word_share=config.max_repeated_word_share,
                max_special_share=config.max_special_share,
            )
        )
    if config.language_filter:
        # A missing model is an error here, not in every worker on its first record.
        model_path(config.language_model)
        filters.append(
            LanguageFilter(config.languages, config.min_language_score, config.language_model)
        )
    if config.decontaminate:
        texts = EvaluationTexts.read(config.decontaminate, config.similarity, config.shingle_words)
        filters.append(EvaluationFilter(texts))
    return filters


def build_token_filters(config: DataConfig) -> list[Filter]:
    """Build the filters that count tokens."""
    return [
        LengthFilter(
            min_instruction=config.min_instruction_tokens,
            max_instruction=config.max_instruction_tokens,
            min_response=config.min_response_tokens,
            max_response=config.max_response_tokens,
        )
    ]
