"""How well texts come back from their latents.

    python -m cdpvae.evaluate_reconstruction --checkpoint checkpoints/checkpoint-1000 \
        --num-samples 10

Likelihoods on held-out rows in nats per sequence, with the z-use test and, where a `--latent none`
run is given as `--baseline`, the same decoder without z; BLEU-4, ROUGE-L, exact match and token
accuracy of greedy texts from z = mu and from z ~ q(z|x); the texts side by side.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from cdpvae.command_line import parse_options, run


@dataclasses.dataclass
class ReconstructionOptions:
    """Which checkpoint, which rows, and where the result goes."""

    checkpoint: str = ""
    """checkpoint-N directory of a training run"""
    baseline: str | None = None
    """checkpoint-N of a --latent none run on the same data"""
    num_samples: int = 10
    """rows whose texts are generated and scored"""
    show: int = 5
    """of them, texts printed side by side"""
    num_rows: int = 1000
    """rows of the likelihoods"""
    split: str = "validation"
    processed_dir: str | None = None
    """default: the data the run was trained on"""
    max_length: int = 256
    """tokens per generated text"""
    rows_per_batch: int = 32
    output: str | None = None
    """JSON file for everything printed and all texts"""
    seed: int = 0
    backbone: str | None = None
    """the base weights, where they moved since training"""
    device: str | None = None


def evaluate(argv: Sequence[str] | None = None) -> None:
    """Parse, load, score, print. Raises ValueError for what a user can cause."""
    options = parse_options(
        ReconstructionOptions, "How well texts come back from their latents.", argv
    )
    if not options.checkpoint:
        raise ValueError("--checkpoint is needed: a checkpoint-N directory")
    from cdpvae.evaluation.checkpoint import open_run
    from cdpvae.evaluation.verdicts import baseline_likelihood, likelihood_lines, model_likelihood

    opened = open_run(options.checkpoint, backbone=options.backbone, device=options.device)
    likelihood = model_likelihood(opened, options)
    baseline = baseline_likelihood(options)
    for line in likelihood_lines(likelihood, baseline):
        print(line)
    texts = generate_texts(opened, options)
    scores = {source: score(texts, source) for source in texts[0]["generated"]} if texts else {}
    for source, values in scores.items():
        print(f"from {source}: " + "  ".join(f"{k} {v:.3f}" for k, v in values.items()))
    for text in texts[: options.show]:
        print(f"\n  instruction: {text['instruction']}\n  reference:   {text['reference']}")
        for source, generated in text["generated"].items():
            print(f"  {source + ':':<12} {generated}")
    if options.output:
        result = {
            "checkpoint": options.checkpoint,
            "likelihood": asdict(likelihood),
            "baseline": None if baseline is None else asdict(baseline),
            "scores": scores,
            "texts": texts,
        }
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        Path(options.output).write_text(json.dumps(result, indent=2) + "\n")


@torch.no_grad()
def generate_texts(opened, options: ReconstructionOptions) -> list[dict]:
    """Greedy texts of `num_samples` rows from z = mu and from z ~ q(z|x), with their ids."""
    from cdpvae.evaluation.likelihood import EVALUATION_EPOCH

    model, texts = opened.model, []
    if not options.num_samples:
        return texts
    batches = opened.rows(
        options.processed_dir, options.split, options.num_samples, options.rows_per_batch
    )
    for batch in batches:
        sources = {"no z": None}
        moved = batch.to(model.device)
        if model.config.latent.kind != "none":
            posterior = model.posterior(moved.instruction)
            z = model.sample_posterior(
                posterior, moved.sample_index, seed=options.seed, epoch=EVALUATION_EPOCH
            )
            sources = {"z=mu": posterior.mu, "z~q": z}
        written = {
            source: model.generate(
                z, max_length=options.max_length, temperature=0, num_rows=batch.num_rows
            ).tolist()
            for source, z in sources.items()
        }
        for row, (instruction, reference) in enumerate(opened.texts(batch)):
            ids = {source: opened.tokenizer.content(rows[row]) for source, rows in written.items()}
            texts.append(
                {
                    "instruction": instruction,
                    "reference": reference,
                    "reference_ids": opened.tokenizer.content(batch.response.rows()[row].tolist()),
                    "generated": {s: opened.tokenizer.decode(i) for s, i in ids.items()},
                    "generated_ids": ids,
                }
            )
    return texts


def score(texts: list[dict], source: str) -> dict[str, float]:
    """BLEU-4, ROUGE-L, exact match and token accuracy of one source, each 0 to 1."""
    from cdpvae.metrics import ReconstructionMetrics

    metrics = ReconstructionMetrics()
    metrics.update(
        [text["generated"][source] for text in texts],
        [text["reference"] for text in texts],
        [text["generated_ids"][source] for text in texts],
        [text["reference_ids"] for text in texts],
    )
    scores = metrics.compute()
    return {
        "bleu4": scores.bleu4,
        "rouge_l": scores.rouge_l,
        "exact_match": scores.exact_match,
        "token_accuracy": scores.token_accuracy,
    }


def main(argv: Sequence[str] | None = None) -> int:
    return run(evaluate, argv)


if __name__ == "__main__":
    sys.exit(main())
