"""From settings to a trainer: the order matters.

Everything that can refuse a run comes first and is cheap: settings, the backbone's config.json, the
tokenizer, the data's fingerprint, the number of steps. Only then are weights loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from cdpvae.batch import StepSchedule, VAEBatch
from cdpvae.collapse import AdaptiveInterventionScheduler, CollapseMonitor
from cdpvae.config import Settings
from cdpvae.data import LlamaTokenizerWrapper, PackedAugmenter, StepBatch
from cdpvae.loss import build_objective
from cdpvae.models.text_vae import Backbone, LlamaSoftPromptVAE
from cdpvae.models.text_vae.storage import current_name
from cdpvae.tasks.text_vae.collapse_control import CollapseControl
from cdpvae.tasks.text_vae.loading import (
    Splits,
    build_loader,
    evaluation_rows,
    open_data,
    planned_steps,
)
from cdpvae.tasks.text_vae.module import TrainingModule
from cdpvae.tasks.text_vae.schedule import Schedule
from cdpvae.tasks.text_vae.step_log import StepLog, gradient_norms
from cdpvae.tasks.text_vae.use_probe import watched_use
from cdpvae.tasks.text_vae.validation import Validation
from cdpvae.training.checkpoint import CheckpointManager
from cdpvae.training.distributed import World, share_statistics
from cdpvae.training.engine import build_engine, resolve_ds_config
from cdpvae.training.loop import RunContext, Trainer
from cdpvae.training.random_state import seed_everything, use_deterministic_algorithms
from cdpvae.training.task import Direction, Evaluated, Observed, Stateful, Task
from cdpvae.training.telemetry import Telemetry
from cdpvae_kernels import describe


def build_trainer(settings: Settings, world: World) -> Trainer:
    """Assemble a run, resumed where asked. Raises ValueError for whatever does not fit."""
    training = settings.training
    if training.num_threads:
        torch.set_num_threads(training.num_threads)
    use_deterministic_algorithms(training.deterministic)
    # Refuse what cannot run before anything is loaded.
    resolve_ds_config(training, world)
    _check_kernels(settings, world)
    checkpoints = CheckpointManager(settings, world)
    resume_from = _resume_from(checkpoints, settings)
    tokenizer, splits = open_data(settings)
    loader = build_loader(settings, world, tokenizer, splits)
    total_steps = planned_steps(settings, loader)
    interventions = AdaptiveInterventionScheduler.of(settings)
    schedule = Schedule(settings, total_steps, interventions)
    # Load the weights; every rank starts from the same ones, but has its own dropout from here on.
    model = load_model(settings, tokenizer)
    seed_everything(training.seed + world.rank)
    objective = build_objective(settings, model.latent.flat_dim, world.world_size)
    module = TrainingModule(model, objective, training.seed, world.world_size)
    # Bring together what happens around a step.
    telemetry = Telemetry(training.output_dir, world)
    context = RunContext(training, world, telemetry, total_steps)
    task = build_task(settings, context, module, tokenizer, splits, schedule, interventions)
    engine = build_engine(task.module, training, total_steps, world)
    trainer = Trainer(context, task, engine, loader, checkpoints)
    if resume_from is not None:
        trainer.resume(resume_from)
    telemetry.start(trainer.state.step)
    _write_settings(settings, world)
    _say_what_starts(settings, trainer, model, resume_from)
    return trainer


def build_task(
    settings: Settings,
    context: RunContext,
    module: TrainingModule,
    tokenizer: LlamaTokenizerWrapper,
    splits: Splits,
    schedule: Schedule,
    interventions: AdaptiveInterventionScheduler,
) -> Task:
    """Make the text VAE what the training loop knows of it.

    settings: of the run.
    context: this rank among its peers, where lines go, and how many steps are planned.
    module: model and objective.
    tokenizer, splits: for evaluation.
    schedule: of every step.
    interventions: holds the weights that collapse control moves.
    """
    # What watches the training, and what writes it down.
    model, world, telemetry = module.model, context.world, context.telemetry
    total_steps = context.total_steps
    window, probe, line = watched_use(settings, world, model, splits.get("validation"), total_steps)
    if line:
        telemetry.say(line)
    monitor = CollapseMonitor(model.latent, settings.collapse, window)
    control = CollapseControl(settings.collapse, monitor, interventions, telemetry, probe)
    step_log = StepLog(settings, world, model, telemetry, total_steps)

    def observe(step: int, step_batch: StepBatch, observed: list[Observed]) -> None:
        control.observe(step, observed)
        share_statistics(model.latent)
        step_log.measure(step_batch)

    # Beta follows the measured rate where a target is set; the next schedule has the new one.
    stateful: dict[str, Stateful] = {
        "monitor": monitor,
        "interventions": interventions,
        "loss": module.objective,
    }
    adapt, rate_control = None, schedule.rate_control
    if rate_control is not None:
        stateful["rate_control"] = rate_control

        def adapt(figures: Mapping[str, float]) -> None:
            rate_control.observe(figures["kl_raw"])

    def save_pretrained(directory: Path, evaluated: Evaluated | None) -> None:
        known = {} if evaluated is None else asdict(evaluated)
        counts = splits["train"].manifest["counts"] if "train" in splits else None
        card = {"settings": settings, "counts": counts, **known}
        model.save_pretrained(directory, model_card_kwargs=card)
        tokenizer.save_pretrained(directory / "tokenizer")

    # Evaluation on held-out rows, where there are any.
    evaluate = None
    directions: Callable[[], Mapping[str, Direction]] = dict
    if settings.training.eval_rows and "validation" in splits:
        batches, samples = evaluation_rows(settings, world, splits["validation"])
        validation = Validation(settings, world, model, tokenizer, telemetry, batches, samples)

        def evaluate(step: int) -> dict[str, float]:
            figures = validation.evaluate(step)
            step_log.meter.restart()
            return figures

        directions = validation.directions

    # The names of stateful parts are those under which checkpoints hold them.
    return Task(
        module=module,
        stateful=stateful,
        optional_columns=module.objective.optional_columns,
        current_name=lambda stored: "model." + current_name(stored.removeprefix("model.")),
        schedule=schedule,
        prepare=_preparation(settings, tokenizer, world.device),
        inspect=gradient_norms,
        observe=observe,
        adapt=adapt,
        log=step_log.log,
        evaluate=evaluate,
        directions=directions,
        save_pretrained=save_pretrained,
        summary=control.summary,
    )


def load_model(settings: Settings, tokenizer: LlamaTokenizerWrapper) -> LlamaSoftPromptVAE:
    """Load backbone weights in the compute dtype; heads and LoRA are fresh from the seed."""
    dtype = torch.bfloat16 if settings.training.precision == "bf16" else torch.float32
    seed_everything(settings.training.seed)
    backbone = Backbone.load(settings.model, dtype)
    model = LlamaSoftPromptVAE(settings.model, backbone, tokenizer.special_tokens())
    model.set_gradient_checkpointing(settings.training.gradient_checkpointing)
    return model


def _preparation(
    settings: Settings, tokenizer: LlamaTokenizerWrapper, device: torch.device
) -> Callable[[VAEBatch, StepSchedule], VAEBatch]:
    """Return the function that adds the augmented view where a step has one, and moves a batch."""
    # Views are made only where a step may ask for one.
    augmenter = None
    if settings.augmentation.augmentation_probability:
        tokens = tokenizer.special_tokens()
        augmenter = PackedAugmenter(
            settings.augmentation,
            fill_id=tokens.unk,
            pad_id=tokens.pad,
            special_ids=tokens.special,
            seed=settings.training.seed,
        )

    def prepare(batch: VAEBatch, schedule: StepSchedule) -> VAEBatch:
        if schedule.with_view and augmenter is not None:
            view = augmenter.view(batch.instruction, batch.sample_index, schedule.epoch)
            batch = dataclasses.replace(batch, augmented=view)
        return batch.to(device)

    return prepare


def _resume_from(checkpoints: CheckpointManager, settings: Settings) -> Path | None:
    """Return the checkpoint to continue, or None. Raises ValueError for one that does not fit."""
    training = settings.training
    if training.resume:
        path = checkpoints.find(training.resume)
        checkpoints.check(path)
        return path
    if existing := checkpoints.existing():
        raise ValueError(
            f"output_dir={training.output_dir!r} already holds {existing[-1].name}; continue it "
            "with --resume latest, or choose another directory"
        )
    return None


def _check_kernels(settings: Settings, world: World) -> None:
    """Refuse kernels that cannot run here, before weights are loaded."""
    try:
        describe(settings.model.kernel_impl, world.device)
    except ValueError as error:
        raise ValueError(f"model.kernels={settings.model.kernels!r}: {error}") from None


def _write_settings(settings: Settings, world: World) -> None:
    """Write the resolved settings into the run's directory."""
    if world.is_main:
        output = Path(settings.training.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        (output / "settings.json").write_text(settings.dump())


def _say_what_starts(
    settings: Settings, trainer: Trainer, model: LlamaSoftPromptVAE, resumed: Path | None
) -> None:
    """Print what runs where, what is trained, and how far."""
    world, say, loader = trainer.context.world, trainer.context.telemetry.say, trainer.loader
    # Where it runs and what is trained.
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lora = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    say(
        f"cdpvae: {world.world_size} rank(s) on {world.device.type}, {settings.training.precision},"
        f" attention {model.backbone.attention}, kernels {describe(model.impl, world.device)}"
    )
    say(
        f"{trainable:,} trainable parameters ({lora:,} LoRA, scaling "
        f"{settings.model.lora_scaling:g}), {loader.describe()}, {trainer.context.total_steps} "
        "steps planned"
    )
    # What a user should know of these settings.
    if settings.loss.bow_weight and settings.loss.bow_reduction == "bce":
        say("bag of words: BCE averaged over the vocabulary, nearly inert when it is large")
    if resumed is not None:
        say(f"resumed from {resumed} at step {trainer.state.step}")
