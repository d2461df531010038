"""Reconstruction: the negative log-likelihood of the response tokens, without logits in memory.

The sum is returned and not the mean, because the divisor is no property of a micro-batch: it
counts the targets of the whole optimizer step, on every rank. `elbo.py` divides.

Legend: T packed positions, N target positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from cdpvae_kernels import linear_cross_entropy

IGNORE_INDEX = -100


def reconstruction_nll(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    rows_N: Tensor,
    targets_N: Tensor,
    *,
    impl: str | None = None,
) -> Tensor:
    """Sum over targets of -log softmax(hidden W^T)[target], in nats.

    hidden_TD: (T, D) float, the decoder's packed output. weight_VD: (V, D), the head, dtype of
    `hidden_TD`. rows_N: (N,) int64, the rows of `hidden_TD` that predict. targets_N: (N,) int64,
    -100 is ignored. impl: passed on to `cdpvae_kernels.linear_cross_entropy`.
    Returns a scalar fp32 (fp64 for fp64 inputs), differentiable in `hidden_TD`, and in `weight_VD`
    if that requires a gradient; 0 with zero gradients when nothing is to be predicted.
    Raises ValueError for wrong shapes or dtypes and for values out of range.
    """
    return linear_cross_entropy(
        hidden_TD,
        weight_VD,
        targets_N,
        rows=rows_N,
        divisor=1.0,
        ignore_index=IGNORE_INDEX,
        impl=impl,
    )
