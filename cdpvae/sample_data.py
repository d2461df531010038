"""Write sample data whose information content is known: short English pairs, five attributes.

    python -m cdpvae.sample_data --output DIR [--pairs N] [--validation-pairs M] [--seed S]

Writes `pairs.jsonl` (instruction, output, split, attributes) and `attributes.json`, from which
`SampleSpec.load` scores generated text one attribute at a time. `cdpvae/sample/pairs.py` says
what a pair holds and why.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from cdpvae.command_line import parse_options, run
from cdpvae.sample.pairs import SPEC, write_pairs


@dataclasses.dataclass
class SampleOptions:
    """Where to write the sample data, and how much of it."""

    output: str = ""
    """directory to write pairs.jsonl and attributes.json to"""
    pairs: int = 12_000
    """training pairs, all of different attribute combinations"""
    validation_pairs: int = 1_000
    """pairs of held-out combinations"""
    seed: int = 0
    """of the drawn combinations and templates; the same seed writes the same bytes"""


def write(argv: Sequence[str] | None = None) -> None:
    """Parse, write, print. Raises ValueError for what a user can cause."""
    options = parse_options(SampleOptions, "Write sample data with known attributes.", argv)
    if not options.output:
        raise ValueError("--output is missing; name a directory to write to")
    file, _ = write_pairs(options.output, options.pairs, options.validation_pairs, options.seed)
    print(
        f"{options.pairs} training and {options.validation_pairs} validation pairs in "
        f"{file}, {SPEC.nats:.2f} nats of attributes each"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run(write, argv)


if __name__ == "__main__":
    sys.exit(main())
