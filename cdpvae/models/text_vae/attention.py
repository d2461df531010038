"""Packed causal attention with an optional per-layer prefix; backends behind one function.

Sequences lie end to end in one row of T tokens. Every token sees the tokens of its own sequence up
to itself, and, if there is one, the whole prefix of its sequence: keys and values that carry no
rotary embedding and stand before position 0 of the text, as a `past_key_values` cache would.

transformers calls `packed_attention` through its attention registry; what it needs travels as
keyword arguments of the decoder layer (`packing`, `backend`, `prefixes`), never as a mask. Which
backend runs is said in `attention_backends.py`.

Legend: B rows, T packed tokens, H heads, K key/value heads, F head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AttentionInterface

from cdpvae.models.text_vae.attention_backends import AttentionBackend, attend_batch
from cdpvae.models.text_vae.packing import Packing, Prefix

ATTENTION_NAME = "cdpvae_packed"


def register() -> None:
    """Make `packed_attention` known to transformers under ATTENTION_NAME."""
    AttentionInterface.register(ATTENTION_NAME, packed_attention)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    packing: Packing | None = None,
    backend: AttentionBackend | None = None,
    prefixes: list[Prefix] | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention of one decoder layer, called by transformers.

    query (1, H, T, F), key and value (1, K, T, F) when `packing` is given, and `backend` with it.
    Without it, an ordinary batch whose keys may be longer than its queries because a cache stands
    before them. -> (1, T, H, F) or (B, T, H, F), and no weights.
    Raises ValueError when a mask is passed: packing alone says who sees whom, and transformers
    leaks silently between packed sequences where a mask and packing disagree.
    """
    if attention_mask is not None:
        raise ValueError("packed attention takes no attention_mask; pass `packing` instead")
    assert dropout == 0, "the base is always in eval mode"
    if packing is None:
        return attend_batch(query, key, value, scaling).transpose(1, 2), None
    prefix = None if prefixes is None else prefixes[module.layer_idx]
    assert packing.prefix_len == (0 if prefix is None else prefix[0].shape[2])
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return backend.attend(q, k, v, packing, prefix, scaling)[None], None
