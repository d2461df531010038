"""The training loop: step batches in, optimizer steps, and everything that happens between them.

A step batch is the data of one optimizer step, all micro-batches of all ranks, so its number of
target tokens is known before the first forward. Schedules count optimizer steps that happened: a
step that DeepSpeed skips because a gradient was not finite consumes data, nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdpvae.config import TrainingConfig
from cdpvae.data import Loader, StepBatch
from cdpvae.training.best import BestTracker
from cdpvae.training.checkpoint import CheckpointManager, TrainState
from cdpvae.training.distributed import World, values_of_main
from cdpvae.training.engine import Engine
from cdpvae.training.step_figures import StepFigures
from cdpvae.training.task import Direction, Evaluated, LoggedStep, Observed, Stateful, Task
from cdpvae.training.telemetry import Telemetry

MAX_SKIPPED_IN_A_ROW = 10


@dataclass(frozen=True)
class RunContext:
    """What a run is beside what it trains. total_steps: of the planned schedule."""

    config: TrainingConfig
    world: World
    telemetry: Telemetry
    total_steps: int

    @property
    def last_step(self) -> int:
        """The step after which this process ends."""
        return min(self.total_steps, self.config.stop_after or self.total_steps)


class Trainer:
    """One run of one rank. `run` trains to the planned end, or to `stop_after`.

    context: settings, ranks, and where lines go.
    task: what is trained.
    engine: DeepSpeed's, around `task.module`.
    loader: the step batches of this rank.
    checkpoints: where state is kept.

    Raises ValueError for a `keep_best` that validation does not measure.
    """

    def __init__(
        self,
        context: RunContext,
        task: Task,
        engine: Engine,
        loader: Loader[Any],
        checkpoints: CheckpointManager,
    ) -> None:
        self.context, self.task, self.engine = context, task, engine
        self.loader, self.checkpoints = loader, checkpoints
        self.state = TrainState()
        self.best = BestTracker(context.config, _directions(context.config, task))
        self.saved_step = 0
        self.skipped_in_a_row = 0

    @property
    def stateful(self) -> dict[str, Stateful]:
        """Everything that a checkpoint keeps beside the engine, by name."""
        return {**self.task.stateful, "loader": self.loader}

    def run(self) -> TrainState:
        """Train, log, evaluate and save until the last step, or until there is no more gain.

        Raises RuntimeError when steps keep being skipped for non-finite gradients.
        """
        self.engine.train()
        try:
            while not self._is_over():
                for step_batch in self.loader.epoch():
                    self._step(step_batch)
                    if self._is_over():
                        break
        finally:
            self.loader.close()
        # The end of a run is a checkpoint.
        if self.saved_step != self.state.step:
            self.save()
        if self.best.is_over:
            self.context.telemetry.say(f"step {self.state.step}: {self.best.reason()}")
        for summary in (self.task.summary(), self.loader.summary()):
            if summary:
                self.context.telemetry.say(summary)
        return self.state

    def resume(self, path: Path) -> None:
        """Continue a checkpoint: everything that the next step depends on."""
        self.state, saved = self.checkpoints.load(self.engine, path, self.task.current_name)
        if saved.keys() != self.stateful.keys():
            raise ValueError(
                f"{path}: holds the state of {sorted(saved)}, this run has {sorted(self.stateful)}"
            )
        for name, part in self.stateful.items():
            part.load_state_dict(saved[name])
        self.saved_step = self.state.step
        # A run that goes on from an earlier checkpoint has the best of that time.
        self.best.load_state_dict(self.state.best)
        if self.best.state.step is not None:
            self.checkpoints.point_best_to(self.best.state.step)

    def save(self, is_best: bool = False) -> None:
        """Write a checkpoint of this step. is_best: it is the best evaluated so far."""
        self.state.epoch, self.state.step_in_epoch = self.loader.position
        states = {name: part.state_dict() for name, part in self.stateful.items()}
        self.state.best = self.best.state_dict()
        evaluated = Evaluated(**self.state.evaluated) if self.state.evaluated else None
        path = self.checkpoints.save(
            self.engine,
            self.state,
            states,
            lambda directory: self.task.save_pretrained(directory, evaluated),
            is_best,
        )
        self.saved_step = self.state.step
        best = f", the best so far by {self.best.rule}" if is_best else ""
        self.context.telemetry.say(f"step {self.state.step}: saved {path}{best}")

    def _is_over(self) -> bool:
        """Say whether the run has reached its last step, or the end of its gains."""
        return self.state.step >= self.context.last_step or self.best.is_over

    # One optimizer step

    def _step(self, step_batch: StepBatch) -> None:
        """Train on the data of one optimizer step, then log, evaluate and save as is due."""
        coalesce = self.context.config.coalesce_gradients
        schedule = self.task.schedule(self.state.step, step_batch)
        is_logged = self._is_due(self.context.config.logging_steps, schedule.step + 1)
        figures, inspected = StepFigures(), {}
        observed: list[Observed] = []
        learning_rate = self.engine.get_lr()[0]
        # Forward and backward of every micro-batch; the engine accumulates the gradients.
        with self._reduction():
            for number, batch in enumerate(step_batch.micro_batches):
                output = self.engine(self.task.prepare(batch, schedule), schedule)
                if is_logged and number == 0:
                    inspected = self.task.inspect(output)
                total = output.total
                self.engine.backward(total)
                figures.add(total, output.terms)
                observed.append(output.observed)
                if not coalesce:
                    self.engine.step()
        # Take the optimizer step, if it has not been taken with the last micro-batch.
        if coalesce:
            # Without this DeepSpeed counts one micro-batch and takes one step in grad_accum.
            self.engine.set_gradient_accumulation_boundary(True)
            self.engine.step()
        applied = self.engine.was_step_applied()
        self._count(applied)
        # Average over ranks, and write the line of the loss curve.
        scalars, vectors = figures.reduce(self.context.world.world_size)
        grad_norm = _as_float(self.engine.get_global_grad_norm())
        self._write_step(scalars, grad_norm, applied)
        if not applied:
            return
        # Let the task see the step, then log, evaluate and save.
        self.task.observe(self.state.step, step_batch, observed)
        if self.task.adapt is not None:
            self.task.adapt(scalars)
        if is_logged:
            self.task.log(
                LoggedStep(
                    step=self.state.step,
                    step_batch=step_batch,
                    schedule=schedule,
                    figures=scalars,
                    vectors=vectors,
                    inspected=inspected,
                    grad_norm=grad_norm,
                    learning_rate=learning_rate,
                )
            )
        self._periodic()

    def _reduction(self) -> AbstractContextManager[Any]:
        """Reduce gradients once a step instead of once a micro-batch, where asked for."""
        if self.context.config.coalesce_gradients:
            return self.engine.coalesce_grad_reduction()
        return nullcontext()

    def _count(self, applied: bool) -> None:
        """Count the step as taken or skipped. Raises RuntimeError for too many skipped in a row."""
        # A step counts when it was applied.
        if applied:
            self.state.step += 1
            self.skipped_in_a_row = 0
            return
        self.state.skipped += 1
        self.skipped_in_a_row += 1
        self.context.telemetry.say(
            f"step {self.state.step + 1}: skipped, a gradient was not finite "
            f"({self.state.skipped} so far)"
        )
        # One bad batch is skipped; a run that diverges is not worth its time.
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise RuntimeError(
                f"{self.skipped_in_a_row} steps in a row had non-finite gradients; the last "
                f"checkpoint is step {self.saved_step}, lower the learning rate and resume there"
            )

    def _write_step(self, scalars: dict[str, float], grad_norm: float, applied: bool) -> None:
        """Write one line of `steps.jsonl`; every line of a run has the same figures."""
        absent = {name: 0.0 for name in self.task.optional_columns if name not in scalars}
        line: dict[str, float] = {**scalars, **absent, "grad_norm": grad_norm}
        if not applied:
            line["skipped"] = True
        self.context.telemetry.step(self.state.step if applied else self.state.step + 1, line)

    def _periodic(self) -> None:
        """Evaluate and save where this step is due."""
        config, step = self.context.config, self.state.step
        is_due = self._is_due(config.eval_steps, step) or step == self.context.last_step
        is_best = False
        if self.task.evaluate is not None and is_due:
            figures = values_of_main(self.task.evaluate(step))
            self.state.evaluated = {"step": step, "figures": figures}
            # What `stop_after` adds is no evaluation of the plan: the whole run has none there.
            if self._is_due(config.eval_steps, step) or step == self.context.total_steps:
                is_best = self.best.see(step, figures)
        if is_best or self._is_due(config.save_steps, step):
            self.save(is_best)

    @staticmethod
    def _is_due(period: int, step: int) -> bool:
        return step % period == 0


def _directions(config: TrainingConfig, task: Task) -> Mapping[str, Direction]:
    """Return what validation measures, asked for where `keep_best` needs it.

    Raises ValueError where there is no validation.
    """
    if config.keep_best is None:
        return {}
    if task.evaluate is None:
        raise ValueError(
            f"training.keep_best={config.keep_best!r} needs validation rows: a validation split "
            "and eval_rows above 0"
        )
    return task.directions()


def _as_float(value: Any) -> float:
    """Return DeepSpeed's gradient norm, None before the first one, as a number."""
    return float(value) if value is not None else 0.0
