"""The training loop: step batches in, optimizer steps, and everything that happens between them.

A step batch is the data of one optimizer step, all micro-batches of all ranks, so its number of
target tokens is known before the first forward. Schedules count optimizer steps that happened: a
step that DeepSpeed refuses because a gradient was not finite consumes data, nothing else.

Legend: B rows of one rank, K rows of all ranks, Z latent.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cdpvae.batch import LossTerms, Posterior, StepPlan, VAEBatch
from cdpvae.collapse import AdaptiveInterventionScheduler, CollapseMonitor
from cdpvae.config import Settings
from cdpvae.data import Loader, StepBatch
from cdpvae.data.augmentation import TextAugmenter
from cdpvae.loss import SoftPromptVAELoss
from cdpvae.models.text_vae import VAEOutput
from cdpvae.tasks.text_vae.schedule import Planner
from cdpvae.training.checkpoint import CheckpointManager, TrainState
from cdpvae.training.distributed import World, all_gather_rows, all_reduce_sum
from cdpvae.training.telemetry import Telemetry

SCALARS = (
    "total",
    "recon",
    "kl",
    "kl_raw",
    "bow",
    "active_dims",
    "recon_nats_per_sequence",
    "neg_elbo",
    "infonce",
    "mi_bound",
)
# These two have the divisor of the step in them; the others are means over rows.
WHOLE_STEP = ("total", "recon")
MAX_REFUSED_IN_A_ROW = 10


@dataclass
class StepRecord:
    """Sums over the micro-batches of one optimizer step; `reduce` makes them means of all ranks.

    scalars: (len(SCALARS),). kl_per_dim: (Z,). posteriors: those of every micro-batch, this rank.
    """

    scalars: Tensor | None = None
    kl_per_dim: Tensor | None = None
    posteriors: list[Posterior] = field(default_factory=list)
    count: int = 0

    def add(self, output: VAEOutput) -> None:
        terms = output.terms
        values = torch.stack([_scalar(terms, name) for name in SCALARS])
        per_dim = terms.kl_per_dim.detach()
        if terms.row_weight != 1:
            weights = [1.0 if name in WHOLE_STEP else terms.row_weight for name in SCALARS]
            values = values * values.new_tensor(weights)
            per_dim = per_dim * terms.row_weight
        first = self.scalars is None
        self.scalars = values if first else self.scalars + values
        self.kl_per_dim = per_dim if first else self.kl_per_dim + per_dim
        self.count += 1
        if output.mu is not None:
            self.posteriors.append(Posterior(output.mu.detach(), output.logvar.detach()))

    def reduce(self, world_size: int) -> tuple[dict[str, float], Tensor]:
        """-> scalars by name and KL per dimension (Z,), means over micro-batches and ranks."""
        packed = all_reduce_sum(torch.cat((self.scalars, self.kl_per_dim)))
        packed = packed / (self.count * world_size)
        split = len(SCALARS)
        return dict(zip(SCALARS, packed[:split].tolist(), strict=True)), packed[split:]


def _scalar(terms: LossTerms, name: str) -> Tensor:
    """fp32 (), 0 for a term that was not computed."""
    value = getattr(terms, name)
    if value is None:
        return terms.total.new_zeros((), dtype=torch.float32)
    return value.detach().float()


class Trainer:
    """One run of one rank. `run` trains to the planned end, or to `stop_after`."""

    def __init__(
        self,
        settings: Settings,
        world: World,
        engine,
        loader: Loader,
        planner: Planner,
        monitor: CollapseMonitor,
        interventions: AdaptiveInterventionScheduler,
        augmenter: TextAugmenter | None,
        checkpoints: CheckpointManager,
        telemetry: Telemetry,
        reporter,
        tokenizer,
        total_steps: int,
    ):
        self.settings, self.world, self.engine = settings, world, engine
        self.loader, self.planner, self.augmenter = loader, planner, augmenter
        self.monitor, self.interventions = monitor, interventions
        self.checkpoints, self.telemetry, self.reporter = checkpoints, telemetry, reporter
        self.tokenizer, self.total_steps = tokenizer, total_steps
        self.state = TrainState()
        self.saved_step = 0
        self.refused_in_a_row = 0

    @property
    def loss_fn(self) -> SoftPromptVAELoss:
        return self.engine.module.loss_fn

    @property
    def last_step(self) -> int:
        stop_after = self.settings.training.stop_after
        return min(self.total_steps, stop_after or self.total_steps)

    def run(self) -> TrainState:
        """Train, log, evaluate and save until the last step.

        Raises RuntimeError when steps keep being refused for non-finite gradients.
        """
        self.engine.train()
        try:
            while self.state.step < self.last_step:
                for step_batch in self.loader.epoch():
                    self._step(step_batch)
                    self.state.epoch, self.state.step_in_epoch = self.loader.position
                    if self.state.step >= self.last_step:
                        break
        finally:
            self.loader.close()
        if self.saved_step != self.state.step:
            self.save()
        if summary := self.loader.summary():
            self.telemetry.say(summary)
        return self.state

    def resume(self, path) -> None:
        """Continue a checkpoint: everything that the next step depends on."""
        self.state, shared = self.checkpoints.load(self.engine, path)
        self.monitor.load_state_dict(shared["monitor"])
        self.interventions.load_state_dict(shared["interventions"])
        self.loss_fn.load_state_dict(shared["loss"])
        self.loader.load_state_dict(shared["loader"])
        self.saved_step = self.state.step

    def save(self) -> None:
        shared = {
            "monitor": self.monitor.state_dict(),
            "interventions": self.interventions.state_dict(),
            "loss": self.loss_fn.state_dict(),
            "loader": self.loader.state_dict(),
        }
        path = self.checkpoints.save(self.engine, self.state, shared, self.tokenizer)
        self.saved_step = self.state.step
        self.telemetry.say(f"step {self.state.step}: saved {path}")

    # One optimizer step

    def _step(self, step_batch: StepBatch) -> None:
        plan = self.planner.plan(
            self.state.step, step_batch.epoch, step_batch.target_divisor, step_batch.row_divisor
        )
        logs = self._every(self.settings.training.logging_steps, plan.step + 1)
        record, at_mu = StepRecord(), {}
        learning_rate = self.engine.get_lr()[0]
        with self._reduction():
            for number, batch in enumerate(step_batch.micro_batches):
                output = self.engine(self.prepare(batch, plan), plan)
                if logs and number == 0:
                    at_mu = gradient_norms_at_mu(self.loss_fn, output, plan)
                self.engine.backward(output.loss)
                record.add(output)
                if not self.settings.training.coalesce_gradients:
                    self.engine.step()
        if self.settings.training.coalesce_gradients:
            # Without this DeepSpeed counts one micro-batch and takes one step in grad_accum.
            self.engine.set_gradient_accumulation_boundary(True)
            self.engine.step()
        applied = self.engine.was_step_applied()
        self._count(applied)
        values, kl_per_dim = record.reduce(self.world.world_size)
        self._write_step(values, applied)
        if not applied:
            return
        self._watch(record)
        self.reporter.measure(step_batch)
        if logs:
            self.reporter.step(
                self.state.step,
                step_batch,
                plan,
                values,
                kl_per_dim,
                at_mu,
                grad_norm=_as_float(self.engine.get_global_grad_norm()),
                learning_rate=learning_rate,
            )
        self._periodic()

    def _reduction(self):
        """One gradient reduction per step instead of one per micro-batch, where asked for."""
        if self.settings.training.coalesce_gradients:
            return self.engine.coalesce_grad_reduction()
        return nullcontext()

    def prepare(self, batch: VAEBatch, plan: StepPlan) -> VAEBatch:
        """Add the augmented view where the plan asks for it, and move to the device."""
        if plan.with_view and self.augmenter is not None:
            batch.augmented = self.augmenter.view(batch.instruction, batch.sample_index, plan.epoch)
        return batch.to(self.world.device)

    def _count(self, applied: bool) -> None:
        if applied:
            self.state.step += 1
            self.refused_in_a_row = 0
            return
        self.state.skipped += 1
        self.refused_in_a_row += 1
        self.telemetry.say(
            f"step {self.state.step + 1}: refused, a gradient was not finite "
            f"({self.state.skipped} so far)"
        )
        if self.refused_in_a_row >= MAX_REFUSED_IN_A_ROW:
            raise RuntimeError(
                f"{self.refused_in_a_row} steps in a row had non-finite gradients; the last "
                f"checkpoint is step {self.saved_step}, lower the learning rate and resume there"
            )

    def _write_step(self, values: dict[str, float], applied: bool) -> None:
        step = self.state.step if applied else self.state.step + 1
        line = {**values, "grad_norm": _as_float(self.engine.get_global_grad_norm())}
        if not applied:
            line["skipped"] = True
        self.telemetry.step(step, line)

    def _watch(self, record: StepRecord) -> None:
        """Show the monitor the posteriors of all ranks; check and intervene when it is time."""
        config = self.settings.collapse
        if not config.enable_collapse_monitoring or not record.posteriors:
            return
        mu = torch.cat([all_gather_rows(p.mu) for p in record.posteriors])
        logvar = torch.cat([all_gather_rows(p.logvar) for p in record.posteriors])
        self.monitor.add(mu.cpu(), logvar.cpu())
        if not self._every(config.check_every, self.state.step):
            return
        metrics = self.monitor.check()
        line = f"step {self.state.step}: {metrics}"
        if config.collapse_interventions:
            line += f" -> {self.interventions.intervene(metrics)}"
        if metrics.is_collapsing:
            self.telemetry.say(line)
        self.reporter.collapse(self.state.step, metrics, self.interventions)

    def _periodic(self) -> None:
        training, step = self.settings.training, self.state.step
        last = step == self.last_step
        if self.reporter.evaluates and (self._every(training.eval_steps, step) or last):
            self.reporter.evaluate(step)
        if self._every(training.save_steps, step):
            self.state.epoch, self.state.step_in_epoch = self.loader.position
            self.save()

    @staticmethod
    def _every(period: int, step: int) -> bool:
        return step % period == 0


def gradient_norms_at_mu(
    loss_fn: SoftPromptVAELoss, output: VAEOutput, plan: StepPlan
) -> dict[str, float]:
    """L2 norm of d(weighted term)/d(mu) over this rank's rows, by term.

    It tells who steers the encoder. Costs one more backward pass of the decoder.
    """
    if output.mu is None or not output.mu.requires_grad:
        return {}
    norms = {}
    for name, term in loss_fn.weighted_terms(output.terms, plan).items():
        if term.requires_grad:
            (grad,) = torch.autograd.grad(term, output.mu, retain_graph=True, allow_unused=True)
            norms[name] = 0.0 if grad is None else float(grad.norm())
    return norms


def _as_float(value) -> float:
    return float(value) if value is not None else 0.0
