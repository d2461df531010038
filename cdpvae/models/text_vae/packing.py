"""Say where every packed token belongs, in each layout that attention backends read.

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
    """Describe sequences laid end to end.

    cu_seqlens (B+1,): int32, where every sequence starts.
    num_tokens: T.
    max_len: L.
    prefix_len: P, 0 without a prefix.
    row (T,): int64, the sequence of every token.
    column (T,): int64, the token's position in that sequence.
    cu_seqlens_k (B+1,): int32, where the keys of every sequence start when its prefix stands before
    them; `cu_seqlens` itself without a prefix.
    prefix_slots (B*P,), text_slots (T,): int64, where prefix and text go among those T + B*P keys;
    None without a prefix.
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
        """Describe T packed tokens, each sequence behind its prefix of P keys and values.

        cu_seqlens (B+1,): int32, where every sequence starts.
        num_tokens: T.
        max_len: L.
        prefix_len: P.
        """
        # Find the sequence of every token and its position in it.
        device, num_rows = cu_seqlens.device, cu_seqlens.numel() - 1
        row = row_of_tokens(cu_seqlens, num_tokens)
        token = torch.arange(num_tokens, device=device)
        column = token - cu_seqlens[:-1].long()[row]
        # Find where prefixes and texts lie among the keys, when they are joined.
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
        """Count the sequences, B."""
        return self.cu_seqlens.numel() - 1

    @property
    def max_len_k(self) -> int:
        """Count the keys of the longest sequence, with its prefix."""
        return self.max_len + self.prefix_len

    @property
    def position_ids(self) -> Tensor:
        """Number the tokens for the rotary embedding, from P in each row -> (1, T) int64."""
        return (self.column + self.prefix_len)[None]

    def join_prefix(self, prefix_BKPF: Tensor, text_TKF: Tensor) -> Tensor:
        """Put every sequence's prefix before its tokens -> (T + B*P, K, F) in the text's dtype."""
        assert self.prefix_slots is not None and self.text_slots is not None, "no prefix_len"
        prefix_RKF = prefix_BKPF.transpose(1, 2).flatten(0, 1).to(text_TKF.dtype)
        joined = text_TKF.new_empty((len(prefix_RKF) + self.num_tokens, *text_TKF.shape[1:]))
        # In place on a fresh buffer: each of the two copies is one pass over its own rows.
        joined.index_copy_(0, self.prefix_slots, prefix_RKF)
        return joined.index_copy_(0, self.text_slots, text_TKF)

    # The padded layout (B, L)

    @property
    def is_dense(self) -> bool:
        """Tell whether all rows have the same length, so that padding is a change of shape."""
        return self.num_tokens == self.num_rows * self.max_len

    @property
    def slot(self) -> Tensor:
        """Find every token in a padded (B, L) layout, row * L + column -> (T,) int64."""
        if self._slot is None:
            self._slot = self.row * self.max_len + self.column
        return self._slot

    @property
    def mask(self) -> Tensor | None:
        """Mark where a padded query sees a key -> (L, P + L) bool; None without a prefix.

        Without a prefix, plain causal order hides the padding on the right as well.
        """
        if self.prefix_len and self._mask is None:
            self._mask = causal_mask(self.max_len, self.max_len_k, self.cu_seqlens.device)
        return self._mask

    def pad(self, x_TX: Tensor, fill: float = 0.0) -> Tensor:
        """Pad rows on the right with `fill`, (T, ...) -> (B, L, ...)."""
        # Rows of one length are padded already.
        shape = (self.num_rows, self.max_len, *x_TX.shape[1:])
        if self.is_dense:
            return x_TX.reshape(shape)
        padded = x_TX.new_full((shape[0] * shape[1], *shape[2:]), fill)
        return padded.index_copy_(0, self.slot, x_TX).view(shape)

    def unpad(self, x_BLX: Tensor) -> Tensor:
        """Drop the padding, (B, L, ...) -> (T, ...)."""
        flat = x_BLX.flatten(0, 1)
        return flat if self.is_dense else flat.index_select(0, self.slot)


def row_of_tokens(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Return the sequence of every packed token, (T,) int64.

    cu_seqlens (B+1,): where every sequence starts. num_tokens: T.
    """
    # Without `output_size` the length of the result would be read back from the device.
    return torch.repeat_interleave(cu_seqlens.diff(), output_size=num_tokens).long()


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """Mark what queries see, the last query aligned with the last key -> (queries, keys)."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
