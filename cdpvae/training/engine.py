"""The DeepSpeed engine around the model.

DeepSpeed wraps one module whose forward does both passes, encoder and decoder, so that a step has
one forward and one backward per micro-batch. Optimizer, groups and schedule are ours; the JSON
file names everything else, with "auto" where a training setting decides (DeepSpeed itself refuses
"auto").
"""

from __future__ import annotations

import json
import logging
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from cdpvae.batch import StepOutput, StepSchedule, VAEBatch
from cdpvae.config import TrainingConfig
from cdpvae.training.distributed import World
from cdpvae.training.optimizer import (
    build_optimizer,
    build_scheduler,
    freeze_parts,
    parameter_groups,
)

# Inside the package in a wheel, at the top of the repository in a checkout.
_PLACES = [Path(__file__).resolve().parents[level] / "ds_configs" for level in (1, 2)]
DS_CONFIGS = next((place for place in _PLACES if place.is_dir()), _PLACES[-1])


class Engine(Protocol):
    """What we use of DeepSpeed's engine, which has no types of its own."""

    module: nn.Module

    def __call__(self, batch: VAEBatch, schedule: StepSchedule) -> StepOutput:
        """Call the module's forward."""
        ...

    def train(self) -> Any:
        """Put the module into training mode."""
        ...

    def backward(self, loss: torch.Tensor) -> Any:
        """Accumulate the gradients of one micro-batch's loss."""
        ...

    def step(self) -> Any:
        """Count a micro-batch, and take the optimizer step after the last one of a step."""
        ...

    def was_step_applied(self) -> bool:
        """Tell whether the last optimizer step changed weights; a non-finite gradient skips it."""
        ...

    def get_lr(self) -> list[float]:
        """Return the learning rate of each parameter group."""
        ...

    def get_global_grad_norm(self) -> Any:
        """Return the gradient norm of the last step before clipping; None before the first."""
        ...

    def coalesce_grad_reduction(self) -> AbstractContextManager[Any]:
        """Hold gradient communication back until the block ends."""
        ...

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Say whether the next `step` ends an optimizer step."""
        ...

    def save_checkpoint(
        self, save_dir: str, tag: str, *, exclude_frozen_parameters: bool = False
    ) -> Any:
        """Write weights, optimizer and schedule; every rank calls it."""
        ...

    def load_checkpoint(
        self, load_dir: str, tag: str, *, custom_load_fn: Any = None
    ) -> tuple[str | None, Any]:
        """Read what `save_checkpoint` wrote -> (None, ...) where nothing is found."""
        ...


def default_ds_config(device: torch.device) -> Path:
    """Return the shipped file for this kind of device."""
    return DS_CONFIGS / ("zero2_2xl40s.json" if device.type == "cuda" else "zero2_cpu.json")


def resolve_ds_config(config: TrainingConfig, world: World) -> dict[str, Any]:
    """Read the DeepSpeed JSON and fill every "auto" from the settings.

    Raises ValueError: unreadable file, an "auto" we have no value for, a value that contradicts
    the settings, or an optimizer or scheduler section (both are ours).
    """
    path = Path(config.ds_config) if config.ds_config else default_ds_config(world.device)
    try:
        content = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"ds_config={str(path)!r}: cannot be read as JSON: {error}") from None
    # Optimizer and schedule are built over our own groups.
    for section in ("optimizer", "scheduler"):
        if section in content:
            raise ValueError(
                f"ds_config={str(path)!r}: section {section!r} is not allowed; learning_rate, "
                "warmup_ratio and eta_min of the settings decide"
            )
    accum = config.gradient_accumulation_steps
    # Fill in what the settings decide; nothing else may be left open.
    decided = {
        "train_micro_batch_size_per_gpu": config.per_device_batch_size,
        "gradient_accumulation_steps": accum,
        "train_batch_size": config.per_device_batch_size * accum * world.world_size,
        "gradient_clipping": config.max_grad_norm,
        "bf16.enabled": config.precision == "bf16",
    }
    for key, value in decided.items():
        _decide(content, key, value, path)
    if left := [key for key, value in _leaves(content) if value == "auto"]:
        raise ValueError(f"ds_config={str(path)!r}: {left[0]}='auto' has no setting that decides")
    return content


def _decide(content: dict[str, Any], key: str, value: Any, path: Path) -> None:
    section, _, leaf = key.rpartition(".")
    target = content.setdefault(section, {}) if section else content
    if target.get(leaf, "auto") not in ("auto", value):
        raise ValueError(
            f"ds_config={str(path)!r}: {key}={target[leaf]!r} contradicts the settings, which "
            f'give {value!r}; write "auto" there'
        )
    target[leaf] = value


def _leaves(content: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, value in content.items():
        nested = isinstance(value, dict)
        found += _leaves(value, f"{prefix}{key}.") if nested else [(prefix + key, value)]
    return found


def build_engine(
    module: nn.Module,
    config: TrainingConfig,
    total_steps: int,
    world: World,
) -> Engine:
    """Build the DeepSpeed engine, its optimizer and schedule over our parameter groups.

    module: what is trained; it is moved to the device, in bf16 cast.
    config: precision, rates, accumulation, the DeepSpeed file.
    total_steps: of the planned schedule.
    world: this rank among its peers.
    """
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    module = module.to(world.device)
    ds_config = resolve_ds_config(config, world)
    if config.precision == "bf16":
        # Parameters only: `module.bfloat16()` would round the rotary frequencies as well.
        for parameter in module.parameters():
            parameter.data = parameter.data.bfloat16()
    freeze_parts(module, config)
    optimizer = build_optimizer(parameter_groups(module, config), config)
    scheduler = build_scheduler(optimizer, config, total_steps)
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, lr_scheduler=scheduler, config=ds_config
    )
    # DeepSpeed looks for non-finite gradients in fp16 and bf16 only; in fp32 too, one rank's NaN
    # must skip the step on all of them instead of entering the weights.
    engine.optimizer.check_grad_overflow = True
    return engine
