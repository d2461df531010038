"""Measure a rate-distortion curve: train over settings and seeds, evaluate, table and draw.

    python -m cdpvae.sweep --config base.json --vary loss.beta_max=0.1,0.3,1 --seeds 0,1,2 \\
        --output runs/sweep [flags of training] [--baseline RUN0/checkpoint-1000]

Writes OUTPUT/sweep.csv and OUTPUT/sweep.png after every run. The same command again goes on where
it stopped, from the CSV alone if need be. docs/sweep.md says more.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cdpvae.command_line import parse_settings_and, run
from cdpvae.experiments.options import SweepOptions


def sweep(argv: Sequence[str] | None = None) -> bool:
    """Parse, plan, train and measure. Raises ValueError for what a user can cause."""
    settings, options = parse_settings_and(SweepOptions, "Measure a rate-distortion curve.", argv)
    devices = options.check()
    # Heavy imports wait until the options are known to be good.
    from cdpvae.experiments.chart import read_published
    from cdpvae.experiments.measure import Evaluation
    from cdpvae.experiments.plan import make_plan, parse_seeds, parse_varied
    from cdpvae.experiments.runs import ChildTrainer
    from cdpvae.experiments.sweep import Sweep

    output = Path(options.output)
    published = read_published(options.published) if options.published else []
    evaluation = Evaluation(options.num_rows, options.rows_per_batch, options.baseline)
    evaluation.check()
    varied = [parse_varied(text) for text in options.vary]
    seeds = parse_seeds(options.seeds)
    plan = make_plan(settings, varied, seeds, output, evaluation.identity())
    work = Sweep(output, ChildTrainer(output, options.launch), evaluation, published)
    return work.run(plan, devices)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `sweep` -> exit status: 1 where a run failed, 2 for a mistake, 130 when interrupted."""
    finished = []
    status = run(lambda arguments: finished.append(sweep(arguments)), argv)
    return status or int(not all(finished))


if __name__ == "__main__":
    sys.exit(main())
