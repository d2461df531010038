"""Which records are kept, and under which reason the others are counted."""

from __future__ import annotations

import pickle

import pytest

from cdpvae.config import DataConfig
from cdpvae.preprocessing.filters.build import build_text_filters, build_token_filters
from cdpvae.preprocessing.records import Record


def record(instruction: int, response: int) -> Record:
    return Record(0, 1, None, "i", "r", [1] * instruction, [1] * response)


def test_filters_follow_the_settings(tmp_path):
    config = DataConfig(min_instruction_tokens=3, max_response_tokens=5, min_response_tokens=4)
    (length,) = build_token_filters(config)
    assert length(record(3, 5)) is None
    assert length(record(2, 5)) == "instruction shorter than 3 tokens"
    assert length(record(3, 6)) == "response longer than 5 tokens"
    names = [type(keep).__name__ for keep in build_text_filters(config)]
    assert names == ["QualityFilter", "LanguageFilter"]
    none = DataConfig(quality_filter=False, language_filter=False)
    assert build_text_filters(none) == []
    test = tmp_path / "test.jsonl"
    test.write_text('{"question": "What is the capital of France?", "answer": "Paris"}\n')
    (only,) = build_text_filters(none.model_copy(update={"decontaminate": (str(test),)}))
    assert type(only).__name__ == "EvaluationFilter"


def test_filters_can_be_sent_to_workers():
    """As they are and after use, and they judge alike there."""
    text = "The committee met on Tuesday and agreed on a budget for the coming year."
    english = Record(0, 1, None, text, text, [], [])
    german = Record(
        0, 1, None, "Der Ausschuss tagte am Dienstag.", "Er beschloss den Haushalt.", [], []
    )
    for keep in build_text_filters(DataConfig()):
        for copy in (pickle.loads(pickle.dumps(keep)), keep):
            assert copy(english) is None
    reasons = [keep(german) for keep in build_text_filters(DataConfig())]
    assert reasons == [None, "language is not en"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"language_filter": False, "languages": ("de",)},
            "languages=.* no effect with language_f",
        ),
        (
            {"quality_filter": False, "max_special_share": 0.5},
            "max_special_share=0.5 has no effect",
        ),
        ({"deduplication": "exact", "similarity": 0.9}, "similarity=0.9 has no effect"),
        ({"deduplication": "none", "num_permutations": 64}, "num_permutations=64 has no effect"),
        ({"languages": ()}, "keeps no record"),
    ],
)
def test_settings_without_effect_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)


def test_similarity_counts_for_decontamination_too(tmp_path):
    DataConfig(deduplication="exact", similarity=0.9, decontaminate=(str(tmp_path / "a.jsonl"),))
