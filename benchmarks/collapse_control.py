"""Does the collapse control help? A run that collapses, with and without interventions.

    python -m benchmarks.collapse_control --shared runs/quickstart [--steps 600] [--seed 0]

Trains twice on the quickstart's data and backbone with settings that lead to a collapse (the whole
KL weight from early on, no free bits, bag of words and InfoNCE too weak to matter): once with the
monitor alone, once with interventions. Appends a row to `results/collapse_control.csv`: after how
many checks the collapse was detected, and what shuffling z costs at the end of each run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.support import rows as results
from cdpvae.command_line import parse_options, run

RESULTS = results.RESULTS / "collapse_control.csv"

# Only the KL acts on z until the decoder has learnt to read it, and the KL acts from the start.
BUILT_TO_COLLAPSE = {
    "beta_max": 1.0,
    "beta_cycles": 1,
    "beta_ramp_ratio": 0.1,
    "free_bits": 0.0,
    "bow_reduction": "categorical",
    "bow_weight": 0.02,
    "contrastive_weight": 0.01,
}
CHECK_EVERY = 20


@dataclasses.dataclass
class CollapseOptions:
    """Where the quickstart's data and backbone are, and how long to train."""

    shared: str = "runs/quickstart"
    """directory with backbone/ and processed/"""
    output: str = "runs/collapse"
    """directory of the two runs"""
    steps: int = 600
    """optimizer steps of each run"""
    seed: int = 0
    """of both runs"""
    ranks: int = 2
    """processes of each run; 64 rows a step are divided among them"""


def settings(options: CollapseOptions, interventions: bool) -> dict[str, Any]:
    """Make the settings of a small run on the quickstart's backbone."""
    # The sizes are the quickstart's; only the losses and the control differ.
    shared = Path(options.shared)
    return {
        "model": {
            "backbone": str(shared / "backbone"),
            "num_soft_tokens": 8,
            "vae_hidden_dim": 256,
            "pooling_heads": 6,
            "lora_r": 16,
        },
        "loss": BUILT_TO_COLLAPSE,
        "collapse": {
            "collapse_interventions": interventions,
            "check_every": CHECK_EVERY,
            # The defaults to relax to are those that collapse: go back slowly.
            "relaxation_rate": 0.02,
        },
        "data": {"processed_dir": str(shared / "processed")},
        "training": {
            "precision": "fp32",
            "num_threads": 1,
            "gradient_checkpointing": False,
            "per_device_batch_size": 64 // options.ranks,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-3,
            "eta_min": 1e-4,
            "max_steps": options.steps,
            "logging_steps": 50,
            "save_steps": options.steps,
            "eval_steps": options.steps,
            "sample_rows": 0,
            "seed": options.seed,
        },
    }


def train(options: CollapseOptions, interventions: bool) -> dict[str, Any]:
    """Train and evaluate -> the likelihoods of the last checkpoint, and the monitor's checks."""
    # Train over several processes, as a user would.
    directory = Path(options.output) / ("with" if interventions else "without")
    directory.mkdir(parents=True, exist_ok=True)
    config = directory / "settings-in.json"
    config.write_text(json.dumps(settings(options, interventions), indent=2))
    # torchrun's module, so that no script needs to be on the path.
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(options.ranks), "-m"]
    arguments = ["cdpvae.train", "--config", str(config), "--output-dir", str(directory / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *launcher, *arguments], check=True, env=environment)

    # The likelihoods say what z is worth at the end, the checks when the collapse was seen.
    checkpoint = directory / "run" / f"checkpoint-{options.steps}"
    result = directory / "reconstruction.json"
    evaluate = ["-m", "cdpvae.evaluate_reconstruction", "--checkpoint", str(checkpoint)]
    evaluate += ["--num-samples", "0", "--output", str(result)]
    subprocess.run([sys.executable, *evaluate], check=True)
    checks = (directory / "run" / "checks.jsonl").read_text().splitlines()
    return {**json.loads(result.read_text()), "checks": [json.loads(line) for line in checks]}


def row(options: CollapseOptions, without: dict[str, Any], with_: dict[str, Any]) -> dict[str, Any]:
    """Make a CSV row from both runs; costs, KL and NLL are nats per sequence on held-out rows."""
    # The check that saw the collapse first, counted from 1.
    detected = next(
        (n + 1 for n, check in enumerate(without["checks"]) if check["is_collapsing"]), None
    )
    # The last check records the weight that the interventions ended with.
    last = with_["checks"][-1]
    return {
        "date": date.today().isoformat(),
        "command": f"python -m benchmarks.collapse_control --steps {options.steps} "
        f"--seed {options.seed}",
        "checks_until_detected": detected,
        "check_every_steps": CHECK_EVERY,
        "shuffled_cost_without": round(without["likelihood"]["costs"]["shuffled"], 3),
        "shuffled_cost_with": round(with_["likelihood"]["costs"]["shuffled"], 3),
        "kl_without": round(without["likelihood"]["kl"], 3),
        "kl_with": round(with_["likelihood"]["kl"], 3),
        "nll_without": round(without["likelihood"]["nll_q"], 3),
        "nll_with": round(with_["likelihood"]["nll_q"], 3),
        "bow_weight_at_end": round(last["bow_weight"], 3),
        **conditions(options),
    }


def conditions(options: CollapseOptions) -> dict[str, str]:
    """Collect what a row needs to be compared with another one: commit, versions, device."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "commit": results.commit(),
        "versions": results.versions(("torch", "deepspeed")),
        "device": f"{options.ranks} x {device}",
    }


def compare(argv: Sequence[str] | None = None) -> None:
    """Parse, train both runs, append a row, print it."""
    options = parse_options(CollapseOptions, "Does the collapse control help?", argv)
    without, with_ = train(options, interventions=False), train(options, interventions=True)
    values = row(options, without, with_)
    results.append(RESULTS, [values])
    for name, value in values.items():
        print(f"{name:<24} {value}")


if __name__ == "__main__":
    sys.exit(run(compare))
