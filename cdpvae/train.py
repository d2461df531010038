"""Train a cdpvae under DeepSpeed ZeRO-2.

    deepspeed --num_gpus 2 --module cdpvae.train --phase 1
    torchrun --nproc_per_node 2 -m cdpvae.train --phase 1
    python -m cdpvae.train --phase 1                         one process

Reads the processed data of `python -m cdpvae.preprocess`, writes checkpoints and logs below
`--output-dir`. `--resume latest` continues bit for bit, on a GPU with `--deterministic`.
`--print-config` shows every setting.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from cdpvae.command_line import parse_settings_and, run


@dataclasses.dataclass
class TrainOptions:
    """Training has no flags beside the settings."""


def train(argv: Sequence[str] | None = None) -> None:
    """Parse, build, train. Raises ValueError for what a user can cause."""
    settings, _ = parse_settings_and(TrainOptions, "Train a cdpvae under DeepSpeed ZeRO-2.", argv)
    # Heavy imports wait until the settings are known to be good.
    from cdpvae.tasks.text_vae.setup import build_trainer
    from cdpvae.training.distributed import close_world, init_world

    world = init_world()
    try:
        trainer = build_trainer(settings, world)
        state = trainer.run()
        trainer.context.telemetry.say(f"done: {state.step} steps, {state.skipped} skipped")
        trainer.context.telemetry.close()
    finally:
        close_world()


def main(argv: Sequence[str] | None = None) -> int:
    """Run `train` -> exit status: 2 for what a user can cause, with one line on stderr."""
    return run(train, argv)


if __name__ == "__main__":
    sys.exit(main())
