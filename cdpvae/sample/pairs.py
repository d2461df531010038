"""Pairs whose information content is known: short English texts with five attributes.

Each pair describes a person, an animal, a food, a place and a time. Each attribute has eight
values, drawn uniformly, so an instruction carries 5 ln 8 = 10.4 nats that the response needs and
that nothing else reveals. The layout and the verb of the response are drawn independently of the
instruction, which leaves ln 6 = 1.79 nats per response that no code of the instruction can save.

A value is two words, the first deciding the second: the last layer of a small causal backbone
keeps what predicts the next word better than the identity of the word it stands on.

Training pairs all carry different combinations of values. The combinations whose person, animal
and food numbers add up to a multiple of eight appear in the validation split only. This holds out
triples: every pair of values is seen in training.

`python -m cdpvae.sample_data` writes the pairs. `SampleSpec.load` reads the attributes back and
scores generated text one attribute at a time.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

# The order decides the numbers of the values, and with them the split and what a seed draws.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "person": (
        "old sailor",
        "young doctor",
        "tired farmer",
        "proud baker",
        "clever lawyer",
        "quiet painter",
        "famous singer",
        "gentle nurse",
    ),
    "animal": (
        "brown horse",
        "black cat",
        "white rabbit",
        "stubborn donkey",
        "little dog",
        "noisy parrot",
        "fat goose",
        "spotted cow",
    ),
    "food": (
        "fresh bread",
        "hot soup",
        "sweet cake",
        "roast chicken",
        "green salad",
        "ripe apples",
        "fried fish",
        "creamy cheese",
    ),
    "place": (
        "stone bridge",
        "village square",
        "river bank",
        "mountain hut",
        "market hall",
        "forest path",
        "harbour wall",
        "castle gate",
    ),
    "time": (
        "rainy morning",
        "sunny afternoon",
        "windy evening",
        "snowy night",
        "foggy dawn",
        "stormy weekend",
        "warm holiday",
        "cloudy Monday",
    ),
}

# Templates of the instruction. Each names all five attributes.
INSTRUCTIONS = (
    "Tell me what happened on a {time} near the {place} to the {person} with a {animal} "
    "and some {food}.",
    "Explain why the {person} took a {animal} and some {food} to the {place} on a {time}.",
    "Write a short story about some {food}, the {place}, a {animal} and the {person} on a {time}.",
)

# Layouts and verbs of the response: 2 x 3 forms, the ln 6 nats that z cannot save.
RESPONSES = (
    "On a {time}, the {person} {verb} some {food} near the {place} with a {animal}.",
    "Near the {place}, a {animal} watched as the {person} {verb} some {food} on a {time}.",
)

VERBS = ("enjoyed", "prepared", "shared")

# The attributes whose value numbers decide in which split a combination appears.
HELD_OUT = ("person", "animal", "food")
HELD_OUT_MODULUS = 8

PAIRS_FILE, ATTRIBUTES_FILE = "pairs.jsonl", "attributes.json"


@dataclasses.dataclass(frozen=True)
class SampleSpec:
    """Hold the attributes of a data set and the words of their values, and find them in text.

    attributes: name -> values. A value is a phrase that no other value contains; matching ignores
    case. Raises ValueError when an attribute has fewer than two values or a value repeats.
    """

    attributes: dict[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        for name, values in self.attributes.items():
            if len(values) < 2:
                raise ValueError(f"attribute {name!r} has {len(values)} values; give at least 2")
        # A value inside another one would be found wherever the longer one stands.
        phrases = [v.lower() for values in self.attributes.values() for v in values]
        for one, other in itertools.permutations(phrases, 2):
            if one in other:
                raise ValueError(f"value {one!r} is contained in {other!r}; make them distinct")

    @cached_property
    def _patterns(self) -> dict[str, list[tuple[str, re.Pattern[str]]]]:
        return {
            name: [(v, re.compile(rf"\b{re.escape(v)}\b", re.IGNORECASE)) for v in values]
            for name, values in self.attributes.items()
        }

    @property
    def nats(self) -> float:
        """Compute the information in a uniform draw of all attributes, in nats."""
        return sum(math.log(len(values)) for values in self.attributes.values())

    @property
    def chance(self) -> dict[str, float]:
        """Compute the accuracy of guessing, per attribute."""
        return {name: 1 / len(values) for name, values in self.attributes.items()}

    def attributes_of(self, text: str) -> dict[str, str | None]:
        """Find the value of each attribute that the text carries.

        None where the text has no value of the attribute, or more than one: naming several values
        must not count as naming the right one.
        """
        found = {}
        for name, patterns in self._patterns.items():
            values = [value for value, pattern in patterns if pattern.search(text)]
            found[name] = values[0] if len(values) == 1 else None
        return found

    def accuracy(
        self, texts: Sequence[str], truths: Sequence[Mapping[str, str | None]]
    ) -> dict[str, float]:
        """Compute the share of texts with the true value, per attribute and for `all` together.

        truths: one mapping per text, as `attributes_of` returns it for the reference. Raises
        ValueError when the two differ in length or are empty.
        """
        if len(texts) != len(truths) or not texts:
            raise ValueError(
                f"{len(texts)} texts for {len(truths)} truths; give one truth per text, at least 1"
            )
        # An attribute that the text does not name is wrong, even where the truth lacks it too.
        found = [self.attributes_of(text) for text in texts]
        right = [
            {name: f[name] is not None and f[name] == truth[name] for name in self.attributes}
            for f, truth in zip(found, truths, strict=True)
        ]
        # `all` counts the texts in which every attribute is right.
        scores = {name: sum(r[name] for r in right) / len(right) for name in self.attributes}
        return {**scores, "all": sum(all(r.values()) for r in right) / len(right)}

    def save(self, path: str | Path) -> None:
        """Write `attributes.json`."""
        content = {"attributes": self.attributes, "nats": self.nats, "chance": self.chance}
        Path(path).write_text(json.dumps(content, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> SampleSpec:
        """Read `attributes.json`. Raises ValueError when it is not such a file."""
        # Whatever the file holds instead, the message is one line that names it.
        try:
            attributes = json.loads(Path(path).read_text())["attributes"]
            return cls({name: tuple(values) for name, values in attributes.items()})
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f"{path}: not an attributes.json; cdpvae.sample_data writes one"
            ) from None


SPEC = SampleSpec(ATTRIBUTES)


def attributes_of(text: str) -> dict[str, str | None]:
    """Find the values of this module's attributes; see `SampleSpec.attributes_of`."""
    return SPEC.attributes_of(text)


