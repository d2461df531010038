"""The DeepSpeed engine around the model.

DeepSpeed wraps one module whose forward does both passes, encoder and decoder, so that a step has
one forward and one backward per micro-batch. Optimizer, groups and schedule are ours; the JSON
file names everything else, with "auto" where a training setting decides (DeepSpeed itself refuses
"auto").
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cdpvae.config import TrainingConfig
from cdpvae.training.distributed import World
from cdpvae.training.optimizer import build_optimizer, build_scheduler, parameter_groups

# Inside the package in a wheel, at the top of the repository in a checkout.
_PLACES = [Path(__file__).resolve().parents[level] / "ds_configs" for level in (1, 2)]
DS_CONFIGS = next((place for place in _PLACES if place.is_dir()), _PLACES[-1])


def default_ds_config(device: torch.device) -> Path:
    """The shipped file for this kind of device."""
    return DS_CONFIGS / ("zero2_2xl40s.json" if device.type == "cuda" else "zero2_cpu.json")


def resolve_ds_config(config: TrainingConfig, world: World) -> dict[str, Any]:
    """The DeepSpeed JSON with every "auto" filled from the settings.

    Raises ValueError: unreadable file, an "auto" we have no value for, a value that contradicts
    the settings, or an optimizer or scheduler section (both are ours).
    """
    path = Path(config.ds_config) if config.ds_config else default_ds_config(world.device)
    try:
        content = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"ds_config={str(path)!r}: cannot be read as JSON: {error}") from None
    for section in ("optimizer", "scheduler"):
        if section in content:
            raise ValueError(
                f"ds_config={str(path)!r}: section {section!r} is not allowed; learning_rate, "
                "warmup_ratio and eta_min of the settings decide"
            )
    accum = config.gradient_accumulation_steps
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
):
    """-> the DeepSpeed engine, its optimizer and schedule built over our groups."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    module = module.to(world.device)
    ds_config = resolve_ds_config(config, world)
    if config.precision == "bf16":
        # Parameters only: `module.bfloat16()` would round the rotary frequencies as well.
        for parameter in module.parameters():
            parameter.data = parameter.data.bfloat16()
    optimizer = build_optimizer(parameter_groups(module, config), config)
    scheduler = build_scheduler(optimizer, config, total_steps)
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, lr_scheduler=scheduler, config=ds_config
    )
    # DeepSpeed looks for non-finite gradients in fp16 and bf16 only; in fp32 too, one rank's NaN
    # must skip the step on all of them instead of entering the weights.
    engine.optimizer.check_grad_overflow = True
    return engine
