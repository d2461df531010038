"""Write the codes of a file's texts as Parquet.

python -m cdpvae.encode --checkpoint DIR/checkpoint-1000 --input FILE --output codes.parquet

Any kind of file that preprocess reads; memory does not grow with it. A killed run continues when it
is started again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cdpvae.command_line import parse_options, run
from cdpvae.evaluation.codes.options import EncodeOptions


def encode(argv: Sequence[str] | None = None) -> None:
    """Parse, encode, print. Raises ValueError for what a user can cause."""
    options = parse_options(EncodeOptions, "Write the codes of a file's texts as Parquet.", argv)
    options.check()
    # Heavy imports wait until the options are known to be good.
    from cdpvae.evaluation.checkpoint import open_run
    from cdpvae.evaluation.codes.encode import encode_file

    opened = open_run(options.checkpoint, backbone=options.backbone, device=options.device)
    print("\n".join(encode_file(opened, options).lines(options.output)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command -> exit status."""
    return run(encode, argv)


if __name__ == "__main__":
    sys.exit(main())
