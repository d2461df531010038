"""A sweep from its first run to its last: what is missing is trained, measured and tabled.

The table decides what is missing, so that a sweep goes on where it stopped, also without its run
directories.
"""

from __future__ import annotations

import importlib.metadata
import queue
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cdpvae.experiments.chart import Published, draw_curve
from cdpvae.experiments.plan import PlannedRun
from cdpvae.experiments.runs import RunFailed, Trained
from cdpvae.experiments.table import FAILED, FINISHED, Row, SweepTable
from cdpvae.files import locked

Measure = Callable[[Path, str | None], dict[str, float]]
# Signals that end a sweep in order.
STOPPING = (signal.SIGTERM, signal.SIGINT)
VERSIONS_OF = ("cdpvae", "torch", "transformers", "deepspeed")


class TrainRun(Protocol):
    """Trains a run on a device. `stop` ends what is running."""

    def __call__(self, run: PlannedRun, device: str | None) -> Trained:
        """Train to the end. Raises RunFailed with one line."""

    def stop(self) -> None:
        """End running trainings and refuse further ones."""


@dataclass(frozen=True)
class Sweep:
    """What a sweep works with.

    output: its directory. train: trains a run. measure: figures of a checkpoint. published: rows
    of papers for the picture. say: prints a line.
    """

    output: Path
    train: TrainRun
    measure: Measure
    published: Sequence[Published] = ()
    say: Callable[[str], None] = print

    def run(self, plan: Sequence[PlannedRun], devices: Sequence[str | None] = (None,)) -> bool:
        """Do all runs that have no finished row -> whether every one of the plan has it now.

        plan: all runs. devices: CUDA device numbers, a run on each at a time; (None,) for one
        run after another. Raises ValueError for a table of other settings, KeyboardInterrupt
        after SIGINT or SIGTERM, when trainings have been stopped.
        """
        with locked(self.output), _signals_interrupt():
            # Every row is compared with its settings before any run starts.
            table = SweepTable(self.output / "sweep.csv", list(plan[0].varied))
            if table.torn:
                self.say(f"{table.path}: its last line was cut short and is left out")
            missing = [run for run in plan if not table.finished(run)]
            self.say(f"{len(plan)} runs, {len(plan) - len(missing)} of them finished before")
            self._draw(table)
            self._work(missing, table, devices)
            # What this plan asks for, whatever else the table holds.
            self.say("\n".join(table.lines()))
            return all(table.finished(run) for run in plan)

    def _work(
        self, missing: Sequence[PlannedRun], table: SweepTable, devices: Sequence[str | None]
    ) -> None:
        """Take runs from a queue, a thread a device; the first interruption ends them all."""
        waiting: queue.SimpleQueue[PlannedRun] = queue.SimpleQueue()
        for run in missing:
            waiting.put(run)
        stopped, one_at_a_time = threading.Event(), threading.Lock()

        def take(device: str | None) -> None:
            while not stopped.is_set():
                try:
                    run = waiting.get_nowait()
                except queue.Empty:
                    return
                self._one(run, table, device, stopped, one_at_a_time)

        # Signals reach the main thread, which only waits.
        with ThreadPoolExecutor(len(devices)) as pool:
            futures = [pool.submit(take, device) for device in devices]
            try:
                wait(futures)
            except BaseException:
                stopped.set()
                self.train.stop()
                raise
        for future in futures:
            future.result()

    def _one(
        self,
        run: PlannedRun,
        table: SweepTable,
        device: str | None,
        stopped: threading.Event,
        one_at_a_time: threading.Lock,
    ) -> None:
        """Train and measure a run, and give it its row.

        run: which one.
        table: gets the row.
        device: where it trains.
        stopped: set when the sweep was interrupted; a run that this ended gets no row.
        one_at_a_time: held while a run is measured and written down.
        """
        self.say(f"{run.name}: training" + ("" if device is None else f" on device {device}"))
        trained, figures, problem = None, {}, ""
        try:
            trained = self.train(run, device)
            with one_at_a_time:
                if stopped.is_set():
                    return
                figures = self.measure(trained.checkpoint, device)
        except (RunFailed, ValueError, RuntimeError, OSError) as error:
            problem = " ".join(str(error).split()) or type(error).__name__
        # An interrupted training is no failed one: it goes on at the next start.
        if stopped.is_set() and problem:
            return
        with one_at_a_time:
            row = make_row(run, trained, figures, problem)
            table.put(row)
            self._draw(table)
        figures_said = ", ".join(
            f"{name} {figures[name]:.3f}" for name in ("kl", "nll_q", "neg_elbo") if name in figures
        )
        self.say(f"{run.name}: {row['status']}: {problem or figures_said}")

    def _draw(self, table: SweepTable) -> None:
        draw_curve(self.output / "sweep.png", table.rows, table.varied, self.published)


def make_row(
    run: PlannedRun, trained: Trained | None, figures: dict[str, float], problem: str
) -> Row:
    """Write down a run as a row of the table.

    run: which one.
    trained: None where training failed.
    figures: by column.
    problem: one line where training or evaluation failed, else empty.
    """
    # A failed run keeps what is known of it.
    row: dict[str, Any] = {"run": run.name, **run.varied, "seed": run.seed}
    row["status"] = FAILED if problem else FINISHED
    if trained is not None:
        row |= {"steps": trained.steps, "seconds": f"{trained.seconds:.1f}"}
    row |= {name: repr(float(value)) for name, value in figures.items()}
    row |= {"settings_hash": run.settings_hash, "commit": commit(), "versions": versions()}
    row["last_line"] = problem
    return {name: str(value) for name, value in row.items()}


def commit() -> str:
    """Find the short hash of the checkout the code is in, "+" for changed files; else nothing."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        # Below someone else's repository, as in a virtual environment, the file is not tracked.
        tracked = [*git, "ls-files", "--error-unmatch", Path(__file__).name]
        if subprocess.run(tracked, capture_output=True).returncode:
            return ""
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True)
    except OSError:
        return ""
    return head.stdout.decode().strip() + ("+" if changed.returncode else "")


def versions() -> str:
    """List installed versions, as in "torch 2.13.0; transformers 5.0"."""
    # A package that runs from its folder has no version that could be looked up.
    found = []
    for package in VERSIONS_OF:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return "; ".join(found)


class _signals_interrupt:
    """While it lasts, SIGTERM and SIGINT do what the keyboard's interrupt does."""

    def __enter__(self) -> None:
        # Only the main thread may set handlers; in another one nothing is changed.
        self.main = threading.current_thread() is threading.main_thread()
        if self.main:
            # SIGINT too: a process that a script started in the background ignores it by default.
            self.before = {number: signal.signal(number, _interrupt) for number in STOPPING}

    def __exit__(self, *details: object) -> None:
        if self.main:
            for number, handler in self.before.items():
                signal.signal(number, handler)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
