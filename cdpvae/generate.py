"""Write text from latents: of given instructions, between two of them, or from the prior.

python -m cdpvae.generate --checkpoint checkpoints/checkpoint-1000 --text "Describe a trip."
python -m cdpvae.generate --checkpoint ... --text "first" "second" --interpolate --num-steps 7
python -m cdpvae.generate --checkpoint ... --samples 5 --temperature 0.8 --top-p 0.9
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cdpvae.command_line import parse_options, run
from cdpvae.evaluation.options import GenerateOptions


def generate(argv: Sequence[str] | None = None) -> None:
    """Parse, load, write. Raises ValueError for what a user can cause."""
    options = parse_options(GenerateOptions, "Write text from the latents of a cdpvae.", argv)
    options.check()
    # Heavy imports wait until the options are known to be good.
    from cdpvae.evaluation.checkpoint import open_run
    from cdpvae.evaluation.generation import write_from_latents

    opened = open_run(options.checkpoint, backbone=options.backbone, device=options.device)
    for label, text in write_from_latents(opened, options):
        print(f"{label}  {text}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command -> exit status."""
    return run(generate, argv)


if __name__ == "__main__":
    sys.exit(main())
