"""Collapse control in the loop: show the monitor every step's codes, intervene when it is time."""

from __future__ import annotations

import time
from typing import Any

from cdpvae.collapse import AdaptiveInterventionScheduler, CollapseMetrics, CollapseMonitor
from cdpvae.config import CollapseConfig
from cdpvae.tasks.text_vae.use_probe import PassTimes, UseProbe
from cdpvae.training.distributed import all_gather_rows
from cdpvae.training.task import Observed
from cdpvae.training.telemetry import Telemetry


class CollapseControl:
    """Watch the codes of all ranks; the same decisions on every rank.

    config: when to check, and whether to intervene.
    monitor: judges the latent's health.
    interventions: holds the weights that a check may move.
    telemetry: takes lines and scalars.
    probe: measures the use of z where the monitor watches it.
    """

    def __init__(
        self,
        config: CollapseConfig,
        monitor: CollapseMonitor,
        interventions: AdaptiveInterventionScheduler,
        telemetry: Telemetry,
        probe: UseProbe | None = None,
    ) -> None:
        self.config, self.monitor = config, monitor
        self.interventions, self.telemetry = interventions, telemetry
        self.probe, self.times = probe, PassTimes()

    def observe(self, step: int, observed: list[Observed]) -> None:
        """Take in the codes of one optimizer step, a mapping a micro-batch; check when due."""
        if not self.config.enable_collapse_monitoring:
            return
        self.times.step_ends()
        self._take_in(observed)
        if step % self.config.check_every == 0:
            self._check(step)
        self.times.step_begins()

    def summary(self) -> str:
        """Return one line on the time of the probe at the end of a run; empty without one."""
        # A run that was over when it was resumed has taken no step.
        if self.probe is None or self.times.last is None:
            return ""
        return self.times.describe(self.config.check_every)

    def _take_in(self, observed: list[Observed]) -> None:
        """Show the monitor the codes of all ranks."""
        # Gather the codes of every micro-batch from all ranks.
        code_type = self.monitor.family.code_type
        names = code_type.names()
        codes = [
            code_type(**{name: all_gather_rows(tensors[name]) for name in names})
            for tensors in observed
        ]
        self.monitor.add(code_type.concat(codes))

    def _check(self, step: int) -> None:
        """Measure the use of z where it is watched, judge, and intervene."""
        window = self.monitor.use
        if self.probe is not None and window is not None:
            began = time.perf_counter()
            window.add(*self.probe.measure(window.next_row))
            self.times.passes.append(time.perf_counter() - began)
        # Judge, intervene, and say so where it collapses.
        metrics = self.monitor.check(step)
        line = f"step {step}: {metrics}"
        if self.config.collapse_interventions:
            line += f" -> {self.interventions.intervene(metrics)}"
        if metrics.is_collapsing:
            self.telemetry.say(line)
        self._write(step, metrics)

    def _write(self, step: int, metrics: CollapseMetrics) -> None:
        """Write the scalars of one check."""
        # The figures of the check, and the weights from now on.
        moved = self.interventions
        scalars: dict[str, Any] = {
            **metrics.health,
            **({} if metrics.use is None else metrics.use.figures()),
            "level": int(metrics.level),
            "bow_weight": moved.bow_weight,
            "contrastive_weight": moved.contrastive_weight,
            "word_dropout": moved.word_dropout,
        }
        scalars = {name: float(value) for name, value in scalars.items()}
        self.telemetry.scalars(step, scalars, "collapse/")
        self.telemetry.check(step, {**scalars, "is_collapsing": metrics.is_collapsing})
