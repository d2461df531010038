"""Bag of words: z alone must say which tokens the response holds.

The default, the description's, is binary cross-entropy against the set of tokens, averaged over
rows *and vocabulary*. With 128K tokens it is nearly inert: a response holds some hundred of them,
each logit's gradient is divided by rows x 128,256, and what reaches z is of the order of 1e-6.
`bow_reduction: categorical` is the literature's (Zhao et al. 2017, "Learning Discourse-level
Diversity for Neural Dialog Models using Conditional Variational Autoencoders", equation 5): the
mean over the response's tokens of -log softmax, whose gradient does not shrink with the vocabulary.

Legend: B rows, T packed tokens, M content tokens, L padded length, Z latent, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cdpvae.batch import PackedText
from cdpvae_kernels import bow_bce, bow_categorical
from cdpvae_kernels.checks import check_range, has_values

BOW_REDUCTIONS = ("bce", "categorical")
IGNORE_INDEX = -100


def check_bow_reduction(reduction: str) -> None:
    """Raise ValueError for a reduction that does not exist."""
    if reduction not in BOW_REDUCTIONS:
        raise ValueError(f"bow_reduction={reduction!r}: it must be one of {BOW_REDUCTIONS}")


def content_tokens(response: PackedText, special_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens of each row that are none of `special_ids` (BOS, EOS and pad).

    response: ids (T,) int64, cu_seqlens (B+1,) int32. special_ids: (S,) int64.
    -> ids (M,) int64 in their order, cu_seqlens (B+1,) int32; a row may be left with no token.
    Without data (shape propagation) how many are special is unknown: all tokens are taken.
    """
    if not has_values(response.ids):
        return response.ids, response.cu_seqlens
    content_T = torch.isin(response.ids, special_ids.to(response.ids.device), invert=True)
    before = F.pad(content_T.cumsum(0, dtype=torch.int32), (1, 0))
    return response.ids[content_T], before[response.cu_seqlens.long()]


def bow_loss(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    response: PackedText,
    special_ids: Tensor,
    reduction: str = "bce",
    *,
    impl: str | None = None,
) -> Tensor:
    """Bag-of-words loss of the linear head z W^T + b against the content tokens of `response`.

    z: (B, Z). weight: (V, Z). bias: (V,). special_ids: (S,) int64, left out of the bag.
    reduction: "bce", against the set of tokens, mean over rows and vocabulary; "categorical", per
    row the mean over tokens (repeats count) of -log softmax, then the mean over rows.
    impl: passed on to `cdpvae_kernels`.
    Returns a scalar in nats, fp32 (fp64 for fp64 inputs). A row without content tokens is all
    negatives in "bce" and adds 0 in "categorical".
    Raises ValueError for another reduction, wrong shapes, or ids outside the vocabulary.
    """
    check_bow_reduction(reduction)
    ids, cu_seqlens = content_tokens(response, special_ids)
    if reduction == "bce":
        return bow_bce(z, weight, bias, ids, cu_seqlens, reduction="mean", impl=impl)
    return bow_categorical(z, weight, bias, ids, cu_seqlens, impl=impl)


def compute_bow_loss(bow_logits: Tensor, target_ids: Tensor) -> Tensor:
    """The description's padded form of the "bce" loss: logits and targets held dense.

    bow_logits: (B, V) float. target_ids: (B, L) int64, -100 ignored; repeats count once.
    Returns a scalar in nats, fp32 (fp64 for fp64 logits); 0 for an empty batch. Special tokens are
    the caller's: whatever is not -100 is in the bag.
    Raises ValueError for wrong shapes and for ids outside the vocabulary.
    """
    shapes = bow_logits.dim() == 2 and target_ids.dim() == 2
    if not shapes or bow_logits.shape[0] != target_ids.shape[0]:
        raise ValueError(
            f"bow_logits {tuple(bow_logits.shape)} must be (batch, vocabulary) and target_ids "
            f"{tuple(target_ids.shape)} (batch, length), of the same batch"
        )
    logits_BV = bow_logits.to(torch.promote_types(bow_logits.dtype, torch.float32))
    valid_BL = target_ids != IGNORE_INDEX
    ids = target_ids[valid_BL]
    check_range(f"target_ids ({IGNORE_INDEX} is ignored)", ids, 0, logits_BV.shape[1])
    present_BV = torch.zeros_like(logits_BV)
    present_BV[valid_BL.nonzero(as_tuple=True)[0], ids] = 1.0
    total = F.binary_cross_entropy_with_logits(logits_BV, present_BV, reduction="sum")
    return total / max(logits_BV.numel(), 1)
