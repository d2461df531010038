"""Sample data whose information content is known: short English pairs with five attributes.

    python -m cdpvae.sample_data --output DIR [--pairs N] [--validation-pairs M] [--seed S]

Each pair tells of a person, an animal, a food, a place and a time. Each has eight values, drawn
uniformly, so an instruction carries 5 ln 8 = 10.4 nats that the response needs and that nothing
else reveals. The layout and the verb of the response are drawn apart from the instruction, which
leaves ln 6 = 1.79 nats per response that no code of the instruction can save.

A value is two words, the first deciding the second: the last layer of a small causal backbone
keeps what predicts the next word better than the identity of the word it stands on.

Training pairs all carry different combinations of values. The combinations whose person, animal
and food numbers add up to a multiple of eight appear in the validation split only. This holds out
triples: every pair of values is seen in training.

Writes `pairs.jsonl` (instruction, output, split, attributes) and `attributes.json`, from which
`SampleSpec.load` scores generated text one attribute at a time.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from cdpvae.command_line import parse_options, run

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

INSTRUCTIONS = (
    "Tell me what happened on a {time} near the {place} to the {person} with a {animal} "
    "and some {food}.",
    "Explain why the {person} took a {animal} and some {food} to the {place} on a {time}.",
    "Write a short story about some {food}, the {place}, a {animal} and the {person} on a {time}.",
)

RESPONSES = (
    "On a {time}, the {person} {verb} some {food} near the {place} with a {animal}.",
    "Near the {place}, a {animal} watched as the {person} {verb} some {food} on a {time}.",
)

VERBS = ("enjoyed", "prepared", "shared")

HELD_OUT = ("person", "animal", "food")


@dataclasses.dataclass(frozen=True)
class SampleSpec:
    """The attributes of a data set and the words of their values; finds them in text.

    attributes: name -> values. A value is a phrase that no other value contains; matching ignores
    case. Raises ValueError when an attribute has fewer than two values or a value repeats.
    """

    attributes: dict[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        for name, values in self.attributes.items():
            if len(values) < 2:
                raise ValueError(f"attribute {name!r} has {len(values)} values; give at least 2")
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
        """Information in a uniform draw of all attributes, in nats."""
        return sum(math.log(len(values)) for values in self.attributes.values())

    @property
    def chance(self) -> dict[str, float]:
        """Accuracy of guessing, per attribute."""
        return {name: 1 / len(values) for name, values in self.attributes.items()}

    def attributes_of(self, text: str) -> dict[str, str | None]:
        """Which value of each attribute the text carries.

        None where the text has no value of the attribute, or more than one: naming several values
        must not count as naming the right one.
        """
        found = {}
        for name, patterns in self._patterns.items():
            values = [value for value, pattern in patterns if pattern.search(text)]
            found[name] = values[0] if len(values) == 1 else None
        return found

    def accuracy(
        self, texts: Sequence[str], truths: Sequence[dict[str, str | None]]
    ) -> dict[str, float]:
        """Share of texts that carry the true value, per attribute, and `all` of them at once.

        truths: one dict per text, as `attributes_of` of the reference gives it. Raises ValueError
        when the two differ in length or are empty.
        """
        if len(texts) != len(truths) or not texts:
            raise ValueError(
                f"{len(texts)} texts for {len(truths)} truths; give one truth per text, at least 1"
            )
        found = [self.attributes_of(text) for text in texts]
        right = [
            {name: f[name] is not None and f[name] == truth[name] for name in self.attributes}
            for f, truth in zip(found, truths, strict=True)
        ]
        scores = {name: sum(r[name] for r in right) / len(right) for name in self.attributes}
        return {**scores, "all": sum(all(r.values()) for r in right) / len(right)}

    def save(self, path: str | Path) -> None:
        """Write `attributes.json`."""
        content = {"attributes": self.attributes, "nats": self.nats, "chance": self.chance}
        Path(path).write_text(json.dumps(content, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> SampleSpec:
        """Read `attributes.json`. Raises ValueError when it is not such a file."""
        try:
            attributes = json.loads(Path(path).read_text())["attributes"]
            return cls({name: tuple(values) for name, values in attributes.items()})
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f"{path}: not an attributes.json; cdpvae.sample_data writes one"
            ) from None


SPEC = SampleSpec(ATTRIBUTES)


def attributes_of(text: str) -> dict[str, str | None]:
    """`SampleSpec.attributes_of` for the attributes of this module."""
    return SPEC.attributes_of(text)


def is_held_out(combination: Sequence[int]) -> bool:
    """combination: one value number per attribute, in the order of ATTRIBUTES."""
    names = list(ATTRIBUTES)
    return sum(combination[names.index(name)] for name in HELD_OUT) % 8 == 0


def make_pairs(pairs: int = 12_000, validation_pairs: int = 1_000, seed: int = 0) -> list[dict]:
    """Training records, then validation records; the same for the same arguments.

    Raises ValueError for counts below 1 or above the number of combinations.
    """
    combinations = list(itertools.product(*(range(len(v)) for v in ATTRIBUTES.values())))
    seen = [c for c in combinations if not is_held_out(c)]
    unseen = [c for c in combinations if is_held_out(c)]
    for what, count, available in (
        ("pairs", pairs, seen),
        ("validation_pairs", validation_pairs, unseen),
    ):
        if not 1 <= count <= len(available):
            raise ValueError(f"{what}={count} must be between 1 and {len(available)}")
    rng = random.Random(seed)
    return [
        *_records(rng, rng.sample(seen, pairs), "train"),
        *_records(rng, rng.sample(unseen, validation_pairs), "validation"),
    ]


def _records(rng: random.Random, combinations: Iterable[Sequence[int]], split: str) -> list[dict]:
    """One record per combination, template, layout and verb drawn uniformly."""
    records = []
    for combination in combinations:
        words = {
            name: values[i]
            for (name, values), i in zip(ATTRIBUTES.items(), combination, strict=True)
        }
        records.append(
            {
                "instruction": rng.choice(INSTRUCTIONS).format(**words),
                "output": rng.choice(RESPONSES).format(verb=rng.choice(VERBS), **words),
                "split": split,
                "attributes": words,
            }
        )
    return records


@dataclasses.dataclass
class SampleOptions:
    """Where to write the sample data, and how much of it."""

    output: str = ""
    """directory to write pairs.jsonl and attributes.json to"""
    pairs: int = 12_000
    """training pairs, all of different attribute combinations"""
    validation_pairs: int = 1_000
    """pairs of held-out combinations"""
    seed: int = 0


def _main(argv: Sequence[str] | None) -> None:
    options = parse_options(SampleOptions, "Write sample data with known attributes.", argv)
    if not options.output:
        raise ValueError("--output is missing; name a directory to write to")
    records = make_pairs(options.pairs, options.validation_pairs, options.seed)
    directory = Path(options.output)
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "pairs.jsonl", "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    SPEC.save(directory / "attributes.json")
    print(
        f"{options.pairs} training and {options.validation_pairs} validation pairs in "
        f"{directory}/pairs.jsonl, {SPEC.nats:.2f} nats of attributes each"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point -> exit status."""
    return run(_main, argv)


if __name__ == "__main__":
    raise SystemExit(main())
