"""The table at the end of the quickstart: does a run on the sample data use its latent space?

The attributes of every sample pair are known, so generated answers are scored one attribute at a
time: a decoder that carries one attribute out of five passes a shuffle test, not this one.

`python -m cdpvae.sample_report` prints the table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdpvae.sample.pairs import SampleSpec

# What the quickstart must reach on held-out combinations.
MIN_SHUFFLE_COST = 10.0  # nats per sequence
MIN_TIMES_CHANCE = 5.0
MIN_ACTIVE_RATIO = 0.5

# The answers that are scored: greedy texts from the posterior's mean.
SCORED_SOURCE = "z=mu"


@dataclass(frozen=True)
class Measure:
    """A measured value and the bound that it must reach."""

    value: float
    at_least: float

    @property
    def reached(self) -> bool:
        """Compare the value with its bound."""
        return self.value >= self.at_least


@dataclass(frozen=True)
class SampleReport:
    """The measures of a run by name, and the likelihoods that are shown without a bound.

    nll_q, neg_elbo, baseline_nll: nats per sequence; baseline_nll is the same decoder without z,
    None where no baseline was evaluated.
    """

    measures: dict[str, Measure]
    nll_q: float
    neg_elbo: float
    baseline_nll: float | None

    @property
    def reached(self) -> bool:
        """Decide whether every measure reaches its bound."""
        return all(measure.reached for measure in self.measures.values())

    def lines(self) -> list[str]:
        """Format the table, a line per measure, with the likelihoods below."""
        # Measures with a bound first.
        shown = [f"{'held-out combinations':<40}{'value':>9}  {'at least':>8}"]
        for name, measure in self.measures.items():
            mark = "ok" if measure.reached else "MISSED"
            shown.append(f"{name:<40}{measure.value:>9.2f}  {measure.at_least:>8.1f}  {mark}")
        # Likelihoods have no bound; the decoder without z is what to compare them with.
        shown.append(f"{'NLL from z~q, nats/sequence':<40}{self.nll_q:>9.2f}")
        shown.append(f"{'negative ELBO, nats/sequence':<40}{self.neg_elbo:>9.2f}")
        if self.baseline_nll is not None:
            shown.append(f"{'NLL of the same decoder without z':<40}{self.baseline_nll:>9.2f}")
        return shown

    def save(self, path: str | Path) -> None:
        """Write value, bound and verdict of every measure as JSON."""
        content = {
            name: {"value": m.value, "at_least": m.at_least, "reached": m.reached}
            for name, m in self.measures.items()
        }
        Path(path).write_text(json.dumps(content, indent=2) + "\n")


def judge_run(
    reconstruction_file: str | Path, latents_file: str | Path, attributes_file: str | Path
) -> SampleReport:
    """Judge a run by what the evaluation commands wrote about it.

    reconstruction_file: JSON of `evaluate_reconstruction --output`. latents_file: `latents.json`
    of `check_latents`. attributes_file: `attributes.json` of `sample_data`. Raises ValueError for
    files that are missing or hold no generated text.
    """
    # Read all files before anything is computed: a missing file is named at once.
    reconstruction = _read(reconstruction_file, "--reconstruction")
    latents = _read(latents_file, "--latents")
    spec = SampleSpec.load(_existing(attributes_file, "--attributes"))
    likelihood, baseline = reconstruction["likelihood"], reconstruction["baseline"]

    # Two measures of the latent space: what the decoder loses without it, how much of it moves.
    measures = {
        "cost of shuffled z, nats/sequence": Measure(
            likelihood["costs"]["shuffled"], MIN_SHUFFLE_COST
        ),
        "active units, share": Measure(active_ratio(latents), MIN_ACTIVE_RATIO),
    }

    # One measure per attribute: which parts of the instruction arrive in the answer.
    for name, accuracy in attribute_accuracy(spec, reconstruction["texts"]).items():
        measures[f"{name} right, times chance"] = Measure(
            accuracy / spec.chance[name], MIN_TIMES_CHANCE
        )
    return SampleReport(
        measures=measures,
        nll_q=likelihood["nll_q"],
        neg_elbo=likelihood["neg_elbo"],
        baseline_nll=None if baseline is None else baseline["nll_q"],
    )


def active_ratio(latents: Mapping[str, Any]) -> float:
    """Compute the share of active units at the first threshold that `check_latents` reports."""
    # The lowest threshold comes first among the verdicts.
    values = {v["name"]: v["value"] for v in latents["verdicts"]}
    units = next(value for name, value in values.items() if name.startswith("active units"))
    return units / len(latents["kl_per_dim"])


def attribute_accuracy(spec: SampleSpec, texts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Compute the share of answers from z = mu that carry each attribute's right value.

    texts: `texts` of the reconstruction file. Raises ValueError when there is no text.
    """
    if not texts:
        raise ValueError("--reconstruction holds no generated text; raise its --num-samples")
    # The truth is read off the reference by the same rules as the answer.
    truths = [spec.attributes_of(text["reference"]) for text in texts]
    scores = spec.accuracy([text["generated"][SCORED_SOURCE] for text in texts], truths)
    return {name: scores[name] for name in spec.attributes}


def _existing(path: str | Path, flag: str) -> Path:
    if not str(path) or not Path(path).exists():
        raise ValueError(f"{flag} {str(path)!r}: no such file")
    return Path(path)


def _read(path: str | Path, flag: str) -> dict[str, Any]:
    return json.loads(_existing(path, flag).read_text())
