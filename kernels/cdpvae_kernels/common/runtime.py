"""What every launch shares: whether kernels are interpreted, and which configuration they get."""

from __future__ import annotations

import torch
import triton
from triton import knobs

from cdpvae_kernels.common.launch_configs import LaunchConfig, launch_config


@torch._dynamo.assume_constant_result
def interpreting() -> bool:
    """Return True when TRITON_INTERPRET=1 was set as Triton was imported.

    Kernels then run on CPU tensors.
    """
    return knobs.runtime.interpret


def configuration(
    name: str,
    device: torch.device,
    configs: dict[str, LaunchConfig] | None = None,
    **extents: int,
) -> LaunchConfig:
    """Look up how to launch the kernel called `name`: an entry of `configs`, else of the table.

    name: "operation.kernel", as in `launch_configs.json`.
    device: its table counts.
    configs: entries that count before those of the table.
    extents: by the name of a block; no block becomes larger than its extent, rounded up to a power
        of two of at least 16.
    """
    config = (configs or {}).get(name) or launch_config(name, device)
    # A block larger than what there is to do would only mask more elements out.
    capped = {
        block: min(config[block], max(triton.next_power_of_2(extent), 16))
        for block, extent in extents.items()
    }
    return {**config, **capped}
