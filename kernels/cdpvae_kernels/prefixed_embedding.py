"""The decoder's packed input: each sequence's soft prompts, then its token embeddings.

Shapes: `B` sequences, `T` packed tokens, `N` positions, `V` vocabulary, `D` hidden, `P` prompts.
"""

import torch
from torch import Tensor

from cdpvae_kernels import reference
from cdpvae_kernels.checks import (
    FLOATS,
    INTEGERS,
    check_packing,
    check_range,
    check_tensor,
    readable,
)
from cdpvae_kernels.dispatch import choose

_IMPLEMENTATIONS = {"reference": reference.prefixed_embedding}


def prefixed_embedding(
    embedding: Tensor,
    ids: Tensor,
    cu_seqlens: Tensor,
    prompts: Tensor,
    *,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Embed packed ids and put each sequence's prompts before them.

    embedding: (V, D) float. ids: (T,) int64 or int32. cu_seqlens: (B+1,) int32.
    prompts: (B, P, D), dtype of `embedding`.
    Returns ((T + B*P, D), (B+1,) int32): the packed input and its offsets.
    Differentiable in `prompts` and, if it requires a gradient, in `embedding`.
    Raises ValueError for wrong shapes or dtypes and for ids outside the vocabulary.
    """
    check_tensor("embedding", embedding, ("V", "D"), FLOATS)
    check_packing(ids, cu_seqlens)
    check_range("ids", ids, 0, embedding.shape[0])
    batch = cu_seqlens.numel() - 1
    check_tensor("prompts", prompts, (batch, "P", embedding.shape[1]), (embedding.dtype,))
    run = choose("prefixed_embedding", impl, prompts.device, _IMPLEMENTATIONS)
    return run(embedding, ids, cu_seqlens, prompts)


def prefixed_rows(rows: Tensor, cu_seqlens: Tensor, num_prompts: int) -> Tensor:
    """Where positions of `ids` lie in the output of `prefixed_embedding`.

    rows: (N,) int64, each in [0, T). cu_seqlens: (B+1,) int32, of the ids without prompts.
    num_prompts: P, at least 0. Returns (N,) int64.
    Raises ValueError for wrong shapes or dtypes and for rows outside [0, T).
    """
    check_tensor("rows", rows, ("N",), INTEGERS)
    check_tensor("cu_seqlens", cu_seqlens, ("B+1",), (torch.int32,))
    if cu_seqlens.numel() == 0:
        raise ValueError("cu_seqlens is empty; it must hold B+1 offsets, the first of them 0")
    if num_prompts < 0:
        raise ValueError(f"num_prompts={num_prompts}; it must be at least 0")
    if readable(cu_seqlens):
        check_range("rows", rows, 0, int(cu_seqlens[-1]))
    return reference.prefixed_rows(rows.to(torch.int64), cu_seqlens, num_prompts)
