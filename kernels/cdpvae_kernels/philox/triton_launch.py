"""Philox draws on the GPU: what launches `triton_kernels`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from cdpvae_kernels.common.launch_configs import LaunchConfig
from cdpvae_kernels.common.runtime import configuration
from cdpvae_kernels.philox.triton_kernels import draw_kernel

# A fused multiply-add rounds once where the definition rounds twice.
LAUNCH_OPTIONS = {"enable_fp_fusion": False}


def draw(
    sample_index: Tensor,
    epoch: Tensor,
    position: Tensor,
    seed: int,
    stream: int,
    normal: bool,
    configs: dict[str, LaunchConfig] | None = None,
) -> Tensor:
    """Draw what `reference.draw` does, from the same arguments, with the same bits.

    sample_index, epoch, position: int64 tensors that broadcast against one another.
    seed: the 64 bits as a signed integer.
    stream: in [0, 256).
    normal: whether to return fp32 normals instead of int64 words.
    configs: entries that count before those of the table, for tests and tuning.
    """
    # Nothing to draw: a grid of no programs cannot be launched.
    shape = torch.broadcast_shapes(sample_index.shape, epoch.shape, position.shape)
    out = torch.empty(shape, dtype=torch.float32 if normal else torch.int64, device=position.device)
    if out.numel() == 0:
        return out

    # A counter of one value is read again by every element, any other is walked through.
    counters = [_walked(counter, shape) for counter in (sample_index, epoch, position)]
    steps = [int(counter.numel() > 1) for counter in counters]
    # Seed and stream are no reason to compile again: the kernel does not specialize on them.
    config = configuration("philox.draw", out.device, configs, BLOCK=out.numel())
    grid = (triton.cdiv(out.numel(), config["BLOCK"]),)
    draw_kernel[grid](
        *counters,
        out,
        seed,
        int(stream),
        *steps,
        out.numel(),
        NORMAL=normal,
        **config,
        **LAUNCH_OPTIONS,
    )
    return out


def _walked(counter: Tensor, shape: torch.Size) -> Tensor:
    """Lay a counter out contiguously in the common shape; a single value stays as it is."""
    return counter if counter.numel() == 1 else counter.expand(shape).contiguous()
