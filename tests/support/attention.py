"""Stand-ins for attention kernels that need a GPU: their exact signatures, computed on the CPU.

Each computes what its original documents, sequence by sequence with scaled_dot_product_attention,
and refuses inputs that the original would refuse or misread.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cdpvae.models.text_vae import attention_backends
from cdpvae.models.text_vae.attention_backends import AttentionBackend


def _packed(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal, grouped=True) -> Tensor:
    """(T, H, F) against (S, K, F); the last query of a sequence is aligned with its last key."""
    for cu, max_len, total in ((cu_q, max_q, q.shape[0]), (cu_k, max_k, k.shape[0])):
        assert cu.dtype == torch.int32 and cu.is_contiguous(), "cu_seqlens must be int32"
        assert isinstance(max_len, int) and int(cu.diff().max()) <= max_len
        assert int(cu[0]) == 0 and int(cu[-1]) == total, "cu_seqlens and tokens disagree"
    assert q.shape[1] % k.shape[1] == 0 and k.shape == v.shape
    assert grouped or q.shape[1] == k.shape[1], "as many key heads as query heads are needed"
    assert q.dtype == k.dtype == v.dtype and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out = []
    for row in range(len(cu_q) - 1):
        queries, keys = slice(cu_q[row], cu_q[row + 1]), slice(cu_k[row], cu_k[row + 1])
        one_q, one_k, one_v = (
            x[part].transpose(0, 1) for x, part in ((q, queries), (k, keys), (v, keys))
        )
        visible = torch.ones(one_q.shape[1], one_k.shape[1], dtype=torch.bool)
        if causal:
            visible = visible.tril(one_k.shape[1] - one_q.shape[1])
        attended = F.scaled_dot_product_attention(one_q, one_k, one_v, visible, scale=scale)
        out.append(attended.transpose(0, 1))
    return torch.cat(out)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """flash-attn 2.8.0 to 2.8.4: flash_attn/flash_attn_interface.py."""
    assert (dropout_p, window_size, softcap, alibi_slopes) == (0.0, (-1, -1), 0.0, None)
    assert isinstance(deterministic, bool) and not return_attn_probs and block_table is None
    cu_and_max = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _packed(q, k, v, *cu_and_max, softmax_scale, causal)


def flash_attn_2_0(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    return_attn_probs=False,
):
    """flash-attn 2.0, whose causal order is aligned at the first key: must never be called."""
    raise AssertionError("called")


def varlen_attn_2_10(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None
):
    """torch 2.10: no scale, no groups."""
    assert return_aux is None
    cu_and_max = (cu_seq_q, cu_seq_k, max_q, max_k)
    return _packed(query, key, value, *cu_and_max, None, is_causal, grouped=False)


def varlen_attn_2_11(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
):
    """torch 2.11: no groups."""
    assert return_aux is None
    causal = _causal(window_size)
    cu_and_max = (cu_seq_q, cu_seq_k, max_q, max_k)
    return _packed(query, key, value, *cu_and_max, scale, causal, grouped=False)


def varlen_attn_2_13(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    """torch 2.12 and 2.13."""
    assert return_aux is None and seqused_k is None and block_table is None and num_splits is None
    cu_and_max = (cu_seq_q, cu_seq_k, max_q, max_k)
    return _packed(query, key, value, *cu_and_max, scale, _causal(window_size), enable_gqa)


def _causal(window_size) -> bool:
    # torch compares with a tuple; a list would quietly mean a window without causal order.
    assert window_size in ((-1, 0), (-1, -1)) and isinstance(window_size, tuple)
    return window_size == (-1, 0)


def packed_backend(name: str, kernel) -> AttentionBackend:
    """A backend as `choose_backend` would make it from this kernel."""
    attend = attention_backends.packed_attend(kernel)
    return AttentionBackend(name, attend)


def backends() -> dict[str, AttentionBackend]:
    """Every way our code calls a kernel, by a name for test ids."""
    flash = attention_backends.flash_attn_kernel(flash_attn_varlen_func)
    made = {"sdpa": AttentionBackend("sdpa", attention_backends.attend_padded)}
    made["flash_attn"] = packed_backend("flash_attn", flash)
    for version, function in (
        ("2.10", varlen_attn_2_10),
        ("2.11", varlen_attn_2_11),
        ("2.13", varlen_attn_2_13),
    ):
        kernel = attention_backends.varlen_kernel(function)
        made[f"varlen torch {version}"] = packed_backend("varlen", kernel)
    return made
