"""Word dropout on packed ids: the decoder reads some of its own input replaced by a fill id.

Shapes: `B` sequences, `T` packed tokens.
"""

import torch
from torch import Tensor

from cdpvae_kernels import philox
from cdpvae_kernels.common.checks import check_packing, check_range, check_tensor
from cdpvae_kernels.common.dispatch import choose, from_triton
from cdpvae_kernels.word_dropout import reference

_triton_word_dropout = from_triton("word_dropout", "word_dropout")


def word_dropout(
    ids: Tensor,
    cu_seqlens: Tensor,
    sample_index: Tensor,
    *,
    rate: float,
    fill_id: int,
    seed: int,
    epoch: int,
    impl: str | None = None,
) -> Tensor:
    """Replace each token but the first of its sequence by `fill_id` with probability `rate`.

    ids (T,): int64 or int32, sequences end to end.
    cu_seqlens (B+1,): int32, where each sequence starts and the last one ends.
    sample_index (B,): int64, the samples' indices in the data set.
    rate: in [0, 1].
    fill_id: the token id that is put in, at least 0.
    seed, epoch: as for `philox.bits`.
    impl: "reference" or "triton"; None picks by device.

    Returns ids of the same shape and dtype; `ids` itself, untouched, at rate 0.
    Raises ValueError for wrong shapes, dtypes or a rate outside [0, 1].

    A token at position p > 0 of its sequence is dropped when its 32 Philox bits (stream
    WORD_DROPOUT) are below floor(rate * 2^32): the decision depends on (seed, sample, epoch, p)
    alone, never on the packing. Bowman et al. 2016, "Generating sentences from a continuous space".
    """
    # Refuse what no implementation checks again.
    check_packing(ids, cu_seqlens)
    check_tensor("sample_index", sample_index, (cu_seqlens.numel() - 1,), (torch.int64,))
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"rate={rate!r}; it must lie in [0, 1]")
    if isinstance(fill_id, bool) or not isinstance(fill_id, int) or fill_id < 0:
        raise ValueError(f"fill_id={fill_id!r}; it must be a token id, an integer of at least 0")
    philox.in_range("seed", seed, philox.SEED_LIMIT)
    philox.in_range("epoch", epoch, philox.EPOCH_LIMIT)
    check_range("sample_index", sample_index, 0, philox.SAMPLE_LIMIT)

    run = choose("word_dropout", impl, ids.device, _IMPLEMENTATIONS)
    # Nothing to drop, as in evaluation: nothing is launched.
    if rate == 0.0:
        return ids
    return run(ids, cu_seqlens, sample_index, int(rate * 2**32), fill_id, seed, epoch)


@torch.library.custom_op("cdpvae_kernels::word_dropout", mutates_args=())
def _operator(
    ids: Tensor,
    cu_seqlens: Tensor,
    sample_index: Tensor,
    threshold: int,
    fill_id: int,
    seed: int,
    epoch: int,
) -> Tensor:
    return _triton_word_dropout(ids, cu_seqlens, sample_index, threshold, fill_id, seed, epoch)


@_operator.register_fake
def _(ids: Tensor, *_: Tensor | int) -> Tensor:
    return torch.empty_like(ids)


def _through_operator(
    ids: Tensor,
    cu_seqlens: Tensor,
    sample_index: Tensor,
    threshold: int,
    fill_id: int,
    seed: int,
    epoch: int,
) -> Tensor:
    # An operator takes signed integers only.
    seed = philox.signed_64(seed)
    return _operator(ids, cu_seqlens, sample_index, threshold, fill_id, seed, epoch)


_IMPLEMENTATIONS = {"reference": reference.word_dropout, "triton": _through_operator}
