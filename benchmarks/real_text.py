"""One row a finished run on real text: what was trained, for how long, and what it can do.

    python -m cdpvae.train --config cdpvae/configs/autoencoder.json --output-dir RUN ... | tee LOG
    python -m cdpvae.evaluate --checkpoint RUN/checkpoint-N --output RUN/results ...
    python -m benchmarks.real_text --corpus coco --run RUN --log LOG

Appends to `results/real_text.csv`; the figures are those of the run's `evaluation.json`, on its
validation rows. `gain_in_last_fifth` is how much the NLL from z ~ q still fell over the last fifth
of the validations that the log shows: below 0.3 nats the curve has flattened.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.support import rows as results
from cdpvae.command_line import parse_options, run

RESULTS = results.RESULTS / "real_text.csv"

# Columns by the figure of `evaluation.json` that they hold; what was not measured stays empty.
FIGURES = {
    "nll_q": "NLL from z ~ q",
    "kl": "KL",
    "neg_elbo": "-ELBO",
    "iw_nll": "IW-NLL",
    "no_z_backbone": "NLL of the backbone itself",
    "no_z_tuned": "NLL of the decoder without z",
    "neg_elbo_minus_no_z": "-ELBO minus NLL without z",
    "cost_shuffled": "cost of z shuffled",
    "cost_prior": "cost of z from the prior",
    "bleu4_mu": "BLEU-4, z=mu",
    "bleu4_q": "BLEU-4, z~q",
    "rouge_l_mu": "ROUGE-L, z=mu",
    "exact_match_mu": "exact match, z=mu",
    "token_accuracy_mu": "token accuracy, z=mu",
}
VALIDATION = re.compile(r"^step (\d+): validation, .*: nll ([\d.]+) nats", re.MULTILINE)
DONE = re.compile(r"^done: (\d+) steps", re.MULTILINE)


@dataclasses.dataclass
class RealTextOptions:
    """Which run a row is made of."""

    corpus: str = ""
    """name of the corpus, such as coco"""
    recipe: str = ""
    """name of the settings file"""
    run: str = ""
    """directory of the run, with settings.json and results/evaluation.json"""
    log: str = ""
    """what the training printed"""
    seconds: float | None = None
    """wall time of the training"""


def figures(evaluation: dict[str, Any]) -> dict[str, float]:
    """Return the columns that an evaluation has, each with its standard error beside it."""
    by_name = {f["name"]: f for group in evaluation["groups"].values() for f in group["figures"]}
    found = {}
    for column, name in FIGURES.items():
        if (figure := by_name.get(name)) is not None:
            found[column] = figure["value"]
            if figure["standard_error"] is not None:
                found[f"{column}_se"] = figure["standard_error"]
    return found


def gain_in_last_fifth(log: str) -> float | None:
    """Return how far the validation NLL fell over the last fifth of the run; None without two."""
    curve = [(int(step), float(nll)) for step, nll in VALIDATION.findall(log)]
    if len(curve) < 2:
        return None
    # The last validation before the last fifth began, or the first there is.
    last_step, last = curve[-1]
    before = [nll for step, nll in curve[:-1] if step <= 0.8 * last_step] or [curve[0][1]]
    return round(before[-1] - last, 4)


def row_of(options: RealTextOptions) -> dict[str, Any]:
    """Bring together settings, log and evaluation of a run. Raises ValueError without them."""
    run_directory = Path(options.run)
    try:
        settings = json.loads((run_directory / "settings.json").read_text())
        evaluation = json.loads((run_directory / "results" / "evaluation.json").read_text())
        log = Path(options.log).read_text()
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"--run {options.run}, --log {options.log}: {error}") from None
    # What was trained, and for how long.
    model, loss, training = settings["model"], settings["loss"], settings["training"]
    done = DONE.findall(log)
    row = {
        "corpus": options.corpus,
        "recipe": options.recipe,
        "seed": training["seed"],
        "latent_dim": model["latent"].get("latent_dim"),
        "rate_target": loss["rate_target"],
        "rows_per_micro_batch": training["per_device_batch_size"],
        "steps": done[-1] if done else None,
        "train_seconds": options.seconds,
        "gain_in_last_fifth": gain_in_last_fifth(log),
    }
    return row | {name: round(value, 4) for name, value in figures(evaluation).items()}


def keep(argv: Sequence[str] | None = None) -> None:
    """Append the row of a run."""
    options = parse_options(RealTextOptions, "One row a finished run on real text.", argv)
    if not (options.corpus and options.run and options.log):
        raise ValueError("--corpus, --run and --log are needed: see the head of this module")
    row = row_of(options)
    # Where the run lay on one machine says nothing to another.
    arguments = ["--corpus", options.corpus, "--recipe", options.recipe]
    conditions = results.conditions("benchmarks.real_text", arguments, torch.device("cpu"))
    results.append(RESULTS, [row | conditions])
    print(json.dumps(row, indent=2))


if __name__ == "__main__":
    sys.exit(run(keep))
