"""The dataclasses that travel between the rooms of the house.

Sequences are always packed: laid end to end, without padding, with `cu_seqlens` marking the
borders. Padded tensors are adapted here, at the border (`from_padded`, `to_padded`), so that the
model and the losses have one path.

Legend: B rows, T packed tokens, N target positions, Z latent.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class SpecialTokens:
    """Ids the network treats apart. `special`: every special id of the tokenizer."""

    bos: int
    eos: int
    pad: int
    unk: int | None = None
    special: tuple[int, ...] = ()

    @property
    def no_content(self) -> tuple[int, ...]:
        """BOS, EOS and pad, whatever else is special; sorted."""
        return tuple(sorted({self.bos, self.eos, self.pad}))


@dataclass
class PackedText:
    """Sequences laid end to end, no padding.

    ids: (T,) int64. cu_seqlens: (B+1,) int32, cu_seqlens[0] == 0, cu_seqlens[B] == T.
    max_len: the longest sequence, in tokens.
    """

    ids: Tensor
    cu_seqlens: Tensor
    max_len: int

    @property
    def num_rows(self) -> int:
        return self.cu_seqlens.numel() - 1

    @property
    def lengths(self) -> Tensor:
        """(B,) int32 tokens per row."""
        return self.cu_seqlens[1:] - self.cu_seqlens[:-1]

    @classmethod
    def from_lists(cls, rows: list[list[int]]) -> PackedText:
        """Pack B lists of token ids. Raises ValueError for an empty list or an empty row."""
        if not rows or any(len(row) == 0 for row in rows):
            raise ValueError(
                f"cannot pack {len(rows)} rows of lengths {[len(r) for r in rows]}: "
                "at least one row is needed and every row needs at least one token"
            )
        lengths = torch.tensor([len(row) for row in rows])
        cu_seqlens = torch.zeros(len(rows) + 1, dtype=torch.int32)
        cu_seqlens[1:] = lengths.cumsum(0)
        ids = torch.tensor([token for row in rows for token in row], dtype=torch.int64)
        return cls(ids, cu_seqlens, int(lengths.max()))

    @classmethod
    def from_padded(cls, ids_BL: Tensor, mask_BL: Tensor) -> PackedText:
        """Pack padded ids (B, L) with attention mask (B, L); 0 marks padding, on either side.

        Raises ValueError when the shapes differ or a row has no token.
        """
        if ids_BL.shape != mask_BL.shape or ids_BL.dim() != 2:
            raise ValueError(
                f"input ids {tuple(ids_BL.shape)} and attention mask {tuple(mask_BL.shape)} "
                "must both be (batch, length)"
            )
        keep = mask_BL.bool()
        lengths = keep.sum(1)
        if ids_BL.shape[0] == 0 or int(lengths.min()) == 0:
            raise ValueError("every row of a batch needs at least one token that is not padding")
        cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=ids_BL.device)
        cu_seqlens[1:] = lengths.cumsum(0)
        return cls(ids_BL[keep].long(), cu_seqlens, int(lengths.max()))

    @classmethod
    def concat(cls, first: PackedText, second: PackedText) -> PackedText:
        """The rows of `first`, then those of `second`."""
        offset = first.cu_seqlens[-1]
        return cls(
            torch.cat((first.ids, second.ids)),
            torch.cat((first.cu_seqlens, second.cu_seqlens[1:] + offset)),
            max(first.max_len, second.max_len),
        )

    def to_padded(self, pad_id: int) -> tuple[Tensor, Tensor]:
        """-> ids (B, max_len) int64 padded on the right, mask (B, max_len) int64."""
        position = torch.arange(self.max_len, device=self.ids.device)
        mask = position[None, :] < self.lengths[:, None]
        ids = self.ids.new_full(mask.shape, pad_id)
        ids[mask] = self.ids
        return ids, mask.long()

    def to(self, device: torch.device | str) -> PackedText:
        """The same sequences on another device."""
        return _move(self, device)

    def rows(self) -> list[Tensor]:
        """The B sequences as views."""
        return list(self.ids.split(self.lengths.tolist()))


def next_token_targets(response: PackedText) -> tuple[Tensor, Tensor]:
    """The position of response[i] predicts response[i+1]; the last of each row predicts nothing.

    -> target_rows (N,) int64 positions in response.ids, targets (N,) int64.
    """
    last = response.cu_seqlens[1:].long() - 1
    predicts = torch.ones_like(response.ids, dtype=torch.bool)
    predicts[last] = False
    target_rows = predicts.nonzero().squeeze(1)
    return target_rows, response.ids[target_rows + 1]


@dataclass
class VAEBatch:
    """One micro-batch of one rank, packed.

    instruction: what the encoder reads. response: what the decoder writes.
    augmented: second view of the instruction, or None.
    sample_index: (B,) int64, index in the data set; keys every random stream.
    target_rows: (N,) int64, positions in response.ids that predict the next token.
    targets: (N,) int64, the token each of them predicts.
    """

    instruction: PackedText
    response: PackedText
    augmented: PackedText | None
    sample_index: Tensor
    target_rows: Tensor
    targets: Tensor

    @property
    def num_rows(self) -> int:
        return self.response.num_rows

    @classmethod
    def build(cls, instruction: PackedText, response: PackedText, sample_index: Tensor) -> VAEBatch:
        """A batch without an augmented view; targets are read off the response."""
        target_rows, targets = next_token_targets(response)
        return cls(instruction, response, None, sample_index, target_rows, targets)

    @classmethod
    def from_padded(
        cls,
        instruction_ids: Tensor,
        instruction_mask: Tensor,
        response_ids: Tensor,
        response_mask: Tensor,
        sample_index: Tensor | None = None,
    ) -> VAEBatch:
        """Adapt padded (B, L) tensors. `sample_index` defaults to 0..B-1."""
        instruction = PackedText.from_padded(instruction_ids, instruction_mask)
        response = PackedText.from_padded(response_ids, response_mask)
        if sample_index is None:
            sample_index = torch.arange(response.num_rows, device=response_ids.device)
        return cls.build(instruction, response, sample_index)

    def to_padded(self, pad_id: int) -> dict[str, Tensor]:
        """-> instruction_ids/_mask and response_ids/_mask, each (B, L) int64."""
        instruction_ids, instruction_mask = self.instruction.to_padded(pad_id)
        response_ids, response_mask = self.response.to_padded(pad_id)
        return {
            "instruction_ids": instruction_ids,
            "instruction_mask": instruction_mask,
            "response_ids": response_ids,
            "response_mask": response_mask,
        }

    def to(self, device: torch.device | str) -> VAEBatch:
        """The same batch on another device."""
        return _move(self, device)


def _move(value, device):
    """Tensors inside (nested) dataclasses, moved; everything else as it is."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, PackedText | VAEBatch):
        moved = {f.name: _move(getattr(value, f.name), device) for f in fields(value)}
        return type(value)(**moved)
    return value


