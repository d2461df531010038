"""cdpvae's optimizer step, put together from the parts that `cdpvae.train` uses.

With `engine="deepspeed"` it uses all of them: collator, augmenter, `TrainingModule` and the
DeepSpeed engine with its ZeRO-2 optimizer, on one process. With "torch" the engine is left out and
its arithmetic on one process (average over micro-batches, clip, AdamW, schedule) is written out
here; that needs fp32, since in bf16 the master weights are the engine's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from benchmarks.support.lengths import Row, StepBatch
from benchmarks.support.phases import Timed
from benchmarks.support.randomness import Draws
from benchmarks.support.step_setup import TOTAL_STEPS, Setup
from cdpvae.batch import StepPlan, VAEBatch
from cdpvae.data import VAECollator
from cdpvae.data.augmentation import PackedAugmenter
from cdpvae.models.text_vae import Backbone, LlamaSoftPromptVAE
from cdpvae.tasks.text_vae.module import TrainingModule
from cdpvae.tasks.text_vae.setup import build_loss
from cdpvae.training.engine import build_engine
from cdpvae.training.optimizer import build_optimizer, build_scheduler, parameter_groups
from cdpvae_kernels import philox, word_dropout

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

ENGINES = ("torch", "deepspeed")


class OurStep:
    """cdpvae's training step.

    `loss` computes one micro-batch. `start` makes the optimizer; `step` needs it. Raises
    ValueError for an engine that does not exist or cannot do the precision.
    """

    name = "ours"

    def __init__(self, setup: Setup, engine: str = "torch"):
        settings = setup.settings
        if engine not in ENGINES:
            raise ValueError(f"engine={engine!r}: it must be one of {ENGINES}")
        if engine == "torch" and settings.training.precision != "fp32":
            raise ValueError(
                "engine='torch' keeps no master weights and needs precision fp32; "
                "use engine='deepspeed' for bf16"
            )
        self.setup, self.engine_name = setup, engine
        self.engine: DeepSpeedEngine | None = None
        # The model starts from the weights that all variants share.
        backbone = Backbone(setup.new_llama("sdpa"), settings.model)
        model = LlamaSoftPromptVAE(settings.model, backbone, setup.tokens)
        model.set_gradient_checkpointing(settings.training.gradient_checkpointing)
        setup.load_trainable(model.backbone.peft, model.head_modules())
        self.module = TrainingModule(
            model, build_loss(settings, world_size=1), settings.training.seed, world_size=1
        ).to(setup.device)
        # Parameters only: the rotary frequencies stay fp32, as the engine keeps them.
        for parameter in self.module.parameters():
            parameter.data = parameter.data.to(setup.dtype)
        self.module.train()
        # What `cdpvae.train` makes batches and views with.
        self.collator = VAECollator()
        tokens = setup.tokens
        self.augmenter = PackedAugmenter(
            settings.augmentation,
            fill_id=tokens.unk,
            pad_id=tokens.pad,
            special_ids=tokens.special,
            seed=settings.training.seed,
        )

    @property
    def model(self) -> LlamaSoftPromptVAE:
        """Return the model inside the training module."""
        return self.module.model

    def draws(self, rows: list[Row]) -> Draws:
        """Repeat what this step draws at random for these rows, for other variants to use."""
        settings, batch = self.setup.settings, self.collate(rows, with_view=True)
        latent = torch.arange(settings.model.latent.latent_dim, device=batch.sample_index.device)
        seed = settings.training.seed
        # The posterior's noise, with the training's keys: seed, stream, sample, epoch 0, dimension.
        noise = philox.normal(
            seed, philox.Stream.NOISE, batch.sample_index[:, None], 0, latent[None, :]
        )
        # The response after word dropout, as the decoder reads it.
        dropped = word_dropout(
            batch.response.ids,
            batch.response.cu_seqlens,
            batch.sample_index,
            rate=settings.loss.word_dropout,
            fill_id=self.setup.tokens.pad,
            seed=seed,
            epoch=0,
        )
        lengths = batch.response.lengths.tolist()
        assert batch.augmented is not None
        return Draws(
            noise_BZ=noise,
            response_inputs=[ids.tolist() for ids in dropped.split(lengths)],
            views=[ids.tolist() for ids in batch.augmented.rows()],
        )

    def loss(self, rows: list[Row], with_view: bool, draws: Draws | None = None) -> Tensor:
        """Compute the loss of one micro-batch alone.

        The random draws of this variant are keyed, so `draws` changes nothing.
        """
        # The mean over this micro-batch's own targets, whatever the step's accumulation.
        plan = self._plan(sum(len(row.response) - 1 for row in rows), with_view)
        accum = self.setup.settings.training.gradient_accumulation_steps
        plan = replace(plan, target_divisor=plan.target_divisor * accum)
        return self.module(self.collate(rows, with_view), plan).loss

    def trainable(self) -> dict[str, nn.Parameter]:
        """List the trainable parameters by name."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def start(self) -> None:
        """Make the optimizer and the schedule, inside DeepSpeed's engine or without it."""
        training = self.setup.settings.training
        if self.engine_name == "deepspeed":
            # The engine builds the same optimizer and schedule around the module.
            from cdpvae.training.distributed import init_world

            engine = build_engine(self.module, training, TOTAL_STEPS, init_world())
            engine.train()
            self.engine = engine
            return
        self.optimizer = build_optimizer(parameter_groups(self.model, training), training)
        self.scheduler = build_scheduler(self.optimizer, training, TOTAL_STEPS)

    def step(self, batch: StepBatch) -> None:
        """Take one optimizer step."""
        plan = self._plan(batch.target_tokens, batch.with_view)
        forward = self.module if self.engine is None else self.engine
        for rows in batch.micro_batches:
            output = forward(self.collate(rows, batch.with_view), plan)
            self.backward(output.loss, len(batch.micro_batches))
        self.update()

    def collate(self, rows: list[Row], with_view: bool) -> VAEBatch:
        """Pack the rows, with the augmented view where the step has one, on the device."""
        fields = [
            {"instruction_ids": row.instruction, "response_ids": row.response} for row in rows
        ]
        batch = self.collator(fields, [row.index for row in rows])
        if with_view:
            view = self.augmenter.view(batch.instruction, batch.sample_index, epoch=0)
            batch = replace(batch, augmented=view)
        return batch.to(self.setup.device)

    def backward(self, loss: Tensor, micro_batches: int) -> None:
        """Add a micro-batch's gradients; with the last one the DeepSpeed engine also updates."""
        # The engine divides by the number of micro-batches itself.
        if self.engine is None:
            (loss / micro_batches).backward()
            return
        self.engine.backward(loss)
        self.engine.step()

    def update(self) -> None:
        """Clip, step, move the schedule; the DeepSpeed engine did it with the last micro-batch."""
        if self.engine is not None:
            return
        # The order of the engine: clip, update, schedule, clear.
        max_norm = self.setup.settings.training.max_grad_norm
        nn.utils.clip_grad_norm_(self.trainable().values(), max_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)

    def timed(self) -> list[Timed]:
        """List the calls that make up each phase."""
        # A call inside another timed call counts for its own phase only.
        model, backbone = self.model, self.model.backbone
        heads = [(head, "forward", "heads") for head in (model.pooling, model.encoder)]
        timed = [
            (self, "collate", "data"),
            (model, "_drop_words", "data"),
            (backbone, "encode", "encoder"),
            *heads,
            (model.projector, "forward", "heads"),
            (backbone, "decode", "decoder"),
            (model, "_loss", "loss"),
        ]
        if self.engine is None:
            return [*timed, (self, "backward", "backward"), (self, "update", "optimizer")]
        return [*timed, (self.engine, "backward", "backward"), (self.engine, "step", "optimizer")]

    def _plan(self, target_tokens: int, with_view: bool) -> StepPlan:
        loss = self.setup.settings.loss
        return StepPlan(
            step=0,
            epoch=0,
            beta=loss.beta_max,
            bow_weight=loss.bow_weight,
            contrastive_weight=loss.contrastive_weight,
            word_dropout=loss.word_dropout,
            target_divisor=float(target_tokens),
            with_view=with_view,
        )
