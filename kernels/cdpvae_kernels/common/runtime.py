"""What every launch shares: whether kernels are interpreted, and which configuration they get."""

from __future__ import annotations

import torch
import triton
from triton import knobs

from cdpvae_kernels.common.launch_configs import LaunchConfig, launch_config


def interpreting() -> bool:
    """True when TRITON_INTERPRET=1 was set as Triton was imported: kernels run on CPU tensors."""
    return knobs.runtime.interpret


def configuration(
    name: str,
    device: torch.device,
    configs: dict[str, LaunchConfig] | None = None,
    **extents: int,
) -> LaunchConfig:
    """How to launch the kernel called `name`: an entry of `configs`, else of the table.

    No block becomes larger than its extent, given by name, rounded up to a power of two.
    """
    config = (configs or {}).get(name) or launch_config(name, device)
    capped = {
        block: min(config[block], max(triton.next_power_of_2(extent), 16))
        for block, extent in extents.items()
    }
    return {**config, **capped}
