"""The packed gather on the GPU: what launches `triton_kernels`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from cdpvae_kernels.common.launch_configs import LaunchConfig
from cdpvae_kernels.common.packing import search_steps
from cdpvae_kernels.common.runtime import configuration
from cdpvae_kernels.prefixed_embedding.triton_kernels import pack_kernel, unprefix_kernel


def pack(
    embedding: Tensor,
    ids: Tensor,
    cu_seqlens: Tensor,
    prompts: Tensor,
    configs: dict[str, LaunchConfig] | None = None,
) -> Tensor:
    """-> (T + B*P, D). configs: another table's entries, for tests and tuning."""
    batch, num_prompts, width = prompts.shape
    num_rows = ids.numel() + batch * num_prompts
    packed = torch.empty(num_rows, width, dtype=prompts.dtype, device=prompts.device)
    if packed.numel() == 0:
        return packed
    config = configuration("prefixed_embedding.pack", packed.device, configs, BLOCK_D=width)
    pack_kernel[_grid(num_rows, width, config)](
        embedding.contiguous(),
        ids.contiguous(),
        cu_seqlens.contiguous(),
        prompts.contiguous(),
        packed,
        num_rows,
        batch,
        num_prompts,
        width,
        STEPS=search_steps(batch),
        **config,
    )
    return packed


def unprefix(
    grad: Tensor,
    cu_seqlens: Tensor,
    num_prompts: int,
    configs: dict[str, LaunchConfig] | None = None,
) -> Tensor:
    """Gradient (T + B*P, D) -> that of the prompts (B, P, D)."""
    batch, width = cu_seqlens.numel() - 1, grad.shape[1]
    grad_prompts = torch.empty(batch, num_prompts, width, dtype=grad.dtype, device=grad.device)
    if grad_prompts.numel() == 0:
        return grad_prompts
    config = configuration("prefixed_embedding.unprefix", grad.device, configs, BLOCK_D=width)
    num_rows = batch * num_prompts
    unprefix_kernel[_grid(num_rows, width, config)](
        grad.contiguous(),
        cu_seqlens.contiguous(),
        grad_prompts,
        num_rows,
        num_prompts,
        width,
        **config,
    )
    return grad_prompts


def _grid(rows: int, width: int, config: LaunchConfig) -> tuple[int, int]:
    return triton.cdiv(rows, config["BLOCK_R"]), triton.cdiv(width, config["BLOCK_D"])
