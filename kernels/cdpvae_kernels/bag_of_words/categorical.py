"""The bag-of-words loss over tokens: categorical cross-entropy, averaged row by row."""

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
    impl: str | None = None,
) -> Tensor:
    """Per row the mean over its tokens of -log softmax(z W^T + b)[token], then the mean over rows.

    Repeated ids count each time; a row without tokens contributes 0, no rows give 0. Arguments,
    dtypes and errors as for `bow_bce`. Zhao et al. 2017, "Learning discourse-level diversity for
    neural dialog models", with the sum over tokens divided by their count.
    """
    arguments.check(z, weight, bias, ids, cu_seqlens)
    names = ("reference", "triton")
    if arguments.choose("bow_categorical", impl, z, weight, bias, names) == "reference":
        return reference.bow_categorical(z, weight, bias, ids, cu_seqlens)
    total = through_operator(z, weight, bias, ids, cu_seqlens, categorical=True)
    return total / max(z.shape[0], 1)