@dataclass
class Posterior:
    """q(z|x), a diagonal Gaussian, fp32. mu: (B, Z). logvar: (B, Z)."""

    mu: Tensor
    logvar: Tensor


@dataclass(frozen=True)
class StepPlan:
    """All that varies by optimizer step; the same on every rank.

    step: optimizer steps taken before this one. epoch: 0-based.
    target_divisor: valid target tokens of the whole optimizer step, all ranks.
    with_view: compute the augmented view in this step. row_divisor: rows of the whole optimizer
    step, all ranks, where micro-batches differ in their number of rows; else None.
    """

    step: int
    epoch: int
    beta: float
    bow_weight: float
    contrastive_weight: float
    word_dropout: float
    target_divisor: float
    with_view: bool
    row_divisor: int | None = None


@dataclass
class LossTerms:
    """Scalars (fp32) unless said otherwise; None for a term that was not computed.

    total: what backward starts from. recon: nats per target token. kl: after free bits, divided
    by Z. kl_raw: nats per sequence, summed over dimensions. kl_per_dim: (Z,) nats.
    recon_nats_per_sequence, neg_elbo: nats per sequence. mi_bound: log K - infonce; mi_cap: log K.
    row_weight: what a mean over the rows of this micro-batch weighs in the mean over micro-batches
    that makes it a mean over the rows of the step; 1 where all have the same number of rows.
    """

    total: Tensor
    recon: Tensor
    kl: Tensor
    kl_raw: Tensor
    bow: Tensor
    infonce: Tensor | None
    kl_per_dim: Tensor
    active_dims: Tensor
    recon_nats_per_sequence: Tensor
    neg_elbo: Tensor
    mi_bound: Tensor | None
    mi_cap: float | None
    row_weight: float = 1.0
