"""What is computed only to be looked at: logging lines, evaluation, sample generations.

Nothing here changes the run: no generator of torch is advanced, no state is kept that a checkpoint
would need.
"""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor

from cdpvae.batch import StepPlan, VAEBatch
from cdpvae.collapse import AdaptiveInterventionScheduler, CollapseMetrics
from cdpvae.config import Settings
from cdpvae.data import LlamaTokenizerWrapper, StepBatch
from cdpvae.evaluation.likelihood import likelihood_from_sums, likelihood_sums
from cdpvae.metrics import ReconstructionMetrics
from cdpvae.models.text_vae import LlamaSoftPromptVAE
from cdpvae.profiling import ThroughputMeter, peak_flops, training_flops
from cdpvae.training.distributed import World, all_reduce_sum
from cdpvae.training.telemetry import Telemetry


class Reporter:
    """Turns what the loop measured into lines and scalars.

    evaluation: this rank's share of the validation rows, packed.
    evaluates: whether there are validation rows at all; the same on every rank.
    samples: rows whose texts are generated; the same on every rank, used by rank 0.
    """

    def __init__(
        self,
        settings: Settings,
        world: World,
        model: LlamaSoftPromptVAE,
        tokenizer: LlamaTokenizerWrapper,
        telemetry: Telemetry,
        evaluation: list[VAEBatch],
        samples: VAEBatch | None,
        evaluates: bool,
        total_steps: int,
    ):
        self.settings, self.world, self.model = settings, world, model
        self.tokenizer, self.telemetry = tokenizer, telemetry
        self.evaluation, self.samples = evaluation, samples
        self.evaluates = evaluates
        self.total_steps = total_steps
        device = world.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self.meter = ThroughputMeter(
            world_size=world.world_size, peak=peak_flops(name), device=device
        )

    def measure(self, step_batch: StepBatch) -> None:
        """Count the work of one step; cheap, called for every step."""
        flops = training_flops(
            self.model.backbone.config,
            encoder_tokens=step_batch.encoder_tokens,
            decoder_tokens=step_batch.decoder_tokens + step_batch.rows * self.model.num_prompts,
            target_tokens=int(step_batch.target_divisor),
            encoder_layers=self._encoder_layers(),
            recompute=self.settings.training.gradient_checkpointing,
        )
        self.meter.add(step_batch.encoder_tokens + step_batch.decoder_tokens, flops)

    def _encoder_layers(self) -> int:
        layer = self.settings.model.encoder_layer
        depth = self.model.backbone.config.num_hidden_layers
        if self.settings.model.latent.kind == "none":
            return 0
        return layer if isinstance(layer, int) else depth

    def step(
        self,
        step: int,
        step_batch: StepBatch,
        plan: StepPlan,
        values: dict[str, float],
        kl_per_dim: Tensor,
        at_mu: dict[str, float],
        grad_norm: float,
        learning_rate: float,
    ) -> None:
        """One console line and all scalars of a logged step."""
        speed = self.meter.report()
        latent = self.settings.model.latent.kind != "none"
        scalars = {
            "recon_loss": values["recon"],
            "loss": values["total"],
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "epoch": step_batch.epoch,
            "word_dropout": plan.word_dropout,
            "recon_nats_per_sequence": values["recon_nats_per_sequence"],
            "tokens_per_second": speed.tokens_per_second,
            "mfu": speed.mfu,
            "peak_memory_gib": speed.peak_memory_bytes / 2**30,
        }
        if latent:
            scalars |= self._latent_scalars(plan, step_batch, values)
            if plan.with_view:
                scalars |= {"infonce_loss": values["infonce"], "mi_bound": values["mi_bound"]}
        self.telemetry.scalars(step, scalars, "train/")
        self.telemetry.scalars(step, at_mu, "grad_norm_at_mu/")
        if latent:
            self.telemetry.per_dimension(step, "kl_per_dim", kl_per_dim)
        line = (
            f"step {step}/{self.total_steps}  loss {values['total']:.4f}  "
            f"recon {values['recon']:.4f}"
        )
        if latent:
            line += (
                f"  kl_raw {values['kl_raw']:.2f}  beta {plan.beta:.2f}  "
                f"bow {values['bow']:.4f}  -elbo {values['neg_elbo']:.2f}"
            )
        line += (
            f"  lr {learning_rate:.2e}  {speed.tokens_per_second:,.0f} tok/s  "
            f"mfu {speed.mfu:.1%}  peak {speed.peak_memory_bytes / 2**30:.2f} GiB"
        )
        self.telemetry.say(line)

    def _latent_scalars(self, plan: StepPlan, step_batch: StepBatch, values: dict) -> dict[str, float]:
        mean_length = step_batch.target_divisor / step_batch.rows
        per_token = self.settings.loss.objective == "per_token"
        weight = mean_length / self.settings.model.latent.latent_dim if per_token else 1.0
        return {
            "kl_loss": values["kl"],
            "kl_raw": values["kl_raw"],
            "beta": plan.beta,
            # The weight of the KL in nats per sequence, where an ELBO would have 1.
            "beta_elbo": plan.beta * weight,
            "active_dims": values["active_dims"],
            "bow_loss": values["bow"],
            "bow_weight": plan.bow_weight,
            "contrastive_weight": plan.contrastive_weight,
            "neg_elbo": values["neg_elbo"],
        }

    def collapse(
        self, step: int, metrics: CollapseMetrics, weights: AdaptiveInterventionScheduler
    ) -> None:
        """Scalars of one check of the monitor."""
        scalars = {
            "active_units": metrics.au,
            "active_unit_ratio": metrics.au_ratio,
            "mutual_information": metrics.mi,
            "mutual_information_cap": metrics.mi_cap,
            "mean_kl": metrics.mean_kl,
            "level": int(metrics.level),
            "bow_weight": weights.bow_weight,
            "contrastive_weight": weights.contrastive_weight,
            "word_dropout": weights.word_dropout,
        }
        scalars = {name: float(value) for name, value in scalars.items()}
        self.telemetry.scalars(step, scalars, "collapse/")
        self.telemetry.check(step, {**scalars, "is_collapsing": metrics.is_collapsing})

    def evaluate(self, step: int) -> None:
        """Likelihoods and the z-use test on validation rows; texts side by side on rank 0."""
        seed = self.settings.training.seed
        sums = all_reduce_sum(likelihood_sums(self.model, self.evaluation, seed=seed))
        result = likelihood_from_sums(sums)
        scalars = {k: float(v) for k, v in asdict(result).items() if k != "costs"}
        line = f"step {step}: validation, {result.rows} rows: nll {result.nll_q:.2f} nats/sequence"
        if result.costs:
            scalars |= {f"z_use_{what}": cost for what, cost in result.costs.items()}
            line += f", kl {result.kl:.2f}, -elbo {result.neg_elbo:.2f}; cost of z " + " ".join(
                f"{what} {cost:+.2f}" for what, cost in result.costs.items()
            )
        if self.settings.model.latent.kind != "none":
            line += f"; active units {result.active_unit_ratio:.0%}"
        self.telemetry.scalars(step, scalars, "validation/")
        self.telemetry.say(line)
        if self.world.is_main and self.samples is not None:
            self._generate(step)
        self.meter.restart()

    def _generate(self, step: int) -> None:
        """Greedy answers from z = mu against the references."""
        batch = self.samples.to(self.world.device)
        z = None
        if self.settings.model.latent.kind != "none":
            with torch.no_grad(), self.model.evaluating():
                z = self.model.posterior(batch.instruction).mu
        ids = self.model.generate(
            z,
            max_length=self.settings.training.sample_max_length,
            temperature=0,
            num_rows=batch.num_rows,
        )
        decode = self.tokenizer.decode
        generated = [decode(row) for row in ids.tolist()]
        references = [decode(row.tolist()) for row in batch.response.rows()]
        metrics = ReconstructionMetrics()
        metrics.update(generated, references)
        scores = metrics.compute()
        self.telemetry.scalars(
            step, {"bleu4": scores.bleu4, "rouge_l": scores.rouge_l}, "validation/"
        )
        instruction = decode(batch.instruction.rows()[0].tolist())
        self.telemetry.text(
            step,
            "samples",
            f"  instruction: {instruction}\n  reference:   {references[0]}\n"
            f"  generated:   {generated[0]}",
        )
