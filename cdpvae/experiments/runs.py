"""A training of a sweep as a child process, with its settings file, its log and its directory.

OUTPUT/settings/NAME.json  what it is given
OUTPUT/logs/NAME.log       what it says; later attempts are appended
OUTPUT/runs/NAME/          what it writes, checkpoints among them
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from cdpvae.experiments.plan import PlannedRun
from cdpvae.files import MANIFEST, read_json, write_text

# A stopped training gets this long before it is killed.
GRACE_SECONDS = 20.0
_ENDED = re.compile(r"^sweep: ended after ([0-9.]+) s, status (-?\d+)$", re.MULTILINE)
_LONGEST_LINE = 300


@dataclass(frozen=True)
class Trained:
    """A finished training. checkpoint: its last one. seconds: of all its attempts."""

    checkpoint: Path
    steps: int
    seconds: float


class RunFailed(Exception):
    """A training or its evaluation did not work out; the message is one line that says why."""


class ChildTrainer:
    """Start trainings and stop them.

    output: directory of the sweep. launch: words before the module's name; by default this Python.
    """

    def __init__(self, output: Path, launch: str | None = None) -> None:
        self.output = output
        self.launch = shlex.split(launch) if launch else [sys.executable, "-m"]
        self.children: set[subprocess.Popen[bytes]] = set()
        self.lock = threading.Lock()
        self.stopping = False

    def __call__(self, run: PlannedRun, device: str | None) -> Trained:
        """Train a run to its end, from its last checkpoint where it has one.

        run: what to train. device: CUDA device number, None for all.
        Raises RunFailed with the last line of its log, OSError where nothing can be started.
        """
        directory = Path(run.settings.training.output_dir)
        config = self.output / "settings" / f"{run.name}.json"
        log = self.output / "logs" / f"{run.name}.log"
        for path in (config, log):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_text(config, run.settings.dump())
        # Without a checkpoint there is nothing to continue, and old lines would mix with new ones.
        command = [*self.launch, "cdpvae.train", "--config", str(config)]
        resumed = (directory / "latest").exists()
        if resumed:
            command += ["--resume", "latest"]
        else:
            shutil.rmtree(directory, ignore_errors=True)
        # The log tells how long every attempt took.
        begun = time.monotonic()
        with log.open("ab" if resumed else "wb") as file:
            file.write(f"sweep: {shlex.join(command)}\n".encode())
            file.flush()
            status = self._wait(command, file.fileno(), device)
            seconds = time.monotonic() - begun
            file.write(f"\nsweep: ended after {seconds:.1f} s, status {status}\n".encode())
        if status:
            raise RunFailed(last_line(log) or f"exit status {status}")
        return _trained(directory, log)

    def _wait(self, command: list[str], output: int, device: str | None) -> int:
        """Start a process group and wait for its end -> exit status."""
        environment = dict(os.environ)
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        with self.lock:
            if self.stopping:
                raise RunFailed("stopped")
            # A group of its own: the keyboard's signal reaches it through `stop` only.
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
            self.children.add(child)
        try:
            return child.wait()
        except BaseException:
            # Whoever interrupts the waiting ends the training with it.
            _end(child)
            raise
        finally:
            with self.lock:
                self.children.discard(child)

    def stop(self) -> None:
        """End every training that runs, and start no other; what they saved is kept."""
        with self.lock:
            self.stopping = True
            running = list(self.children)
        for child in running:
            _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ask a process group to end, and kill what does not."""
    # The group holds the ranks of a launcher too.
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=GRACE_SECONDS)
            return


def _trained(directory: Path, log: Path) -> Trained:
    """Find what a training left. Raises RunFailed where its last checkpoint is missing."""
    # A launcher can end with 0 although its training wrote nothing.
    pointer = directory / "latest"
    checkpoint = directory / pointer.read_text().strip() if pointer.exists() else directory
    if not (checkpoint / MANIFEST).exists():
        raise RunFailed(f"{directory}: the training ended without a checkpoint")
    seconds = sum(float(found[1]) for found in _ENDED.finditer(log.read_text(errors="replace")))
    return Trained(checkpoint, int(read_json(checkpoint / "state.json")["step"]), seconds)


def last_line(log: Path) -> str:
    """Return the last line that a training itself wrote: its error, where there is one."""
    own = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    lines = [line for line in own if line and not line.startswith("sweep: ")]
    # A launcher says more after the error of a rank.
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [""])[-1][:_LONGEST_LINE]
