"""Train the settings in argv[1] with soft prompts that do not depend on z."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from cdpvae.config import parse_settings
from cdpvae.tasks.text_vae.setup import build_trainer
from cdpvae.training.distributed import close_world, init_world


def main() -> None:
    settings = parse_settings(json.loads(Path(sys.argv[1]).read_text()))
    trainer = build_trainer(settings, init_world())
    projector = trainer.engine.module.model.projector
    projector.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0,))
    trainer.run()
    close_world()


if __name__ == "__main__":
    main()
