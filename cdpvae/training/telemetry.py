"""What a run tells: console, TensorBoard, and one JSON line per optimizer step.

Only rank 0 writes. `steps.jsonl` holds the whole loss curve at full precision, so that two runs
can be compared exactly, and `checks.jsonl` every check of the collapse monitor; TensorBoard and the
console follow `logging_steps`.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from cdpvae.files import write_text
from cdpvae.training.distributed import World

STEPS_FILE = "steps.jsonl"
CHECKS_FILE = "checks.jsonl"


class Telemetry:
    """Scalars and texts of one run. On other ranks than 0 every method does nothing."""

    def __init__(self, output_dir: str | Path, world: World) -> None:
        self.active = world.is_main
        self.directory = Path(output_dir)

    def start(self, first_step: int) -> None:
        """Open the files; a resumed run drops the lines of steps it is about to repeat.

        Comes after everything that can refuse a run, so that a refused one loses no line.
        first_step: steps taken before, 0 for a new run.
        """
        if not self.active:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        for name in (STEPS_FILE, CHECKS_FILE):
            self._keep_until(self.directory / name, first_step)
        self.board = SummaryWriter(str(self.directory / "logs"), purge_step=first_step or None)

    @staticmethod
    def _keep_until(path: Path, step: int) -> None:
        """Drop lines of later steps, and a last line that was cut short."""
        if not path.exists():
            return
        # A line without its end was cut short by a kill.
        lines = [line for line in path.read_text().splitlines(keepends=True) if line[-1:] == "\n"]
        write_text(path, "".join(line for line in lines if json.loads(line)["step"] <= step))

    def step(self, step: int, values: dict[str, float]) -> None:
        """Append one line of the loss curve and close the file: a killed process loses no line."""
        self._append(STEPS_FILE, {"step": step, **values})

    def check(self, step: int, values: dict[str, float]) -> None:
        """Write one check of the collapse monitor and the weights that follow from it."""
        self._append(CHECKS_FILE, {"step": step, **values})

    def _append(self, name: str, values: dict[str, float]) -> None:
        if self.active:
            with (self.directory / name).open("a") as file:
                file.write(json.dumps(values) + "\n")

    def scalars(self, step: int, values: dict[str, float], prefix: str = "") -> None:
        """Write scalars to TensorBoard; names may contain '/'."""
        if self.active:
            for name, value in values.items():
                self.board.add_scalar(prefix + name, value, step)

    def per_dimension(self, step: int, name: str, values_Z: Tensor) -> None:
        """Write one scalar for every latent dimension (Z,), and their histogram."""
        if self.active:
            for dim, value in enumerate(values_Z.tolist()):
                self.board.add_scalar(f"{name}/{dim:03d}", value, step)
            self.board.add_histogram(f"{name}_histogram", values_Z, step)

    def text(self, step: int, name: str, text: str) -> None:
        """Write a text to TensorBoard and the console."""
        if self.active:
            self.board.add_text(name, text.replace("\n", "\n\n"), step)
            self.say(text)

    def say(self, line: str) -> None:
        """Print one line on the console."""
        if self.active:
            print(line, flush=True)

    def close(self) -> None:
        """Flush and close TensorBoard's file."""
        if self.active:
            self.board.close()
