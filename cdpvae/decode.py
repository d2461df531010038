"""Write the texts of codes as JSON lines.

python -m cdpvae.decode --checkpoint DIR/checkpoint-1000 --input codes.parquet --output texts.jsonl
python -m cdpvae.decode ... --from sample --temperature 0.8 --top-p 0.9

A killed run continues when it is started again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cdpvae.command_line import parse_options, run
from cdpvae.evaluation.codes.options import DecodeOptions


def decode(argv: Sequence[str] | None = None) -> None:
    """Parse, write, print. Raises ValueError for what a user can cause."""
    options = parse_options(DecodeOptions, "Write the texts of codes as JSON lines.", argv)
    options.check()
    # Heavy imports wait until the options are known to be good.
    from cdpvae.evaluation.checkpoint import open_run
    from cdpvae.evaluation.codes.decode import decode_file

    opened = open_run(options.checkpoint, backbone=options.backbone, device=options.device)
    print(f"{options.output}: {decode_file(opened, options):,} texts")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command -> exit status."""
    return run(decode, argv)


if __name__ == "__main__":
    sys.exit(main())
