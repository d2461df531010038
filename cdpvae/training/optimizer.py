"""AdamW over our own parameter groups, and the learning rate: warm-up, then cosine.

Groups separate LoRA from the heads, parts with a learning rate of their own from both, and decay
from no decay. Empty groups are dropped (torch's schedulers fail on them) and a group holds one
dtype (DeepSpeed promotes a mixed one silently).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from cdpvae.config import TrainingConfig


def part_of(name: str) -> str:
    """Return the part of the model that a parameter of this name belongs to.

    "model.pooling.query" -> "pooling"; the matrices of LoRA -> "lora", those of an adapter that has
    a name, such as "encoder" -> "encoder_lora".
    """
    if "lora_" in name:
        adapter = name.rpartition("lora_")[2].split(".")[1]
        return "lora" if adapter == "default" else f"{adapter}_lora"
    return name.removeprefix("model.").partition(".")[0]


def freeze_parts(model: nn.Module, config: TrainingConfig) -> None:
    """Take parts with a learning rate of 0 out of training: no gradient, no share in its norm."""
    frozen = {part for part, rate in config.part_learning_rates.items() if rate == 0}
    for name, parameter in model.named_parameters():
        if part_of(name) in frozen:
            parameter.requires_grad_(False)


def parameter_groups(model: nn.Module, config: TrainingConfig) -> list[dict]:
    """Sort trainable parameters into named groups; biases, norms, scales, queries do not decay.

    A part with a learning rate of its own has its own groups, after the others. Raises ValueError
    when nothing is trainable.
    """
    rates = config.part_learning_rates
    # Sort the trainable parameters by part, by decay and by dtype.
    groups: dict[tuple[str, bool, torch.dtype], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = part_of(name)
            if part not in rates:
                part = "lora" if "lora_" in name else "heads"
            decays = parameter.dim() == 2
            groups.setdefault((part, decays, parameter.dtype), []).append(parameter)
    if not groups:
        raise ValueError("the model has no trainable parameter")
    # Name the groups; their order is that of the optimizer's state in a checkpoint.
    heads_lr, lora_lr = config.learning_rate, config.lora_learning_rate or config.learning_rate
    return [
        {
            "name": f"{part}{'' if decays else '_no_decay'}",
            "params": parameters,
            "lr": rates.get(part, lora_lr if part == "lora" else heads_lr),
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (part, decays, _), parameters in sorted(
            groups.items(), key=lambda item: (item[0][0] in rates, str(item[0]))
        )
    ]


def build_optimizer(groups: list[dict], config: TrainingConfig) -> torch.optim.AdamW:
    """Make torch's AdamW (Loshchilov & Hutter 2019); fused where the parameters are on CUDA."""
    return torch.optim.AdamW(
        groups,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        fused=groups[0]["params"][0].is_cuda,
    )


def warmup_cosine(step: int, warmup_steps: int, total_steps: int, floor: float) -> float:
    """Compute the factor of the learning rate after `step` optimizer steps.

    Linear from 1/warmup_steps to 1 over the warm-up, then half a cosine from 1 to `floor` at
    total_steps (Loshchilov & Hutter 2017), and `floor` from there on. The parameters:
    step: optimizer steps taken, from 0.
    warmup_steps: 0 leaves the warm-up out.
    total_steps: the length of the whole schedule, warm-up included.
    floor: the last factor, 0 to 1.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def learning_rate_factor(
    base_lr: float, eta_min: float, total_steps: int, warmup_ratio: float
) -> Callable[[int], float]:
    """Make lr / base_lr as a function of the optimizer steps taken.

    base_lr: the rate after the warm-up.
    eta_min: the rate at the end.
    total_steps: of the planned schedule.
    warmup_ratio: share of it that warms up.

    Linear from base_lr/warmup to base_lr over the warm-up, then half a cosine to eta_min at the
    last step (Loshchilov & Hutter 2017).
    """
    warmup = int(total_steps * warmup_ratio)
    floor = min(1.0, eta_min / base_lr)
    return lambda step: warmup_cosine(step, warmup, total_steps, floor)


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: TrainingConfig, total_steps: int
) -> LambdaLR:
    """Make one factor a group, as `eta_min` is absolute and the groups' rates may differ."""
    factors = [
        learning_rate_factor(group["lr"], config.eta_min, total_steps, config.warmup_ratio)
        for group in optimizer.param_groups
    ]
    return LambdaLR(optimizer, factors)
