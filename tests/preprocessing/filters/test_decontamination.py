"""What occurs in evaluation files is found, whatever its place and spelling; nothing else is."""

from __future__ import annotations

import json
import pickle
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdpvae.preprocessing.dedup.minhash import jaccard, shingles
from cdpvae.preprocessing.filters.decontamination import EvaluationTexts

QUESTION = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in "
    "May. How many clips did Natalia sell altogether in April and May?"
)
ANSWER = "Natalia sold 48/2 = 24 clips in May, so she sold 48 + 24 = 72 clips altogether."


@pytest.fixture
def evaluation(tmp_path):
    """evaluation(records, name) -> the texts of a file with these records."""

    def read(records: list, name: str = "test.jsonl") -> EvaluationTexts:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return EvaluationTexts.read([str(path)], 0.85, 5)

    return read


def test_the_question_is_enough(evaluation):
    texts = evaluation([{"question": QUESTION, "answer": ANSWER}])
    assert len(texts) == 2
    assert texts.contains_pair(QUESTION, "I will not say.")
    assert texts.contains_pair(QUESTION, ANSWER)
    assert texts.contains_pair(QUESTION.upper().replace(",", " ;"), "72")
    assert texts.contains_pair(QUESTION.removesuffix(" and May?"), "")  # 25 of 27 shingles
    assert not texts.contains_pair(QUESTION.replace("altogether", "in total"), "72")  # 22 of 33
    assert not texts.contains_pair("How many clips did she sell?", ANSWER)
    assert not texts.contains_pair("A question about something else altogether.", "No.")


def test_every_exchange_of_a_conversation_counts(evaluation):
    turns = [("user", QUESTION), ("assistant", "72"), ("user", "And what is " + QUESTION[20:])]
    messages = [{"role": role, "content": text} for role, text in (*turns, ("assistant", "9"))]
    texts = evaluation([{"messages": messages}])
    assert texts.contains_pair(turns[2][1], "")


def test_a_record_that_is_no_pair_gives_its_long_texts(evaluation):
    texts = evaluation([{"id": "test/1", "story": QUESTION, "choices": ["72", ANSWER]}])
    assert texts.contains_pair(QUESTION, "") and texts.contains_pair(ANSWER, "")
    assert not texts.contains("test/1")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "cut', "record 1: record is not valid JSON"),
        ('{"id": 7}', "record 1: unknown format"),
        ("", "holds no records"),
    ],
)
def test_a_file_that_protects_nothing_is_refused(tmp_path, content, message):
    path = tmp_path / "broken.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        EvaluationTexts.read([str(path)], 0.85, 5)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.jsonl"):
        EvaluationTexts.read([str(tmp_path / "gone.jsonl")], 0.85, 5)


@given(st.integers(0, 2**32), st.sampled_from([0.5, 0.85, 1.0]))
@settings(deadline=None)
def test_found_is_what_comparing_with_all_finds(seed, similarity):
    rng = random.Random(seed)
    known = [" ".join(rng.choices("abcdefgh", k=rng.randrange(12))) for _ in range(20)]
    texts = pickle.loads(pickle.dumps(EvaluationTexts(known, similarity, 3)))
    for _ in range(30):
        words = rng.choice(known).split()
        for _ in range(rng.randrange(3)):
            words.insert(rng.randrange(len(words) + 1), rng.choice("abcdefgh"))
        mine = shingles(" ".join(words), 3)
        expected = any(jaccard(mine, shingles(one, 3)) >= similarity for one in known)
        assert texts.contains(" ".join(words)) == expected
