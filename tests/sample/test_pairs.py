"""The sample data: known information, held-out triples, nothing that a filter would remove."""

import itertools
import json
import math
import re
from collections import Counter

import pytest

from cdpvae import sample_data
from cdpvae.sample.pairs import (
    ATTRIBUTES,
    INSTRUCTIONS,
    RESPONSES,
    SPEC,
    VERBS,
    SampleSpec,
    attributes_of,
    is_held_out,
    make_pairs,
)


@pytest.fixture(scope="module")
def records():
    return make_pairs(12_000, 1_000, seed=0)


def numbers(record):
    return tuple(values.index(record["attributes"][name]) for name, values in ATTRIBUTES.items())


def test_same_seed_same_records_other_seed_others(records):
    assert make_pairs(12_000, 1_000, seed=0) == records
    assert make_pairs(12_000, 1_000, seed=1) != records


def test_counts_and_distinct_combinations(records):
    assert Counter(r["split"] for r in records) == {"train": 12_000, "validation": 1_000}
    assert len({numbers(r) for r in records}) == len(records)


def test_at_least_ten_nats():
    assert SPEC.nats == pytest.approx(5 * math.log(8))
    assert SPEC.nats > 10


def test_validation_holds_exactly_the_held_out_combinations(records):
    for record in records:
        person, animal, food, _, _ = numbers(record)
        assert ((person + animal + food) % 8 == 0) == (record["split"] == "validation")
    assert sum(map(is_held_out, itertools.product(range(8), repeat=5))) == 8**5 // 8


def test_every_pair_of_values_is_seen_in_training(records):
    seen = set()
    for record in records:
        if record["split"] == "train":
            seen.update(itertools.combinations(enumerate(numbers(record)), 2))
    assert len(seen) == math.comb(5, 2) * 64


def test_instruction_and_response_carry_the_attributes(records):
    for record in records[::7]:
        assert attributes_of(record["instruction"]) == record["attributes"]
        assert attributes_of(record["output"]) == record["attributes"]


def test_first_word_decides_the_second():
    first = [value.split()[0] for values in ATTRIBUTES.values() for value in values]
    assert all(len(value.split()) == 2 for values in ATTRIBUTES.values() for value in values)
    assert len(set(first)) == len(first)


def test_instruction_does_not_reveal_the_form_of_the_response(records):
    """Each of six forms has share 1/6 given the instruction's template: within 5 sigma."""

    def opening(text):
        return text.split()[0]

    for template in INSTRUCTIONS:
        forms = Counter(
            (opening(r["output"]), next(v for v in VERBS if v in r["output"]))
            for r in records
            if opening(r["instruction"]) == opening(template)
        )
        total = sum(forms.values())
        assert total > 3_000 and len(forms) == len(RESPONSES) * len(VERBS)
        sigma = math.sqrt(total * 1 / 6 * 5 / 6)
        assert all(abs(count - total / 6) < 5 * sigma for count in forms.values())


def test_long_enough_for_the_default_length_bounds(records):
    """A token never spans two words, so words and punctuation marks are a lower bound."""
    for record in records[::7]:
        assert len(re.findall(r"\w+|[^\w\s]", record["instruction"])) + 1 >= 10
        assert len(re.findall(r"\w+|[^\w\s]", record["output"])) + 2 >= 20


def test_no_near_duplicates():
    """Jaccard of word 5-grams stays far below 0.85 for records that differ in one attribute.

    All words of a record that come from attributes are distinct, so the similarity depends on the
    two forms and the attribute that differs alone, and differing in more lowers it.
    """

    def shingles(form, words):
        instruction, response, verb = form
        text = instruction.format(**words) + "\n" + response.format(verb=verb, **words)
        split = text.split()
        return set(zip(*(split[i:] for i in range(5)), strict=False))

    one = {name: values[0] for name, values in ATTRIBUTES.items()}
    forms = list(itertools.product(INSTRUCTIONS, RESPONSES, VERBS))
    highest = 0.0
    for name, form, other in itertools.product(ATTRIBUTES, forms, forms):
        a, b = shingles(form, one), shingles(other, {**one, name: ATTRIBUTES[name][1]})
        highest = max(highest, len(a & b) / len(a | b))
    assert 0.5 < highest < 0.7


def test_attributes_of_generated_text():
    found = attributes_of(
        "An OLD sailor and a black cat; hot soup, or was it sweet cake? stone gate"
    )
    assert found == {
        "person": "old sailor",
        "animal": "black cat",
        "food": None,  # two values named
        "place": None,  # neither half is a value
        "time": None,  # absent
    }


def test_accuracy_is_per_attribute():
    spec = SampleSpec({"colour": ("red", "blue"), "size": ("big", "small")})
    truths = [{"colour": "red", "size": "big"}, {"colour": "blue", "size": "small"}]
    assert spec.accuracy(["red and big", "red and small"], truths) == {
        "colour": 0.5,
        "size": 1.0,
        "all": 0.5,
    }
    # A missing value is wrong even where the reference has none.
    assert spec.accuracy(["red"], [{"colour": "red", "size": None}])["size"] == 0.0
    with pytest.raises(ValueError, match="1 texts for 2 truths"):
        spec.accuracy(["red"], truths)


def test_spec_refuses_values_that_cannot_be_told_apart():
    with pytest.raises(ValueError, match="'cat' is contained in 'black cat'"):
        SampleSpec({"animal": ("cat", "black cat")})
    with pytest.raises(ValueError, match="has 1 values"):
        SampleSpec({"animal": ("cat",)})


def test_command_writes_what_it_says(tmp_path, capsys):
    arguments = ["--output", str(tmp_path), "--pairs", "20", "--validation-pairs", "5"]
    assert sample_data.main([*arguments, "--seed", "3"]) == 0
    assert "10.40 nats" in capsys.readouterr().out
    lines = (tmp_path / "pairs.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == make_pairs(20, 5, 3)
    assert SampleSpec.load(tmp_path / "attributes.json") == SPEC


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--output is missing"),
        (["--output", "x", "--pairs", "28673"], "pairs=28673 must be between 1 and 28672"),
        (["--output", "x", "--validation-pairs", "0"], "validation_pairs=0 must be between"),
        (["--output", "x", "--pair", "7"], "--pair"),
    ],
)
def test_command_errors_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert sample_data.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_load_names_a_wrong_file(tmp_path):
    for content in ("[]", "{}", "no json", '{"attributes": 3}'):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(ValueError, match="not an attributes.json"):
            SampleSpec.load(tmp_path / "a.json")
