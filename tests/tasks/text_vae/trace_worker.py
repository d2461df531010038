"""Run one optimizer step of the settings in argv[1] and write which functions of ours it called.

argv[2]: JSON file, a list of "path:qualified name" in the order of the first call.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import cdpvae
import cdpvae_kernels
from cdpvae.config import parse_settings
from cdpvae.tasks.text_vae.setup import build_trainer
from cdpvae.training.distributed import close_world, init_world

ROOTS = {
    Path(cdpvae.__file__).parent: "cdpvae",
    Path(cdpvae_kernels.__file__).parent: "kernels/cdpvae_kernels",
}


def name_of(code) -> str | None:
    """`file:function` of a code object of ours, or None."""
    path = Path(code.co_filename)
    for root, shown in ROOTS.items():
        if path.is_relative_to(root):
            return f"{shown}/{path.relative_to(root)}:{code.co_qualname}"
    return None


def main() -> None:
    settings = parse_settings(json.loads(Path(sys.argv[1]).read_text()))
    trainer = build_trainer(settings, init_world())
    called: dict[str, None] = {}

    def note(frame, event, _) -> None:
        if event == "call" and (name := name_of(frame.f_code)) is not None:
            called.setdefault(name)

    sys.setprofile(note)
    trainer.run()
    sys.setprofile(None)
    close_world()
    Path(sys.argv[2]).write_text(json.dumps(list(called)))


if __name__ == "__main__":
    main()
