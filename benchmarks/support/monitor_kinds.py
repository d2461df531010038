"""The kinds of run that the monitor is tried on: one healthy, five that should collapse.

All have the quickstart's sizes, data and backbone, and `recommended.json`; a kind changes what its
name says and nothing else.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cdpvae.config import Settings, parse_settings
from cdpvae.models.text_vae import LlamaSoftPromptVAE

RECOMMENDED = Path(__file__).resolve().parents[2] / "cdpvae" / "configs" / "recommended.json"
ROWS_PER_STEP = 64
# Steps of the quickstart's decoder without z; the trained decoder has ten times as many.
BASELINE_STEPS = 150
TRAINED_DECODER_STEPS = 10 * BASELINE_STEPS
TRAINED_DECODER = "trained_decoder"

# Groups of settings that each kind changes.
KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "healthy": {},
    # What is read of a text stays what random weights make of it.
    "frozen_posterior": {"training": {"part_learning_rates": {"pooling": 0, "latent": 0}}},
    "high_beta": {"loss": {"beta_max": 4.0, "free_bits": 0.0}},
    # The decoder reads every word, and nothing else asks anything of z.
    "no_pressure": {
        "loss": {"word_dropout": 0.0, "bow_weight": 0.0, "contrastive_weight": 0.0},
        "augmentation": {"augmentation_probability": 0.0},
    },
    "frozen_projector": {"training": {"part_learning_rates": {"projector": 0}}},
    # Its backbone is what changes: `make_trained_decoder`.
    TRAINED_DECODER: {},
}
# The quickstart's sizes for two cores (launch/quickstart.sh).
SIZES: dict[str, dict[str, Any]] = {
    "model": {"num_soft_tokens": 8, "vae_hidden_dim": 256, "pooling_heads": 6, "lora_r": 16},
    "training": {
        "precision": "fp32",
        "num_threads": 1,
        "gradient_checkpointing": False,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "eta_min": 1e-4,
    },
}
# The decoder without z, as the quickstart trains it.
WITHOUT_LATENT: Mapping[str, Mapping[str, Any]] = {
    "model": {"latent": {"kind": "none"}},
    "loss": {"word_dropout": 0.0},
}


def settings_of(
    changes: Mapping[str, Mapping[str, Any]],
    *,
    backbone: str,
    processed: str,
    output: str,
    steps: int,
    seed: int,
    ranks: int,
    interventions: bool = False,
) -> Settings:
    """Return the settings of a run.

    changes: groups of a kind.
    backbone, processed: directories of the quickstart.
    output: directory of the run.
    steps: planned and taken.
    seed: of every random decision.
    ranks: processes among which the rows of a step are divided.
    interventions: off, the monitor measures and writes only.
    """
    own: dict[str, dict[str, Any]] = {
        "model": {"backbone": backbone},
        "collapse": {"collapse_interventions": interventions},
        "data": {"processed_dir": processed},
        "training": {
            "output_dir": output,
            "max_steps": steps,
            "seed": seed,
            "per_device_batch_size": ROWS_PER_STEP // ranks,
            # Often enough that little is lost when it is stopped; none of it changes a figure.
            "save_steps": 100,
            "keep_checkpoints": 1,
            "logging_steps": 50,
            "eval_steps": steps,
            "eval_rows": 256,
            "sample_rows": 0,
        },
    }
    content: dict[str, dict[str, Any]] = {}
    parts: list[Mapping[str, Mapping[str, Any]]]
    parts = [json.loads(RECOMMENDED.read_text()), SIZES, changes, own]
    for part in parts:
        for group, values in part.items():
            content.setdefault(group, {}).update(values)
    return parse_settings(content)


def make_trained_decoder(checkpoint: Path, backbone: Path, output: Path) -> None:
    """Write a backbone whose weights hold the LoRA of a run without a latent.

    checkpoint: of that run. backbone: what it was trained on, whose tokenizer is kept. output: the
    new directory. No setting lets a run start from another run's LoRA. Merged, it serves the
    encoder pass as well, and the run's own LoRA starts on top of it.
    """
    model = LlamaSoftPromptVAE.from_pretrained(checkpoint, backbone=str(backbone))
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    # The tokenizer's files stay as they are, so that the processed data still belongs to them.
    shutil.copytree(backbone, partial, ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
    merged: Any = model.backbone.peft.merge_and_unload()
    merged.save_pretrained(partial)
    partial.rename(output)
