"""Word dropout on the GPU: what launches `triton_kernels`.

Legend: B sequences, T packed tokens.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from cdpvae_kernels.common.launch_configs import LaunchConfig
from cdpvae_kernels.common.packing import search_steps
from cdpvae_kernels.common.runtime import configuration
from cdpvae_kernels.philox import Stream
from cdpvae_kernels.word_dropout.triton_kernels import drop_kernel


def word_dropout(
    ids: Tensor,
    cu_seqlens: Tensor,
    sample_index: Tensor,
    threshold: int,
    fill_id: int,
    seed: int,
    epoch: int,
    configs: dict[str, LaunchConfig] | None = None,
) -> Tensor:
    """Compute what `reference.word_dropout` does, from the same arguments but the seed.

    ids (T,): int64 or int32.
    cu_seqlens (B+1,): int32.
    sample_index (B,): int64.
    threshold: floor(rate * 2^32).
    fill_id: the token id that is put in.
    seed: the 64 bits as a signed integer.
    epoch: as the public function takes it.
    configs: entries that count before those of the table, for tests and tuning.
    """
    # Nothing to drop: a grid of no programs cannot be launched.
    ids = ids.contiguous()
    out = torch.empty_like(ids)
    if ids.numel() == 0:
        return out

    config = configuration("word_dropout.drop", ids.device, configs, BLOCK=ids.numel())
    num_sequences = sample_index.numel()
    drop_kernel[(triton.cdiv(ids.numel(), config["BLOCK"]),)](
        ids,
        cu_seqlens.contiguous(),
        sample_index.contiguous(),
        out,
        ids.numel(),
        num_sequences,
        threshold,
        fill_id,
        seed,
        int(Stream.WORD_DROPOUT),
        epoch,
        STEPS=search_steps(num_sequences),
        **config,
    )
    return out
