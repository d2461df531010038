"""What a run tells: console, TensorBoard, and one JSON line per optimizer step.

Only rank 0 writes. `steps.jsonl` holds the whole loss curve at full precision, so that two runs
can be compared exactly; TensorBoard and the console follow `logging_steps`.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from cdpvae.training.distributed import World


class Telemetry:
    """Scalars and texts of one run. On other ranks than 0 every method does nothing."""

    def __init__(self, output_dir: str | Path, world: World, first_step: int = 0):
        """A resumed run (`first_step` > 0) drops the lines of steps it is about to repeat."""
        self.active = world.is_main
        if not self.active:
            return
        directory = Path(output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / "steps.jsonl"
        self._keep_before(first_step)
        self.file = self.path.open("a")
        self.board = SummaryWriter(str(directory / "logs"), purge_step=first_step or None)

    def _keep_before(self, first_step: int) -> None:
        if not self.path.exists():
            return
        kept = [
            line
            for line in self.path.read_text().splitlines(keepends=True)
            if line.endswith("\n") and json.loads(line)["step"] <= first_step
        ]
        self.path.write_text("".join(kept) if first_step else "")

    def step(self, step: int, values: dict[str, float]) -> None:
        """One line of the loss curve, written through at once."""
        if self.active:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
            self.file.flush()

    def scalars(self, step: int, values: dict[str, float], prefix: str = "") -> None:
        """To TensorBoard; names may contain '/'."""
        if self.active:
            for name, value in values.items():
                self.board.add_scalar(prefix + name, value, step)

    def per_dimension(self, step: int, name: str, values_Z: Tensor) -> None:
        """One scalar for every latent dimension, and their histogram."""
        if self.active:
            for dim, value in enumerate(values_Z.tolist()):
                self.board.add_scalar(f"{name}/{dim:03d}", value, step)
            self.board.add_histogram(f"{name}_histogram", values_Z, step)

    def text(self, step: int, name: str, text: str) -> None:
        """To TensorBoard and the console."""
        if self.active:
            self.board.add_text(name, text.replace("\n", "\n\n"), step)
            self.say(text)

    def say(self, line: str) -> None:
        """To the console."""
        if self.active:
            print(line, flush=True)

    def close(self) -> None:
        if self.active:
            self.file.close()
            self.board.close()
