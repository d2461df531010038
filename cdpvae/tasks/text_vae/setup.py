"""From settings to a trainer: the order matters.

Everything that can refuse a run comes first and is cheap: settings, the backbone's config.json, the
tokenizer, the data's fingerprint, the number of steps. Only then are weights loaded.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from cdpvae.collapse import AdaptiveInterventionScheduler, CollapseMonitor
from cdpvae.config import GaussianConfig, Settings
from cdpvae.data import LlamaTokenizerWrapper
from cdpvae.data.augmentation import TextAugmenter
from cdpvae.loss import SoftPromptVAELoss
from cdpvae.models.text_vae import Backbone, LlamaSoftPromptVAE
from cdpvae.tasks.text_vae.loading import build_loader, evaluation_rows, open_data, planned_steps
from cdpvae.tasks.text_vae.module import TrainingModule
from cdpvae.tasks.text_vae.schedule import Planner
from cdpvae.tasks.text_vae.step_log import Reporter
from cdpvae.training.checkpoint import CheckpointManager, seed_everything
from cdpvae.training.distributed import World
from cdpvae.training.engine import build_engine, resolve_ds_config
from cdpvae.training.loop import Trainer
from cdpvae.training.telemetry import Telemetry
from cdpvae_kernels import describe


def build_loss(settings: Settings, world_size: int) -> SoftPromptVAELoss:
    """The loss of a run; its weights are those of the plan, step by step."""
    loss, training = settings.loss, settings.training
    return SoftPromptVAELoss(
        latent_dim=_latent_dim(settings),
        free_bits=loss.free_bits,
        loss_scale=loss.objective,
        bow_reduction=loss.bow_reduction,
        bow_loss_weight=loss.bow_weight,
        contrastive_weight=loss.contrastive_weight,
        temperature=loss.temperature,
        normalize=loss.normalize_latents,
        queue_size=loss.queue_size,
        micro_batches_per_step=training.gradient_accumulation_steps * world_size,
        impl=settings.model.kernel_impl,
    )


def _latent_dim(settings: Settings) -> int:
    """Z; without latent the default, since loss and monitor ask for a size that nothing uses."""
    latent = settings.model.latent
    return (GaussianConfig() if latent.kind == "none" else latent).latent_dim


def build_trainer(settings: Settings, world: World) -> Trainer:
    """Assemble a run, resumed where asked. Raises ValueError for whatever does not fit."""
    training = settings.training
    if training.num_threads:
        torch.set_num_threads(training.num_threads)
    resolve_ds_config(training, world)
    _check_kernels(settings, world)
    checkpoints = CheckpointManager(settings, world)
    resume_from = checkpoints.find(training.resume) if training.resume else None
    if resume_from is not None:
        checkpoints.check(resume_from)
    elif existing := checkpoints.existing():
        raise ValueError(
            f"output_dir={training.output_dir!r} already holds {existing[-1].name}; continue it "
            "with --resume latest, or choose another directory"
        )
    tokenizer, splits = open_data(settings)
    loader = build_loader(settings, world, tokenizer, splits)
    total_steps = planned_steps(settings, loader)
    interventions = AdaptiveInterventionScheduler(
        initial_bow_weight=settings.loss.bow_weight,
        initial_contrastive_weight=settings.loss.contrastive_weight,
        initial_word_dropout=settings.loss.word_dropout,
        config=settings.collapse,
    )
    planner = Planner(settings, total_steps, interventions)
    model = load_model(settings, tokenizer)
    # Every rank starts from the same LoRA and heads; from here on each has its own dropout.
    seed_everything(training.seed + world.rank)
    loss_fn = build_loss(settings, world.world_size)
    module = TrainingModule(model, loss_fn, training.seed, world.world_size)
    engine = build_engine(module, training, total_steps, world)
    evaluates = bool(training.eval_rows) and "validation" in splits
    evaluation, samples = (
        evaluation_rows(settings, world, splits["validation"]) if evaluates else ([], None)
    )
    telemetry = Telemetry(training.output_dir, world, _resumed_step(resume_from))
    trainer = Trainer(
        settings=settings,
        world=world,
        engine=engine,
        loader=loader,
        planner=planner,
        monitor=CollapseMonitor(_latent_dim(settings), settings.collapse),
        interventions=interventions,
        augmenter=_augmenter(settings, tokenizer),
        checkpoints=checkpoints,
        telemetry=telemetry,
        reporter=Reporter(
            settings,
            world,
            model,
            tokenizer,
            telemetry,
            evaluation,
            samples,
            evaluates,
            total_steps,
        ),
        tokenizer=tokenizer,
        total_steps=total_steps,
    )
    if resume_from is not None:
        trainer.resume(resume_from)
    _say_what_starts(trainer, resume_from)
    return trainer


def load_model(settings: Settings, tokenizer: LlamaTokenizerWrapper) -> LlamaSoftPromptVAE:
    """Backbone weights in the compute dtype, heads and LoRA fresh from the seed."""
    dtype = torch.bfloat16 if settings.training.precision == "bf16" else torch.float32
    seed_everything(settings.training.seed)
    backbone = Backbone.load(settings.model, dtype)
    model = LlamaSoftPromptVAE(settings.model, backbone, tokenizer.special_tokens())
    model.set_gradient_checkpointing(settings.training.gradient_checkpointing)
    return model


def _augmenter(settings: Settings, tokenizer: LlamaTokenizerWrapper) -> TextAugmenter | None:
    if not settings.augmentation.augmentation_probability:
        return None
    tokens = tokenizer.special_tokens()
    return TextAugmenter(
        settings.augmentation,
        fill_id=tokens.unk,
        pad_id=tokens.pad,
        special_ids=tokens.special,
        seed=settings.training.seed,
    )


def _resumed_step(path: Path | None) -> int:
    return json.loads((path / "state.json").read_text())["step"] if path else 0


def _check_kernels(settings: Settings, world: World) -> None:
    """Refuse kernels that cannot run here, before weights are loaded."""
    try:
        describe(settings.model.kernel_impl, world.device)
    except ValueError as error:
        raise ValueError(f"model.kernels={settings.model.kernels!r}: {error}") from None


def _say_what_starts(trainer: Trainer, resumed: Path | None) -> None:
    settings, world = trainer.settings, trainer.world
    model = trainer.engine.module.model
    if world.is_main:
        output = Path(settings.training.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        (output / "settings.json").write_text(settings.dump())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lora = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    say = trainer.telemetry.say
    say(
        f"cdpvae: {world.world_size} rank(s) on {world.device.type}, {settings.training.precision},"
        f" attention {model.backbone.attention}, kernels {describe(model.impl, world.device)}"
    )
    say(
        f"{trainable:,} trainable parameters ({lora:,} LoRA, scaling "
        f"{settings.model.lora_scaling:g}), {trainer.loader.describe()}, {trainer.total_steps} "
        "steps planned"
    )
    if settings.loss.bow_weight and settings.loss.bow_reduction == "bce":
        say("bag of words: BCE averaged over the vocabulary, nearly inert when it is large")
    if resumed is not None:
        say(f"resumed from {resumed} at step {trainer.state.step}")
