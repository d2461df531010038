"""The table at the end of the quickstart: does a run on the sample data use its latent space?

    python -m cdpvae.sample_report --reconstruction results/reconstruction.json \
        --latents results/latents.json --attributes data/attributes.json

The sample data knows the attributes of every pair, so generated answers are scored one attribute
at a time: a decoder that carries one attribute out of five passes a shuffle test, not this one.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from cdpvae.command_line import parse_options, run

# What the quickstart must reach on held-out combinations.
MIN_SHUFFLE_COST = 10.0  # nats per sequence
MIN_TIMES_CHANCE = 5.0
MIN_ACTIVE_RATIO = 0.5


@dataclasses.dataclass
class ReportOptions:
    """The files the evaluation commands wrote."""

    reconstruction: str = ""
    """JSON of evaluate_reconstruction --output"""
    latents: str = ""
    """latents.json of check_latents"""
    attributes: str = ""
    """attributes.json of sample_data"""
    output: str | None = None
    """JSON file for the table"""
    strict: bool = False
    """exit with 1 when a value misses its bound"""


def report(options: ReportOptions) -> dict:
    """-> value, bound and verdict by name. Raises ValueError for missing files."""
    from cdpvae.sample_data import SampleSpec

    reconstruction = _read(options.reconstruction, "--reconstruction")
    latents = _read(options.latents, "--latents")
    spec = SampleSpec.load(options.attributes)
    values = {v["name"]: v["value"] for v in latents["verdicts"]}
    units = next(value for name, value in values.items() if name.startswith("active units"))
    dims = len(latents["kl_per_dim"])
    rows = {
        "cost of shuffled z, nats/sequence": (
            reconstruction["likelihood"]["costs"]["shuffled"],
            MIN_SHUFFLE_COST,
        ),
        "active units, share": (units / dims, MIN_ACTIVE_RATIO),
    }
    for name, accuracy in attribute_accuracy(spec, reconstruction["texts"]).items():
        rows[f"{name} right, times chance"] = (accuracy / spec.chance[name], MIN_TIMES_CHANCE)
    return {
        name: {"value": value, "at_least": bound, "reached": value >= bound}
        for name, (value, bound) in rows.items()
    }


def attribute_accuracy(spec, texts: list[dict]) -> dict[str, float]:
    """Share of answers from z = mu that carry each attribute's right value."""
    if not texts:
        raise ValueError("--reconstruction holds no generated text; raise its --num-samples")
    truths = [spec.attributes_of(text["reference"]) for text in texts]
    scores = spec.accuracy([text["generated"]["z=mu"] for text in texts], truths)
    return {name: scores[name] for name in spec.attributes}


def lines(rows: dict, reconstruction: dict) -> list[str]:
    """The table, with the likelihoods beside the decoder without z."""
    likelihood, baseline = reconstruction["likelihood"], reconstruction["baseline"]
    shown = [f"{'held-out combinations':<40}{'value':>9}  {'at least':>8}"]
    for name, row in rows.items():
        mark = "ok" if row["reached"] else "MISSED"
        shown.append(f"{name:<40}{row['value']:>9.2f}  {row['at_least']:>8.1f}  {mark}")
    shown.append(f"{'NLL from z~q, nats/sequence':<40}{likelihood['nll_q']:>9.2f}")
    shown.append(f"{'negative ELBO, nats/sequence':<40}{likelihood['neg_elbo']:>9.2f}")
    if baseline is not None:
        shown.append(f"{'NLL of the same decoder without z':<40}{baseline['nll_q']:>9.2f}")
    return shown


def _read(path: str, flag: str) -> dict:
    if not path or not Path(path).exists():
        raise ValueError(f"{flag} {path!r}: no such file")
    return json.loads(Path(path).read_text())


def print_report(argv: Sequence[str] | None = None) -> None:
    """Parse, print, write. Exits with 1 under --strict when a bound is missed."""
    options = parse_options(ReportOptions, "Judge a run on the sample data.", argv)
    rows = report(options)
    print("\n".join(lines(rows, _read(options.reconstruction, "--reconstruction"))))
    if options.output:
        Path(options.output).write_text(json.dumps(rows, indent=2) + "\n")
    if options.strict and not all(row["reached"] for row in rows.values()):
        raise SystemExit(1)


def main(argv: Sequence[str] | None = None) -> int:
    return run(print_report, argv)


if __name__ == "__main__":
    sys.exit(main())
