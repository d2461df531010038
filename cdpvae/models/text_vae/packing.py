"""Where every packed token belongs, and the layouts that attention backends read it in.

Nothing here waits for the device: sizes come from the host (`num_tokens`, `max_len`), and index
tensors are made by operations whose output size is known beforehand. They are made once for a pass
and shared by its layers; those of the padded layout on first use, as not every backend pads.

Legend: B rows, T packed tokens, L longest row, K key/value heads, F head dimension, P prefix
length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Prefix = tuple[Tensor, Tensor]
"""Keys and values of one layer, each (B, K, P, F)."""


@dataclass
class Packing:
    """Sequences laid end to end.

    cu_seqlens: (B+1,) int32. num_tokens: T. max_len: L. prefix_len: P, 0 without a prefix.
    row: (T,) int64, the sequence of every token. column: (T,) int64, its place in that sequence.
    cu_seqlens_k: (B+1,) int32, where the keys of every sequence start when its prefix stands before
    them; `cu_seqlens` itself without one.
    prefix_slots, text_slots: (B*P,) and (T,) int64, where both go among those T + B*P keys.
    """

    cu_seqlens: Tensor
    num_tokens: int
    max_len: int
    prefix_len: int
    row: Tensor
    column: Tensor
    cu_seqlens_k: Tensor
    prefix_slots: Tensor | None
    text_slots: Tensor | None
    _slot: Tensor | None = None
    _mask: Tensor | None = None

    @classmethod
    def of(cls, cu_seqlens: Tensor, num_tokens: int, max_len: int, prefix_len: int = 0) -> Packing:
        """cu_seqlens: (B+1,) int32 for T = `num_tokens` packed tokens, the longest row `max_len`.

        `prefix_len` keys and values stand before position 0 of every sequence.
        """
        device, num_rows = cu_seqlens.device, cu_seqlens.numel() - 1
        # Without `output_size` the length of the result would be read back from the device.
        row = torch.repeat_interleave(cu_seqlens.diff(), output_size=num_tokens).long()
        token = torch.arange(num_tokens, device=device)
        column = token - cu_seqlens[:-1].long()[row]
        cu_seqlens_k, prefix_slots, text_slots = cu_seqlens, None, None
        if prefix_len:
            rows = torch.arange(num_rows + 1, dtype=torch.int32, device=device)
            cu_seqlens_k = cu_seqlens + prefix_len * rows
            place = torch.arange(prefix_len, device=device)
            prefix_slots = (cu_seqlens_k[:-1].long()[:, None] + place).flatten()
            text_slots = token + prefix_len * (row + 1)
        return cls(
            cu_seqlens,
            num_tokens,
            max_len,
            prefix_len,
            row,
            column,
            cu_seqlens_k,
            prefix_slots,
            text_slots,
        )

    @property
    def num_rows(self) -> int:
        return self.cu_seqlens.numel() - 1

    @property
    def max_len_k(self) -> int:
        """The most keys of one sequence."""
        return self.max_len + self.prefix_len

    @property
    def position_ids(self) -> Tensor:
        """(1, T) int64 for the rotary embedding: the text continues after the prefix."""
        return (self.column + self.prefix_len)[None]

    def join_prefix(self, prefix_BKPF: Tensor, text_TKF: Tensor) -> Tensor:
        """-> (T + B*P, K, F): every sequence's prefix, then its tokens. In the text's dtype."""
        prefix_RKF = prefix_BKPF.transpose(1, 2).flatten(0, 1).to(text_TKF.dtype)
        joined = text_TKF.new_empty((len(prefix_RKF) + self.num_tokens, *text_TKF.shape[1:]))
        # In place on a fresh buffer: each of the two copies is one pass over its own rows.
        joined.index_copy_(0, self.prefix_slots, prefix_RKF)
        return joined.index_copy_(0, self.text_slots, text_TKF)

    # The padded layout (B, L)

    @property
    def is_dense(self) -> bool:
        """Every row is as long as the longest: padding is a change of shape."""
        return self.num_tokens == self.num_rows * self.max_len

    @property
    def slot(self) -> Tensor:
        """(T,) int64, row * L + column, the token's place in a padded (B, L) layout."""
        if self._slot is None:
            self._slot = self.row * self.max_len + self.column
        return self._slot

    @property
    def mask(self) -> Tensor | None:
        """(L, P + L) bool, True where a padded query sees a key; None without a prefix.

        Without one, plain causal order hides the padding on the right as well.
        """
        if self.prefix_len and self._mask is None:
            self._mask = causal_mask(self.max_len, self.max_len_k, self.cu_seqlens.device)
        return self._mask

    def pad(self, x_TX: Tensor, fill: float = 0.0) -> Tensor:
        """(T, ...) -> (B, L, ...), `fill` where a row has no token."""
        shape = (self.num_rows, self.max_len, *x_TX.shape[1:])
        if self.is_dense:
            return x_TX.reshape(shape)
        padded = x_TX.new_full((shape[0] * shape[1], *shape[2:]), fill)
        return padded.index_copy_(0, self.slot, x_TX).view(shape)

    def unpad(self, x_BLX: Tensor) -> Tensor:
        """(B, L, ...) -> (T, ...)."""
        flat = x_BLX.flatten(0, 1)
        return flat if self.is_dense else flat.index_select(0, self.slot)


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """(queries, keys) bool, the last query aligned with the last key."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
