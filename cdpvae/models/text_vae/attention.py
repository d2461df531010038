"""Compute packed causal attention with an optional per-layer prefix, through any backend.

Sequences lie end to end in one row of T tokens. Every token sees the tokens of its own sequence up
to itself, and, if there is one, the whole prefix of its sequence: keys and values that carry no
rotary embedding and stand before position 0 of the text, as a `past_key_values` cache would.

transformers calls `packed_attention` through its attention registry; what it needs arrives as
keyword arguments of the decoder layer (`packing`, `backend`, `prefixes`), never as a mask.
`attention_backends.py` chooses the backend.

Legend: B rows, T packed tokens, H heads, K key/value heads, F head dimension.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor
from transformers import AttentionInterface

from cdpvae.models.text_vae.attention_backends import AttentionBackend, attend_batch
from cdpvae.models.text_vae.packing import Packing, Prefix

# The value of `attn_implementation` in the backbone's config.
ATTENTION_NAME = "cdpvae_packed"


class DecoderAttention(Protocol):
    """What is read of a decoder layer's attention module: the number of its layer."""

    layer_idx: int


def register() -> None:
    """Make `packed_attention` known to transformers under ATTENTION_NAME."""
    AttentionInterface.register(ATTENTION_NAME, packed_attention)


def packed_attention(
    module: DecoderAttention,
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
    """Compute the attention of one decoder layer; transformers calls this.

    With `packing` the batch is one row of T packed tokens. Without it, it is an ordinary batch
    whose keys may be longer than its queries because a cache stands before them.

    module: the attention module, for the number of its layer.
    query (1, H, T, F) or (B, H, T, F): rotary embedding applied.
    key, value (1, K, T, F) or (B, K, S, F): with the cache, S >= T.
    attention_mask: None.
    scaling: what scores are multiplied by before the softmax.
    dropout: 0, the base is always in eval mode.
    packing: where every packed token belongs.
    backend: what computes packed attention; given with `packing`.
    prefixes: keys and values of every layer that stand before each sequence, or None.

    -> (1, T, H, F) or (B, T, H, F), and no weights.
    Raises ValueError when a mask is passed: packing alone says who sees whom, and transformers
    leaks silently between packed sequences where a mask and packing disagree.
    """
    if attention_mask is not None:
        raise ValueError("packed attention takes no attention_mask; pass `packing` instead")
    assert dropout == 0, "the base is always in eval mode"
    # Generation: an ordinary batch after a cache.
    if packing is None:
        return attend_batch(query, key, value, scaling).transpose(1, 2), None
    # Training and encoding: packed tokens, after the prefix of this layer where there is one.
    assert backend is not None, "packing comes with a backend"
    prefix = None if prefixes is None else prefixes[module.layer_idx]
    assert packing.prefix_len == (0 if prefix is None else prefix[0].shape[2])
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return backend.attend(q, k, v, packing, prefix, scaling)[None], None
