"""Print the table at the end of the quickstart: does a run on the sample data use its latents?

    python -m cdpvae.sample_report --reconstruction results/reconstruction.json \
        --latents results/latents.json --attributes data/attributes.json

`cdpvae/sample/report.py` has the bounds and says how answers are scored.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from cdpvae.command_line import parse_options, run
from cdpvae.sample.report import judge_run


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


def report(argv: Sequence[str] | None = None) -> None:
    """Parse, print, write. Exits with 1 under --strict when a bound is missed."""
    options = parse_options(ReportOptions, "Judge a run on the sample data.", argv)
    result = judge_run(options.reconstruction, options.latents, options.attributes)
    print("\n".join(result.lines()))
    if options.output:
        result.save(options.output)
    if options.strict and not result.reached:
        raise SystemExit(1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run(report, argv)


if __name__ == "__main__":
    sys.exit(main())
