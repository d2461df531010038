"""Bag-of-words losses: what z alone says about which tokens the text holds.

Shapes: `B` rows, `Z` latent, `V` vocabulary, `T` packed tokens.
"""

from torch import Tensor

from cdpvae_kernels import reference
from cdpvae_kernels.checks import FLOATS, check_packing, check_range, check_tensor
from cdpvae_kernels.dispatch import choose

_BCE = {"reference": reference.bow_bce}
_CATEGORICAL = {"reference": reference.bow_categorical}


def bow_bce(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    ids: Tensor,
    cu_seqlens: Tensor,
    *,
    reduction: str = "mean",
    impl: str | None = None,
) -> Tensor:
    """Binary cross-entropy with logits z W^T + b against the *set* of each row's ids.

    z: (B, Z) float. weight: (V, Z) float. bias: (V,) float. ids: (T,) int64 or int32, rows end to
    end; a repeated id counts once, a row without ids is all negatives. cu_seqlens: (B+1,) int32.
    reduction: "mean" or "sum", over rows and vocabulary. No rows give 0.
    Returns a scalar in nats, fp32 (fp64 if any of z, weight, bias is), and computes in that dtype.
    Differentiable in z, weight and bias.
    Raises ValueError for wrong shapes or dtypes, ids outside the vocabulary, another reduction.
    """
    _check(z, weight, bias, ids, cu_seqlens)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}; it must be 'mean' or 'sum'")
    run = choose("bow_bce", impl, z.device, _BCE)
    return run(z, weight, bias, ids, cu_seqlens, reduction)


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
    _check(z, weight, bias, ids, cu_seqlens)
    run = choose("bow_categorical", impl, z.device, _CATEGORICAL)
    return run(z, weight, bias, ids, cu_seqlens)


def _check(z: Tensor, weight: Tensor, bias: Tensor, ids: Tensor, cu_seqlens: Tensor) -> None:
    check_packing(ids, cu_seqlens)
    check_tensor("z", z, (cu_seqlens.numel() - 1, "Z"), FLOATS)
    check_tensor("weight", weight, ("V", z.shape[1]), FLOATS)
    check_tensor("bias", bias, (weight.shape[0],), FLOATS)
    check_range("ids", ids, 0, weight.shape[0])