def is_held_out(combination: Sequence[int]) -> bool:
    """Decide whether a combination belongs to the validation split.

    combination: one value number per attribute, in the order of ATTRIBUTES.
    """
    # Summing numbers holds out triples, and leaves every pair of values in training.
    names = list(ATTRIBUTES)
    return sum(combination[names.index(name)] for name in HELD_OUT) % HELD_OUT_MODULUS == 0


def make_pairs(pairs: int, validation_pairs: int, seed: int) -> list[dict[str, Any]]:
    """Draw the training records, then the validation records.

    pairs, validation_pairs: how many records of each split. The same arguments give the same
    records. Raises ValueError for counts below 1 or above the number of combinations.
    """
    # Split all combinations before drawing: no draw can move one to the other side.
    combinations = list(itertools.product(*(range(len(v)) for v in ATTRIBUTES.values())))
    seen = [c for c in combinations if not is_held_out(c)]
    unseen = [c for c in combinations if is_held_out(c)]
    for what, count, available in (
        ("pairs", pairs, seen),
        ("validation_pairs", validation_pairs, unseen),
    ):
        if not 1 <= count <= len(available):
            raise ValueError(f"{what}={count} must be between 1 and {len(available)}")
    # One generator for both splits, in this order: the seed fixes every byte of the file.
    rng = random.Random(seed)
    return [
        *_records(rng, rng.sample(seen, pairs), "train"),
        *_records(rng, rng.sample(unseen, validation_pairs), "validation"),
    ]


def write_pairs(
    directory: str | Path, pairs: int, validation_pairs: int, seed: int
) -> tuple[Path, Path]:
    """Write `pairs.jsonl` and `attributes.json` into a directory and return their paths.

    directory: made where it does not exist.
    pairs, validation_pairs, seed: see `make_pairs`, which also names the errors.
    """
    # Draw first: wrong counts must not leave an empty directory behind.
    records = make_pairs(pairs, validation_pairs, seed)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / PAIRS_FILE, "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    SPEC.save(directory / ATTRIBUTES_FILE)
    return directory / PAIRS_FILE, directory / ATTRIBUTES_FILE


def _records(
    rng: random.Random, combinations: Iterable[Sequence[int]], split: str
) -> list[dict[str, Any]]:
    """Make one record per combination; template, layout and verb are drawn uniformly."""
    records = []
    for combination in combinations:
        words = {
            name: values[i]
            for (name, values), i in zip(ATTRIBUTES.items(), combination, strict=True)
        }
        # The order of these draws is part of what a seed means.
        records.append(
            {
                "instruction": rng.choice(INSTRUCTIONS).format(**words),
                "output": rng.choice(RESPONSES).format(verb=rng.choice(VERBS), **words),
                "split": split,
                "attributes": words,
            }
        )
    return records
