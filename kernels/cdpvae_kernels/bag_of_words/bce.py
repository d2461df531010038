"""The bag-of-words loss over sets: binary cross-entropy of every token of the vocabulary.

Shapes: `B` rows, `Z` latent, `V` vocabulary, `T` packed tokens.
"""

from __future__ import annotations

from torch import Tensor

from cdpvae_kernels.bag_of_words import arguments, reference, tiled
from cdpvae_kernels.bag_of_words.op import through_operator


def bow_bce(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    ids: Tensor,
    cu_seqlens: Tensor,
    *,
    reduction: str = "mean",
    ignore_index: int | None = None,
    impl: str | None = None,
) -> Tensor:
    """Compute the binary cross-entropy of logits z W^T + b against the *set* of each row's ids.

    z (B, Z): float.
    weight (V, Z): float.
    bias (V,): float.
    ids (T,): int64 or int32, rows end to end; a repeated id counts once, a row without ids is all
        negatives.
    cu_seqlens (B+1,): int32, where each row starts and the last one ends.
    reduction: "mean" or "sum", over rows and vocabulary. No rows give 0.
    ignore_index: an id that no row is to hold, in any place; None where all ids count.
    impl: "reference", "tiled" or "triton"; None picks by device.

    Returns a scalar in nats, fp32 (fp64 if any of z, weight, bias is), and computes in that dtype.
    Differentiable once in z, weight and bias. On a GPU, where z and weight have one half precision,
    d loss / d logits is rounded to it before it is multiplied with them; ids are not checked there:
    those outside the vocabulary are left out.
    Raises ValueError for wrong shapes or dtypes, ids outside the vocabulary, another reduction, and
    for impl="triton" with Z above 256, which the reference computes.
    """
    ids = arguments.check(z, weight, bias, ids, cu_seqlens, ignore_index)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}; it must be 'mean' or 'sum'")
    name = arguments.choose("bow_bce", impl, z, weight, bias, ("reference", "tiled", "triton"))
    if name == "reference":
        return reference.bow_bce(z, weight, bias, ids, cu_seqlens, reduction)
    if name == "tiled":
        total = tiled.bow_bce(z, weight, bias, ids, cu_seqlens)
    else:
        total = through_operator(z, weight, bias, ids, cu_seqlens, categorical=False)
    # The other implementations return the sum over rows and vocabulary.
    cells = z.shape[0] * weight.shape[0]
    return total / max(cells, 1) if reduction == "mean" else total
