"""Is the latent space alive, and is it used?

    python -m cdpvae.check_latents --checkpoint checkpoints/checkpoint-1000

Active units at four thresholds, KL per dimension, mutual information beside its cap, effective
rank and pairwise similarities of the posterior means, each with its value, healthy range and
verdict; the z-use test, without which none of them proves anything; a PNG.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from cdpvae.command_line import parse_options, run
from cdpvae.evaluation.options import EvaluationOptions


@dataclasses.dataclass
class LatentOptions(EvaluationOptions):
    """Which checkpoint, which rows, and where the result goes."""

    output: str = "results"
    """directory of latents.json and latents.png"""


def check(argv: Sequence[str] | None = None) -> None:
    """Parse, measure, print, write. Raises ValueError for what a user can cause."""
    options = parse_options(LatentOptions, "Is the latent space alive, and is it used?", argv)
    options.require_checkpoint()
    # Heavy imports wait until the options are known to be good.
    from cdpvae.evaluation.checkpoint import RowSelection, open_run
    from cdpvae.evaluation.latents import judge_latents, measure_latents, write_latents
    from cdpvae.evaluation.verdicts import compare_likelihoods, verdict_lines

    opened = open_run(options.checkpoint, backbone=options.backbone, device=options.device)
    rows = RowSelection.of(options)
    figures = measure_latents(opened, rows)
    verdicts = judge_latents(figures, opened.settings.loss.free_bits)
    likelihoods = compare_likelihoods(opened, options.baseline, rows, options.seed)
    print("\n".join([*verdict_lines(verdicts), *likelihoods.lines()]))
    written = write_latents(options.output, options.checkpoint, figures, verdicts, likelihoods)
    print(f"wrote {' and '.join(map(str, written))}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command -> exit status."""
    return run(check, argv)


if __name__ == "__main__":
    sys.exit(main())
