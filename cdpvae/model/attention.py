"""Packed causal attention with an optional per-layer prefix; backends behind one function.

Sequences lie end to end in one row of T tokens. Every token sees the tokens of its own sequence up
to itself, and, if there is one, the whole prefix of its sequence: keys and values that carry no
rotary embedding and stand before position 0 of the text, as a `past_key_values` cache would.

transformers calls `packed_attention` through its attention registry; what it needs travels as
keyword arguments of the decoder layer (`packing`, `prefixes`), never as a mask.

Legend: B rows, T packed tokens, L longest row, H heads, K key/value heads, F head dimension,
P prefix length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface

ATTENTION_NAME = "cdpvae_packed"

Prefix = tuple[Tensor, Tensor]
"""Keys and values of one layer, each (B, K, P, F)."""


@dataclass
class Packing:
    """Where every packed token belongs.

    num_rows: B. max_len: L. slot: (T,) int64, row * L + column, the token's place in a padded
    (B, L) layout. position_ids: (1, T) int64 for the rotary embedding.
    """

    num_rows: int
    max_len: int
    slot: Tensor
    position_ids: Tensor

    @classmethod
    def of(
        cls, cu_seqlens: Tensor, num_tokens: int, max_len: int, first_position: int = 0
    ) -> Packing:
        """cu_seqlens: (B+1,) int32 for T = `num_tokens` packed tokens.

        `first_position` is the prefix length, where there is one.
        """
        starts, lengths = cu_seqlens[:-1].long(), (cu_seqlens[1:] - cu_seqlens[:-1]).long()
        num_rows = lengths.numel()
        device = cu_seqlens.device
        rows = torch.arange(num_rows, device=device)
        row = torch.repeat_interleave(rows, lengths, output_size=num_tokens)
        column = torch.arange(num_tokens, device=device) - starts[row]
        return cls(num_rows, max_len, row * max_len + column, (column + first_position)[None])

    def pad(self, x_TX: Tensor) -> Tensor:
        """(T, ...) -> (B, L, ...), zeros where a row has no token."""
        padded = x_TX.new_zeros((self.num_rows * self.max_len, *x_TX.shape[1:]))
        padded = padded.index_copy(0, self.slot, x_TX)
        return padded.view(self.num_rows, self.max_len, *x_TX.shape[1:])

    def unpad(self, x_BLX: Tensor) -> Tensor:
        """(B, L, ...) -> (T, ...)."""
        return x_BLX.flatten(0, 1).index_select(0, self.slot)


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
    prefixes: list[Prefix] | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention of one decoder layer, called by transformers.

    query (1, H, T, F), key and value (1, K, T, F) when `packing` is given. Without it, an ordinary
    batch whose keys may be longer than its queries because a cache stands before them.
    -> (1, T, H, F) or (B, T, H, F), and no weights.
    Raises ValueError when a mask is passed: packing alone says who sees whom, and transformers
    leaks silently between packed sequences where a mask and packing disagree.
    """
    if attention_mask is not None:
        raise ValueError("packed attention takes no attention_mask; pass `packing` instead")
    if packing is None:
        out = _causal(query, key, value, scaling, dropout)
        return out.transpose(1, 2), None
    q, k, v = (packing.pad(x[0].transpose(0, 1)).transpose(1, 2) for x in (query, key, value))
    if prefixes is not None:
        prefix_key, prefix_value = prefixes[module.layer_idx]
        k = torch.cat((prefix_key.to(k.dtype), k), dim=2)
        v = torch.cat((prefix_value.to(v.dtype), v), dim=2)
    out = _causal(q, k, v, scaling, dropout)
    return packing.unpad(out.transpose(1, 2))[None], None


def _causal(q: Tensor, k: Tensor, v: Tensor, scaling: float, dropout: float) -> Tensor:
    """Scaled dot-product attention, the last query aligned with the last key.

    Rows shorter than L are padded on the right, where the causal order already hides them.
    """
    queries, keys = q.shape[2], k.shape[2]
    mask = None
    if 1 < queries < keys:
        ones = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
        mask = ones.tril(diagonal=keys - queries)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=queries == keys and queries > 1,
        scale=scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )
