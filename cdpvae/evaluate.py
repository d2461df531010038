"""Everything about a checkpoint in one report.

    python -m cdpvae.evaluate --checkpoint DIR/checkpoint-1000 --baseline DIR0/checkpoint-1000
    python -m cdpvae.evaluate --checkpoint CK --input FILE --only reconstruction,samples --seeds 3

Groups: likelihood, use of z, latent space, reconstruction, samples from the prior, interpolation.
Every figure has its unit, cap, rows, estimator and standard error. Tables go to stdout, progress
with times to stderr; DIR/evaluation.json grows group by group, and DIR/evaluation.html is one page
with pictures that loads nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cdpvae.command_line import parse_options, run
from cdpvae.evaluation.whole.options import WholeOptions


def evaluate(argv: Sequence[str] | None = None) -> None:
    """Parse, measure, print. Raises ValueError for what a user can cause."""
    options = parse_options(WholeOptions, "Measure everything about a checkpoint.", argv)
    options.check()
    # Heavy imports wait until the options are known to be good.
    from cdpvae.evaluation.whole.run import evaluate_run

    for line in evaluate_run(options):
        print(line, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command -> exit status."""
    return run(evaluate, argv)


if __name__ == "__main__":
    sys.exit(main())
