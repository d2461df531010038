"""How well texts come back from their latents.

    python -m cdpvae.evaluate_reconstruction --checkpoint checkpoints/checkpoint-1000 \
        --num-samples 10

Likelihoods on held-out rows in nats per sequence, with the z-use test and, where a run without a
latent is given as `--baseline`, the same decoder without z; BLEU-4, ROUGE-L, exact match and token
accuracy of greedy texts from z = mu and from z ~ q(z|x); the texts side by side.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from cdpvae.command_line import parse_options, run
from cdpvae.evaluation.options import EvaluationOptions


@dataclasses.dataclass
class ReconstructionOptions(EvaluationOptions):
    """Which checkpoint, which rows, and where the result goes."""

    num_samples: int = 10
    """rows whose texts are generated and scored"""
    show: int = 5
    """of them, texts printed side by side"""
    max_length: int = 256
    """tokens per generated text"""
    output: str | None = None
    """JSON file for everything printed and all texts"""


def evaluate(argv: Sequence[str] | None = None) -> None:
    """Parse, measure, print, write. Raises ValueError for what a user can cause."""
    described = "How well texts come back from their latents."
    options = parse_options(ReconstructionOptions, described, argv)
    options.require_checkpoint()
    # Heavy imports wait until the options are known to be good.
    from cdpvae.evaluation import reconstruction
    from cdpvae.evaluation.checkpoint import RowSelection, open_run
    from cdpvae.evaluation.verdicts import compare_likelihoods

    opened = open_run(options.checkpoint, backbone=options.backbone, device=options.device)
    rows = RowSelection.of(options)
    likelihoods = compare_likelihoods(opened, options.baseline, rows, options.seed)
    print("\n".join(likelihoods.lines()))
    chosen = dataclasses.replace(rows, limit=options.num_samples)
    texts = reconstruction.generate_texts(
        opened, chosen, max_length=options.max_length, seed=options.seed
    )
    print("\n".join(reconstruction.text_lines(texts, options.show)))
    if options.output:
        reconstruction.write_texts(options.output, options.checkpoint, texts, likelihoods)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command -> exit status."""
    return run(evaluate, argv)


if __name__ == "__main__":
    sys.exit(main())
