"""The lines and scalars of logged steps, and the work of every step.

Has no effect on training: no generator of torch is advanced, and no state is kept that a
checkpoint would need.
"""

from __future__ import annotations

import torch

from cdpvae.batch import StepOutput
from cdpvae.config import Settings
from cdpvae.data import StepBatch
from cdpvae.models.text_vae import LlamaSoftPromptVAE
from cdpvae.profiling import ThroughputMeter, peak_flops, training_flops
from cdpvae.training.distributed import World
from cdpvae.training.task import LoggedStep
from cdpvae.training.telemetry import Telemetry

# TensorBoard's names of figures that `steps.jsonl` names shorter.
TAGS = {
    "total": "loss",
    "recon": "recon_loss",
    "kl": "kl_loss",
    "bow": "bow_loss",
    "infonce": "infonce_loss",
}


class StepLog:
    """Turn what the loop measured into one console line and scalars.

    settings: of the run.
    world: this rank among its peers.
    model: whose work is counted.
    telemetry: takes lines and scalars.
    total_steps: of the planned schedule.
    """

    def __init__(
        self,
        settings: Settings,
        world: World,
        model: LlamaSoftPromptVAE,
        telemetry: Telemetry,
        total_steps: int,
    ) -> None:
        self.settings, self.model = settings, model
        self.telemetry, self.total_steps = telemetry, total_steps
        device = world.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self.meter = ThroughputMeter(
            world_size=world.world_size, peak=peak_flops(name), device=device
        )

    def measure(self, step_batch: StepBatch) -> None:
        """Count the work of one step; cheap, called for every step."""
        # What the decoder reads before the response are instructions and prompts.
        prompts, config = step_batch.rows * self.model.num_prompts, self.settings.model
        instructions = step_batch.encoder_tokens if config.reads_instruction else 0
        flops = training_flops(
            self.model.backbone.config,
            encoder_tokens=step_batch.encoder_tokens,
            decoder_tokens=step_batch.decoder_tokens + instructions + prompts,
            target_tokens=int(step_batch.target_divisor),
            encoder_layers=self._encoder_layers(),
            recompute=self.settings.training.gradient_checkpointing,
            trains_encoder=self.model.backbone.trains_encoder,
        )
        # Instructions count once for every pass that reads them, as in a budget of tokens.
        read = config.instruction_passes * step_batch.encoder_tokens + step_batch.decoder_tokens
        self.meter.add(read, flops)

    def _encoder_layers(self) -> int:
        """Return how many layers the encoder pass runs."""
        if not self.model.latent.reads_text:
            return 0
        layer = self.settings.model.encoder_layer
        return layer if isinstance(layer, int) else self.model.backbone.config.num_hidden_layers

    def log(self, logged: LoggedStep) -> None:
        """Write the console line and all scalars of a logged step."""
        speed = self.meter.report()
        schedule, step = logged.schedule, logged.step
        # Scalars: every figure of every term, what the schedule set, and the speed.
        scalars = {TAGS.get(name, name): value for name, value in logged.figures.items()}
        scalars |= {
            "grad_norm": logged.grad_norm,
            "learning_rate": logged.learning_rate,
            "epoch": schedule.epoch,
            "word_dropout": schedule.word_dropout,
            "tokens_per_second": speed.tokens_per_second,
            "mfu": speed.mfu,
            "peak_memory_gib": speed.peak_memory_bytes / 2**30,
        }
        if self.model.latent.reads_text:
            scalars |= {f"{name}_weight": value for name, value in schedule.weights.items()}
        if "kl" in logged.figures:
            scalars |= {"beta": schedule.beta, "beta_elbo": self._beta_elbo(logged)}
        self.telemetry.scalars(step, scalars, "train/")
        self.telemetry.scalars(step, dict(logged.inspected), "grad_norm_at_mu/")
        for name, values in logged.vectors.items():
            self.telemetry.per_dimension(step, name, values)
        # The line: the loss and its parts, then rate, speed and memory.
        figures = logged.figures
        line = f"step {step}/{self.total_steps}  loss {figures['total']:.4f}  "
        line += f"recon {figures['recon']:.4f}"
        if "kl_raw" in figures:
            line += f"  kl_raw {figures['kl_raw']:.2f}  beta {self._beta(schedule.beta)}"
        if "bow" in figures:
            line += f"  bow {figures['bow']:.4f}"
        if "kl_raw" in figures:
            line += f"  -elbo {figures['neg_elbo']:.2f}"
        line += (
            f"  lr {logged.learning_rate:.2e}  {speed.tokens_per_second:,.0f} tok/s  "
            f"mfu {speed.mfu:.1%}  peak {speed.peak_memory_bytes / 2**30:.2f} GiB"
        )
        self.telemetry.say(line)

    def _beta(self, beta: float) -> str:
        """Write beta; one that a controller moves may be far below 0.01."""
        return f"{beta:.2f}" if self.settings.loss.rate_target is None else f"{beta:.3g}"

    def _beta_elbo(self, logged: LoggedStep) -> float:
        """Return the weight of the KL in nats per sequence, where an ELBO would have 1."""
        if self.settings.loss.objective == "elbo":
            return logged.schedule.beta
        mean_length = logged.step_batch.target_divisor / logged.step_batch.rows
        return logged.schedule.beta * mean_length / self.model.latent.flat_dim


def gradient_norms(output: StepOutput) -> dict[str, float]:
    """Return the L2 norm of d(weighted term)/d(code) over this rank's rows, by term.

    Shows which loss term dominates the encoder's gradient. Costs one more backward pass of the
    decoder. Empty where no encoder is trained.
    """
    point = output.gradient_point
    norms: dict[str, float] = {}
    for term in output.terms if point.requires_grad else []:
        weighted = term.weighted
        if weighted.requires_grad:
            (grad,) = torch.autograd.grad(weighted, point, retain_graph=True, allow_unused=True)
            # Both forms of the reconstruction are one term: only one of them is trained on.
            name = "recon" if term.name == "recon_nats_per_sequence" else term.name
            norms[name] = 0.0 if grad is None else float(grad.norm())
    return norms
