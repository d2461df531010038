"""The packed gather on the GPU: what launches `triton_kernels`.

Legend: B sequences, T packed tokens, P prompts, D hidden, V vocabulary.
"""

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
    """Write prompts and embeddings to their places in the packed output (T + B*P, D).

    embedding (V, D): float.
    ids (T,): int64 or int32.
    cu_seqlens (B+1,): int32.
    prompts (B, P, D): in the dtype of `embedding`.
    configs: entries that count before those of the table, for tests and tuning.
    """
    # Nothing to write: a grid of no programs cannot be launched.
    batch, num_prompts, width = prompts.shape
    num_positions = ids.numel() + batch * num_prompts
    packed = torch.empty(num_positions, width, dtype=prompts.dtype, device=prompts.device)
    if packed.numel() == 0:
        return packed

    config = configuration("prefixed_embedding.pack", packed.device, configs, BLOCK_D=width)
    pack_kernel[_grid(num_positions, width, config)](
        embedding.contiguous(),
        ids.contiguous(),
        cu_seqlens.contiguous(),
        prompts.contiguous(),
        packed,
        num_positions,
        batch,
        num_prompts,
        embedding.shape[0],
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
    """Copy the gradient of the prompts (B, P, D) out of that of the packed output.

    grad (T + B*P, D): the gradient of the packed output.
    cu_seqlens (B+1,): int32, of the ids without prompts.
    num_prompts: P.
    configs: entries that count before those of the table, for tests and tuning.
    """
    # Nothing to copy: a grid of no programs cannot be launched.
    batch, width = cu_seqlens.numel() - 1, grad.shape[1]
    grad_prompts = torch.empty(batch, num_prompts, width, dtype=grad.dtype, device=grad.device)
    if grad_prompts.numel() == 0:
        return grad_prompts

    config = configuration("prefixed_embedding.unprefix", grad.device, configs, BLOCK_D=width)
    total_prompts = batch * num_prompts
    unprefix_kernel[_grid(total_prompts, width, config)](
        grad.contiguous(),
        cu_seqlens.contiguous(),
        grad_prompts,
        total_prompts,
        num_prompts,
        width,
        **config,
    )
    return grad_prompts


def _grid(positions: int, width: int, config: LaunchConfig) -> tuple[int, int]:
    return triton.cdiv(positions, config["BLOCK_R"]), triton.cdiv(width, config["BLOCK_D"])
