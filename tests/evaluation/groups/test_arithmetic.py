"""Arithmetic of attributes: which triples are chosen, and what a perfect decoder gets."""

from __future__ import annotations

import itertools

import pytest
import torch

from cdpvae.evaluation.groups import arithmetic
from cdpvae.evaluation.groups.arithmetic import find_triples, measure_arithmetic
from cdpvae.sample.pairs import SampleSpec

SPEC = SampleSpec(
    {"hue": ("red", "green", "blue"), "thing": ("house", "river"), "size": ("small", "large")}
)
ROWS = [" ".join(values) for values in itertools.product(*SPEC.attributes.values())]


def one_hot(text: str) -> torch.Tensor:
    """A latent in which every attribute has places of its own: arithmetic is exact."""
    words = text.split()
    return torch.tensor([float(v in words) for vs in SPEC.attributes.values() for v in vs])


def read(z: torch.Tensor) -> str:
    """The values whose places are highest."""
    words, parts = [], z.split([len(values) for values in SPEC.attributes.values()])
    for values, part in zip(SPEC.attributes.values(), parts, strict=True):
        words.append(values[int(part.argmax())])
    return " ".join(words)


@pytest.fixture
def measure(monkeypatch):
    def run(decode, rows=ROWS, triples=50):
        monkeypatch.setattr(
            arithmetic, "write", lambda opened, z, rows, length: [decode(row) for row in z]
        )
        return measure_arithmetic(
            None,
            torch.stack([one_hot(text) for text in rows]),
            rows,
            SPEC,
            triples=triples,
            rows_per_batch=4,
            max_length=8,
            progress=lambda line: None,
        )

    return run


def test_triples_are_what_they_are_said_to_be():
    attributes = [SPEC.attributes_of(text) for text in [*ROWS, "red and green house", ""]]
    triples = find_triples(attributes, 100, seed=0)
    assert len(triples) == len(ROWS)
    for triple in triples:
        a, b, c = (attributes[row] for row in (triple.a, triple.b, triple.c))
        assert [name for name in a if a[name] != b[name]] == [triple.changed]
        assert a[triple.changed] == c[triple.changed] and a != c
        assert triple.expected == {**c, triple.changed: b[triple.changed]}
    assert len({triple.a for triple in triples}) == len(triples)
    assert len({triple.changed for triple in triples}) == 3
    assert find_triples(attributes, 100, seed=0) == triples != find_triples(attributes, 100, seed=1)
    assert find_triples(attributes, 4, seed=0) == triples[:4]


def test_a_space_of_independent_attributes_is_perfect(measure):
    group = measure(read)
    for what in (arithmetic.CHANGED, arithmetic.KEPT, arithmetic.ALL):
        figure = group[f"{what}, z_b - z_a + z_c"]
        assert figure.value == 1.0 and figure.standard_error == 0.0 and figure.rows == 12
    # c's own text keeps what is kept, and never has what changes.
    assert group["other attributes kept, z_c alone"].value == 1.0
    assert group["changed attribute right, z_c alone"].value == 0.0
    assert group["all attributes right, chance"].value == pytest.approx(1 / 12)
    assert 1 / 3 < group["changed attribute right, chance"].value < 1 / 2
    assert {"a", "b", "c", "z_b - z_a + z_c", "z_c alone"} == group.texts[0].keys()


def test_a_decoder_that_ignores_z_is_at_chance_and_no_better_than_c(measure):
    """It always writes the same values, which over all combinations are right by chance."""
    group = measure(lambda z: "red house small")
    for what in (arithmetic.CHANGED, arithmetic.KEPT):
        ours, own = (
            group[f"{what}, {source}"].value for source in ("z_b - z_a + z_c", "z_c alone")
        )
        assert ours == own < 1
    # A text that names two values of an attribute, or none, is wrong.
    assert measure(lambda z: "red green blue")["other attributes kept, z_c alone"].value == 0.0


def test_rows_without_a_triple_are_a_note(measure):
    group = measure(read, rows=["red house small", "green river large"])
    assert not group.figures and "2 rows have no triple" in group.notes[0]
