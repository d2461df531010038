"""Does the monitor see what collapses, and only that? Runs of six kinds, watched and helped.

    python -m benchmarks.monitor --shared runs/quickstart [--kinds healthy,high_beta] [--seeds 0,1]
        [--steps 400] [--ranks 1]

Trains a healthy kind and five that should collapse (`support/monitor_kinds.py`) on the quickstart's
data and backbone: first with interventions off, and again with them on where the run ended
collapsed. Every finished run is a row of `results/monitor_kinds.csv`; started again, the command
skips finished rows and continues the run it was stopped in. `docs/collapse.md` explains the table.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.support import rows as results
from benchmarks.support.monitor_kinds import (
    KINDS,
    ROWS_PER_STEP,
    TRAINED_DECODER,
    TRAINED_DECODER_STEPS,
    WITHOUT_LATENT,
    make_trained_decoder,
    settings_of,
)
from benchmarks.support.monitor_rows import COLLAPSED, Watch, make_row, read_checks, summary
from cdpvae.command_line import parse_options, run
from cdpvae.config import Settings
from cdpvae.experiments.measure import Evaluation
from cdpvae.experiments.plan import PlannedRun, parse_seeds, settings_hash
from cdpvae.experiments.runs import ChildTrainer, RunFailed, Trained
from cdpvae.files import locked

SECONDS_BETWEEN_LINES = 20.0


@dataclasses.dataclass
class MonitorOptions:
    """Which runs, and where the quickstart's data and backbone are."""

    shared: str = "runs/quickstart"
    """directory with backbone/ and processed/"""
    kinds: str = ",".join(KINDS)
    """kinds of run, in this order"""
    seeds: str = "0,1"
    """seeds of every kind"""
    steps: int = 400
    """optimizer steps of each run; the quickstart takes 900"""
    ranks: int = 1
    """processes of each run; 64 rows a step are divided among them"""
    num_rows: int = 1000
    """validation rows measured at the end of each run"""
    output: str = "runs/monitor"
    """directory of the runs"""
    results: str = str(results.RESULTS / "monitor_kinds.csv")
    """CSV of the rows"""

    def check(self) -> tuple[list[str], tuple[int, ...]]:
        """Return kinds and seeds. Raises ValueError, one line."""
        kinds = self.kinds.split(",")
        for kind in kinds:
            if kind not in KINDS:
                raise ValueError(f"--kinds {kind}: must be of {', '.join(KINDS)}")
        for name, least in (("steps", 1), ("ranks", 1), ("num_rows", 2)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
        if ROWS_PER_STEP % self.ranks:
            raise ValueError(
                f"--ranks {self.ranks}: must divide the {ROWS_PER_STEP} rows of a step"
            )
        for part in ("backbone", "processed"):
            if not (Path(self.shared) / part).is_dir():
                raise ValueError(
                    f"--shared {self.shared}: holds no {part}/; ./launch/quickstart.sh makes it"
                )
        return kinds, parse_seeds(self.seeds)


@dataclasses.dataclass(frozen=True)
class MonitorRun:
    """One run. planned: its name, directory and settings; its hash names no directory."""

    kind: str
    interventions: bool
    planned: PlannedRun

    @property
    def key(self) -> tuple[str, ...]:
        """What its row is found by."""
        switch = "on" if self.interventions else "off"
        return (self.kind, str(self.planned.seed), switch, self.planned.settings_hash)


def plan_run(
    options: MonitorOptions, kind: str, seed: int, *, interventions: bool = False
) -> MonitorRun:
    """Return one run of a kind."""
    shared, output = Path(options.shared), Path(options.output)
    tuned = kind == TRAINED_DECODER
    backbone = output / TRAINED_DECODER if tuned else shared / "backbone"

    def settings(backbone: str, directory: str) -> Settings:
        return settings_of(
            KINDS[kind],
            backbone=backbone,
            processed=str(shared / "processed"),
            output=directory,
            steps=options.steps,
            seed=seed,
            ranks=options.ranks,
            interventions=interventions,
        )

    # Rows are the same wherever the quickstart lies: the hash has a name for each backbone.
    named = f"backbone, {TRAINED_DECODER_STEPS} steps" if tuned else "backbone"
    digest = settings_hash(settings(named, "."), f"validation rows {options.num_rows}")
    switch = "helped" if interventions else "watched"
    name = f"{kind}_seed-{seed}_{switch}_{digest}"
    own = settings(str(backbone), str(output / "runs" / name))
    return MonitorRun(kind, interventions, PlannedRun(name, {}, seed, own, digest))


def finished_rows(path: Path) -> dict[tuple[str, ...], dict[str, str]]:
    """Return the rows of the CSV by the key of their runs."""
    rows = results.read(path) if path.exists() else []
    return {(r["kind"], r["seed"], r["interventions"], r["settings_hash"]): r for r in rows}


class Table:
    """Train what has no row yet.

    options: of the command.
    train: trains a planned run (`ChildTrainer`).
    measure: figures of a checkpoint (`Evaluation`).
    say: prints a line.
    """

    def __init__(
        self,
        options: MonitorOptions,
        train: Callable[[PlannedRun, str | None], Trained],
        measure: Callable[[Path, str | None], Mapping[str, float]],
        say: Callable[[str], None],
    ) -> None:
        self.options, self.train, self.measure, self.say = options, train, measure, say
        self.path = Path(options.results)

    def work(self, kinds: Sequence[str], seeds: Sequence[int]) -> bool:
        """Take every run in turn, and print the table -> whether all of them have a row."""
        shown: list[Mapping[str, str]] = []
        complete = True
        # A seed of every kind before the next seed: what is stopped early has seen all kinds.
        for seed in seeds:
            for kind in kinds:
                row = self._row(plan_run(self.options, kind, seed))
                complete &= row is not None
                if row is None:
                    continue
                shown.append(row)
                if row["verdict"] == COLLAPSED:
                    row = self._row(plan_run(self.options, kind, seed, interventions=True))
                    complete &= row is not None
                    shown += [] if row is None else [row]
        # By kind, as they were asked for.
        self.say("\n".join(summary(sorted(shown, key=lambda row: kinds.index(row["kind"])))))
        return complete

    def _row(self, run: MonitorRun) -> Mapping[str, str] | None:
        """Return the row of a run, made where it is missing; None where the run failed."""
        name = run.planned.name
        if (row := finished_rows(self.path).get(run.key)) is not None:
            self.say(f"{name}: has its row, {row['verdict']}")
            return row
        self.say(f"{name}: training {self.options.steps} steps")
        # One that fails is said and left out: the others are worth having.
        try:
            if run.kind == TRAINED_DECODER:
                self._make_decoder(run.planned.settings)
            with said_every(run.planned.settings, self.say):
                trained = self.train(run.planned, None)
            figures = self.measure(trained.checkpoint, None)
            watch = Watch.of(read_checks(trained.checkpoint.parent), run.planned.settings)
        except (RunFailed, ValueError, OSError) as error:
            self.say(f"{name}: failed: {' '.join(str(error).split())}")
            return None
        results.append(self.path, [self._full_row(run, trained, make_row(figures, watch))])
        row = finished_rows(self.path)[run.key]
        self.say(
            f"{name}: {row['verdict']}: cost {row['cost_shuffled']}, kl {row['kl']}; fired: "
            f"{row['first_firing_step'] or 'never'}"
        )
        return row

    def _full_row(
        self, run: MonitorRun, trained: Trained, measured: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Add what the row needs to be found, repeated and compared."""
        options, seed = self.options, run.planned.seed
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        return {
            "date": date.today().isoformat(),
            "kind": run.kind,
            "seed": seed,
            "interventions": "on" if run.interventions else "off",
            "steps": trained.steps,
            **measured,
            "rows": options.num_rows,
            "seconds": round(trained.seconds, 1),
            "settings_hash": run.planned.settings_hash,
            "command": f"python -m benchmarks.monitor --kinds {run.kind} --seeds {seed} "
            f"--steps {options.steps} --ranks {options.ranks}",
            "commit": results.commit(),
            "versions": results.versions(("torch", "transformers", "peft", "deepspeed")),
            "device": f"{options.ranks} x {device}",
        }

    def _make_decoder(self, settings: Settings) -> None:
        """Train the decoder without z, ten times as long as the quickstart, and merge it."""
        target = Path(settings.model.backbone)
        if target.is_dir():
            return
        options, shared = self.options, Path(self.options.shared)
        self.say(
            f"{TRAINED_DECODER}: training the decoder without z, {TRAINED_DECODER_STEPS} steps"
        )
        # One decoder for all seeds, as all have the same backbone.
        own = settings_of(
            WITHOUT_LATENT,
            backbone=str(shared / "backbone"),
            processed=str(shared / "processed"),
            output=str(Path(options.output) / "runs" / "decoder_without_z"),
            steps=TRAINED_DECODER_STEPS,
            seed=0,
            ranks=options.ranks,
        )
        with said_every(own, self.say):
            trained = self.train(PlannedRun("decoder_without_z", {}, 0, own, ""), None)
        make_trained_decoder(trained.checkpoint, shared / "backbone", target)
        shutil.rmtree(own.training.output_dir)


@contextmanager
def said_every(
    settings: Settings, say: Callable[[str], None], seconds: float = SECONDS_BETWEEN_LINES
) -> Iterator[None]:
    """Say how far a run is while it lasts.

    settings: of the run. say: prints a line. seconds: between two lines.
    """
    ended, directory = threading.Event(), Path(settings.training.output_dir)

    def watch() -> None:
        last = ""
        while not ended.wait(seconds):
            path = directory / "steps.jsonl"
            lines = path.read_text().splitlines() if path.exists() else []
            # A line may be cut short while it is written.
            whole = [json.loads(line) for line in lines[-2:] if line.endswith("}")]
            if (
                whole
                and (line := f"  step {whole[-1]['step']}/{settings.training.max_steps}") != last
            ):
                say(line)
                last = line

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def measure_kinds(argv: Sequence[str] | None = None) -> bool:
    """Parse, train what is missing, print the table. Raises ValueError for a user's mistake."""
    options = parse_options(MonitorOptions, "Does the monitor see what collapses?", argv)
    kinds, seeds = options.check()
    output = Path(options.output)
    launch = None
    if options.ranks > 1:
        # torchrun's module, so that no script needs to be on the path.
        words = [sys.executable, "-m", "torch.distributed.run"]
        launch = shlex.join([*words, "--nproc_per_node", str(options.ranks), "-m"])
    os.environ["OMP_NUM_THREADS"] = "1"
    # Ending this process ends the training that it waits for; a script's child ignores SIGINT.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    with locked(output):
        table = Table(
            options,
            ChildTrainer(output, launch),
            Evaluation(num_rows=options.num_rows),
            lambda line: print(line, flush=True),
        )
        return table.work(kinds, seeds)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command -> exit status: 1 where a run failed, 2 for a mistake, 130 when stopped."""
    complete: list[bool] = []
    status = run(lambda arguments: complete.append(measure_kinds(arguments)), argv)
    return status or int(not all(complete))


if __name__ == "__main__":
    sys.exit(main())
