"""The definitions of the bag-of-words losses in plain PyTorch: the oracle of the other two.

Shapes: `B` rows, `Z` latent, `V` vocabulary, `T` packed tokens. Arguments are those of the public
functions, which have checked them. Logits and reductions are fp32, or fp64 if any operand is.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cdpvae_kernels.bag_of_words.arguments import IGNORED
from cdpvae_kernels.common.packing import sequence_of


def bow_bce(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    ids: Tensor,
    cu_seqlens: Tensor,
    reduction: str,
) -> Tensor:
    """Compute the BCE on whole logits against a dense multi-hot target.

    z (B, Z), weight (V, Z), bias (V,): float.
    ids (T,): int64 or int32.
    cu_seqlens (B+1,): int32.
    reduction: "mean" or "sum".
    """
    logits_BV = _bow_logits(z, weight, bias)
    # A set: a cell that is written twice is still 1.
    cells_T = _flat_cells(ids, cu_seqlens, weight.shape[0])
    present_BV = _with_room_for_ignored(logits_BV).index_fill_(0, cells_T, 1.0)[:-1]
    present_BV = present_BV.view_as(logits_BV)
    total = F.binary_cross_entropy_with_logits(logits_BV, present_BV, reduction="sum")
    return total / max(logits_BV.numel(), 1) if reduction == "mean" else total


def bow_categorical(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    ids: Tensor,
    cu_seqlens: Tensor,
) -> Tensor:
    """Compute the categorical loss from whole log-probabilities and dense counts.

    z (B, Z), weight (V, Z), bias (V,): float.
    ids (T,): int64 or int32.
    cu_seqlens (B+1,): int32.
    """
    log_p_BV = _bow_logits(z, weight, bias).log_softmax(dim=-1)
    # A bag: a cell counts each occurrence.
    cells_T = _flat_cells(ids, cu_seqlens, weight.shape[0])
    counts_BV = _with_room_for_ignored(log_p_BV)
    counts_BV = counts_BV.index_add_(0, cells_T, counts_BV.new_ones(ids.numel()))[:-1]
    counts_BV = counts_BV.view_as(log_p_BV)
    # An empty row has no counts: its length only must not be 0.
    lengths_B = counts_BV.sum(dim=-1).clamp(min=1)
    per_row_B = -(counts_BV * log_p_BV).sum(dim=-1) / lengths_B
    return per_row_B.sum() / max(z.shape[0], 1)


def _bow_logits(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return z W^T + b, (B, V), in fp64 if any operand is, else in fp32."""
    doubles = torch.float64 in (z.dtype, weight.dtype, bias.dtype)
    dtype = torch.float64 if doubles else torch.float32
    return F.linear(z.to(dtype), weight.to(dtype), bias.to(dtype))


def _flat_cells(ids: Tensor, cu_seqlens: Tensor, vocab: int) -> Tensor:
    """Return each token's place, row * V + id, in a flattened (B, V); B * V for IGNORED."""
    tokens = torch.arange(ids.numel(), device=ids.device)
    cells = sequence_of(tokens, cu_seqlens) * vocab + ids
    past_the_end = (cu_seqlens.numel() - 1) * vocab
    return torch.where(ids == IGNORED, past_the_end, cells)


def _with_room_for_ignored(cells_BV: Tensor) -> Tensor:
    """Return zeros for the cells, flattened, and one more where IGNORED ids go, (B * V + 1,)."""
    return cells_BV.new_zeros(cells_BV.numel() + 1)
