"""The dataclasses that packages hand each other: batches, the schedule of a step, loss terms.

Sequences are always packed: laid end to end, without padding, with `cu_seqlens` marking the
borders. Padded tensors are adapted here (`from_padded`, `to_padded`), so that the model and the
losses have one path. Everything is frozen: whoever changes something makes a new object.

A *row* is one sequence; a place in packed text is a *position*.

Legend: B rows, T packed tokens, N target positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal, TypeVar

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


@dataclass(frozen=True)
class PackedText:
    """Sequences laid end to end, no padding.

    ids (T,) int64. cu_seqlens (B+1,) int32: cu_seqlens[0] == 0, cu_seqlens[B] == T.
    max_len: the longest sequence, in tokens.
    """

    ids: Tensor
    cu_seqlens: Tensor
    max_len: int

    @property
    def num_rows(self) -> int:
        """B."""
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
        # The mask says which tokens are real, on whatever side the padding is.
        keep = mask_BL.bool()
        lengths = keep.sum(1)
        if ids_BL.shape[0] == 0 or int(lengths.min()) == 0:
            raise ValueError("every row of a batch needs at least one token that is not padding")
        cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=ids_BL.device)
        cu_seqlens[1:] = lengths.cumsum(0)
        return cls(ids_BL[keep].long(), cu_seqlens, int(lengths.max()))

    @classmethod
    def concat(cls, first: PackedText, second: PackedText) -> PackedText:
        """Return the rows of `first`, then those of `second`."""
        # The borders of the second text move by the length of the first.
        offset = first.cu_seqlens[-1]
        return cls(
            torch.cat((first.ids, second.ids)),
            torch.cat((first.cu_seqlens, second.cu_seqlens[1:] + offset)),
            max(first.max_len, second.max_len),
        )

    def to_padded(self, pad_id: int) -> tuple[Tensor, Tensor]:
        """Return ids (B, max_len) int64 padded on the right, and the mask (B, max_len) int64."""
        position = torch.arange(self.max_len, device=self.ids.device)
        mask = position[None, :] < self.lengths[:, None]
        ids = self.ids.new_full(mask.shape, pad_id)
        ids[mask] = self.ids
        return ids, mask.long()

    def to(self, device: torch.device | str) -> PackedText:
        """Return the same sequences on another device."""
        return _move(self, device)

    def rows(self) -> list[Tensor]:
        """Return the B sequences as views."""
        return list(self.ids.split(self.lengths.tolist()))


def next_token_targets(response: PackedText) -> tuple[Tensor, Tensor]:
    """Return the positions that predict a next token, and the tokens they predict.

    The position of response[i] predicts response[i+1]; the last of each row predicts nothing.
    -> target_positions (N,) int64 positions in response.ids, targets (N,) int64.
    """
    # The last position of a row has no next token in its own row.
    last = response.cu_seqlens[1:].long() - 1
    predicts = torch.ones_like(response.ids, dtype=torch.bool)
    predicts[last] = False
    target_positions = predicts.nonzero().squeeze(1)
    return target_positions, response.ids[target_positions + 1]


@dataclass(frozen=True)
class VAEBatch:
    """One micro-batch of one rank, packed.

    instruction: what the encoder reads.
    response: what the decoder writes.
    augmented: second view of the instruction, or None.
    sample_index (B,) int64: index in the data set; keys every random stream.
    target_positions (N,) int64: positions in response.ids that predict the next token.
    targets (N,) int64: the token each of them predicts.
    """

    instruction: PackedText
    response: PackedText
    augmented: PackedText | None
    sample_index: Tensor
    target_positions: Tensor
    targets: Tensor

    @property
    def num_rows(self) -> int:
        """B."""
        return self.response.num_rows

    @classmethod
    def build(cls, instruction: PackedText, response: PackedText, sample_index: Tensor) -> VAEBatch:
        """Make a batch without an augmented view; targets are read off the response."""
        target_positions, targets = next_token_targets(response)
        return cls(instruction, response, None, sample_index, target_positions, targets)

    @classmethod
    def from_padded(
        cls,
        instruction_ids: Tensor,
        instruction_mask: Tensor,
        response_ids: Tensor,
        response_mask: Tensor,
        sample_index: Tensor | None = None,
    ) -> VAEBatch:
        """Adapt padded tensors.

        instruction_ids, instruction_mask (B, L): what the encoder reads; 0 in a mask is padding.
        response_ids, response_mask (B, L): what the decoder writes.
        sample_index (B,) int64: 0..B-1 by default.
        """
        instruction = PackedText.from_padded(instruction_ids, instruction_mask)
        response = PackedText.from_padded(response_ids, response_mask)
        if sample_index is None:
            sample_index = torch.arange(response.num_rows, device=response_ids.device)
        return cls.build(instruction, response, sample_index)

    def to_padded(self, pad_id: int) -> dict[str, Tensor]:
        """Return instruction_ids/_mask and response_ids/_mask, each (B, L) int64."""
        instruction_ids, instruction_mask = self.instruction.to_padded(pad_id)
        response_ids, response_mask = self.response.to_padded(pad_id)
        return {
            "instruction_ids": instruction_ids,
            "instruction_mask": instruction_mask,
            "response_ids": response_ids,
            "response_mask": response_mask,
        }

    def to(self, device: torch.device | str) -> VAEBatch:
        """Return the same batch on another device."""
        return _move(self, device)


Packed = TypeVar("Packed", PackedText, VAEBatch)


def _move(value: Packed, device: torch.device | str) -> Packed:
    """Return a copy whose tensors, nested ones too, are on `device`."""
    moved = {}
    for part in fields(value):
        content = getattr(value, part.name)
        if isinstance(content, Tensor):
            content = content.to(device, non_blocking=True)
        elif isinstance(content, PackedText):
            content = content.to(device)
        moved[part.name] = content
    return type(value)(**moved)


@dataclass(frozen=True, kw_only=True)
class StepSchedule:
    """All that varies by optimizer step; the same on every rank.

    step: optimizer steps taken before this one.
    epoch: 0-based.
    beta: weight of the rate (the KL term).
    weights: of the other loss terms, by the name of the setting without `_weight`.
    word_dropout: share of decoder inputs that are dropped.
    target_divisor: valid target tokens of the whole optimizer step, all ranks.
    row_divisor: rows of the whole optimizer step, all ranks, where micro-batches differ in their
        number of rows; else None.
    with_view: whether the augmented view is computed in this step.
    """

    step: int
    epoch: int
    beta: float
    weights: Mapping[str, float]
    word_dropout: float
    target_divisor: float
    row_divisor: int | None = None
    with_view: bool = False


@dataclass(frozen=True, kw_only=True)
class Term:
    """One loss term of a micro-batch; what is weighed, logged and averaged follows from it.

    name: the column of `steps.jsonl` and the tag in TensorBoard.
    value (): the loss, not weighted; carries the graph. For a term of weight 0, what is reported.
    weight: its factor in the total; exactly 0 leaves the term out of the total.
    per: what the value is a mean over. `token`: the target tokens of the whole optimizer step,
        whose number the value is divided by already. `row`: the rows of the micro-batch.
    report: further figures logged under their own names, averaged like the value: scalars (), or
        one number for each latent dimension.
    share: what the mean over this micro-batch's rows weighs in the mean over micro-batches that
        makes it a mean over the rows of the step; 1 where all have the same number of rows.
    """

    name: str
    value: Tensor
    weight: float
    per: Literal["token", "row"]
    report: Mapping[str, Tensor] = field(default_factory=dict)
    share: float = 1.0

    @property
    def weighted(self) -> Tensor:
        """Return the term as it enters the total, (): zero without a graph for weight 0."""
        factor = self.weight * self.share
        # Not 0 * value: that would carry an infinite value into the total as NaN.
        return factor * self.value if factor != 0 else torch.zeros_like(self.value.detach())

    def figures(self) -> dict[str, Tensor]:
        """Return the value and the report by name, detached fp32, scaled by `share`."""
        named = {self.name: self.value, **self.report}
        scaled = {name: value.detach().float() for name, value in named.items()}
        if self.share == 1:
            return scaled
        return {name: value * self.share for name, value in scaled.items()}


@dataclass(frozen=True)
class StepOutput:
    """What a model's forward gives the training loop for one micro-batch.

    terms: of the objective, in the order in which they are added up.
    observed: further tensors by name, detached, for what watches the training.
    gradient_point: with its graph, the tensor at which the terms' gradients are compared.
    """

    terms: list[Term]
    observed: Mapping[str, Tensor]
    gradient_point: Tensor

    @property
    def total(self) -> Tensor:
        """Return the loss that backward starts from, ()."""
        return sum_of(self.terms)


def sum_of(terms: list[Term]) -> Tensor:
    """Return the sum of the weighted terms, (). Raises ValueError for no term."""
    if not terms:
        raise ValueError("an objective without a term has no loss")
    first, *rest = (term.weighted for term in terms)
    total = first
    for term in rest:
        total = total + term
    return total
