"""Which arguments the bag-of-words losses accept, and which implementation they get."""

from __future__ import annotations

import torch
from torch import Tensor

from cdpvae_kernels.common.checks import (
    FLOATS,
    check_packing,
    check_range,
    check_tensor,
    has_values,
    readable,
)
from cdpvae_kernels.common.dispatch import choose_name

# The widest z of which a block of rows and its gradient fit in the registers of a GPU.
WIDEST_ON_GPU = 256
# What stands in the place of an id that no row holds; the implementations leave it out.
IGNORED = -1


def check(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    ids: Tensor,
    cu_seqlens: Tensor,
    ignore_index: int | None,
) -> Tensor:
    """Return the ids with IGNORED for those that are to be left out.

    Raises ValueError for arguments of a loss that have a wrong shape, dtype or value.

    z (B, Z), weight (V, Z), bias (V,): float.
    ids (T,): int64 or int32, in [0, V).
    cu_seqlens (B+1,): int32.
    ignore_index: an id that is left out; None for no such id.
    """
    check_packing(ids, cu_seqlens)
    check_tensor("z", z, (cu_seqlens.numel() - 1, "Z"), FLOATS)
    check_tensor("weight", weight, ("V", z.shape[1]), FLOATS)
    check_tensor("bias", bias, (weight.shape[0],), FLOATS)
    if ignore_index is None:
        check_range("ids", ids, 0, weight.shape[0])
        return ids
    # Marked, not taken out: how many are left would decide shapes, and a host would have to wait.
    ignored = ids == ignore_index
    if readable(ids):
        check_range(f"ids (ignore_index={ignore_index})", ids[~ignored], 0, weight.shape[0])
    return ids.masked_fill(ignored, IGNORED)


def choose(
    op: str,
    impl: str | None,
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    names: tuple[str, ...],
) -> str:
    """Return the one of `names` that runs. Raises ValueError for an `impl` that cannot.

    op: the public function, for messages.
    impl: the implementation asked for, None for the best one.
    z, weight, bias: their widest dtype, then bf16, and the width of z decide what can run.
    names: the implementations of the loss.
    """
    # The one dtype that decides: fp64 is computed by the reference alone, bf16 not interpreted.
    dtypes = (z.dtype, weight.dtype, bias.dtype)
    decisive = (torch.float64, torch.bfloat16)
    dtype = next((d for d in decisive if d in dtypes), z.dtype)
    wide = z.shape[1] > WIDEST_ON_GPU
    if wide and impl == "triton":
        raise ValueError(
            f"impl='triton': {op} got z of width {z.shape[1]}; its kernels take at most "
            f"{WIDEST_ON_GPU}, the reference any"
        )

    # Too wide for the kernels; and tiles are cut by the tokens' values, which a traced graph lacks.
    unfit = {"triton" if wide else "", "tiled" if not has_values(z) else ""}
    if impl is None:
        names = tuple(name for name in names if name not in unfit)
    return choose_name(op, impl, z.device, names, dtype)
