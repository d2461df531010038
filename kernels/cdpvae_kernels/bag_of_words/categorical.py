"""The bag-of-words loss over tokens: categorical cross-entropy, averaged row by row.

Shapes: `B` rows, `Z` latent, `V` vocabulary, `T` packed tokens.
"""

from __future__ import annotations

from torch import Tensor

from cdpvae_kernels.bag_of_words import arguments, reference
from cdpvae_kernels.bag_of_words.op import through_operator


def bow_categorical(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    ids: Tensor,
    cu_seqlens: Tensor,
    *,
    ignore_index: int | None = None,
    impl: str | None = None,
) -> Tensor:
    """Average -log softmax(z W^T + b)[token] over each row's tokens, then over the rows.

    z (B, Z): float.
    weight (V, Z): float.
    bias (V,): float.
    ids (T,): int64 or int32, rows end to end; a repeated id counts each time.
    cu_seqlens (B+1,): int32, where each row starts and the last one ends.
    ignore_index: an id that is no token, in any place; None where all ids count.
    impl: "reference" or "triton"; None picks by device.

    A row without tokens contributes 0, no rows give 0. Dtypes, gradients and errors as for
    `bow_bce`. Zhao et al. 2017, "Learning discourse-level diversity for neural dialog models", with
    the sum over tokens divided by their count.
    """
    ids = arguments.check(z, weight, bias, ids, cu_seqlens, ignore_index)
    names = ("reference", "triton")
    if arguments.choose("bow_categorical", impl, z, weight, bias, names) == "reference":
        return reference.bow_categorical(z, weight, bias, ids, cu_seqlens)
    # The operator returns the sum over rows.
    total = through_operator(z, weight, bias, ids, cu_seqlens, categorical=True)
    return total / max(z.shape[0], 1)
