"""Padded tensors instead of packed text: classes of the description's API that take or give them.

Training does not use this module. Both classes work on packed text inside.

Legend: B rows, L padded length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cdpvae.batch import PackedText
from cdpvae.data.augmentation import PackedAugmenter
from cdpvae.data.collator import Row, VAECollator


class DynamicPaddingCollator:
    """Pad rows on the right to the longest of the batch, or to fixed lengths.

    pad_id: what fills a row. max_instruction_tokens, max_response_tokens: a fixed L; None pads to
    the longest row.
    """

    def __init__(
        self,
        pad_id: int,
        max_instruction_tokens: int | None = None,
        max_response_tokens: int | None = None,
    ) -> None:
        self._collate = VAECollator(pad_id)
        self.pad_id = pad_id
        self._fixed = {"instruction": max_instruction_tokens, "response": max_response_tokens}

    def __call__(
        self, rows: Sequence[Row], sample_index: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """Make instruction_ids/_mask and response_ids/_mask, (B, L) int64, and sample_index (B,).

        `sample_index` defaults to 0..B-1. Raises ValueError for a row above a fixed length.
        """
        # Pack first, so that both collators refuse the same rows.
        index = range(len(rows)) if sample_index is None else sample_index
        batch = self._collate(rows, list(index))
        padded = batch.to_padded(self.pad_id)
        # Widen the sides that have a fixed length.
        for side, length in self._fixed.items():
            if length is not None:
                for key, fill in ((f"{side}_ids", self.pad_id), (f"{side}_mask", 0)):
                    padded[key] = _widen(padded[key], length, fill, side)
        return padded | {"sample_index": batch.sample_index}


def _widen(padded: Tensor, length: int, fill: int, side: str) -> Tensor:
    """Add columns of `fill` on the right of a (B, L) tensor of `side`, up to `length` of them."""
    if padded.shape[1] > length:
        raise ValueError(
            f"max_{side}_tokens={length} is below the longest row of the batch "
            f"({padded.shape[1]} tokens); raise it, or leave it out to pad to the longest row"
        )
    return torch.nn.functional.pad(padded, (0, length - padded.shape[1]), value=fill)


class TextAugmenter(PackedAugmenter):
    """Apply the three strategies to padded tensors as well.

    Masked tokens become `fill_id`; where it is None, `pad_id` with the attention off.
    """

    def augment(
        self,
        ids: Tensor,
        attention_mask: Tensor,
        sample_index: Tensor | None = None,
        epoch: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Make the view that `view` makes of the packed rows -> ids and mask, both (B, L).

        ids (B, L): token ids, padded on either side.
        attention_mask (B, L): 0 where `ids` is padding.
        sample_index (B,): keys of the draws, 0..B-1 by default.
        epoch: a key of the draws as well.

        Raises ValueError for mismatched shapes or a row without a token.
        """
        text = PackedText.from_padded(ids, attention_mask)
        if sample_index is None:
            sample_index = torch.arange(text.num_rows, device=ids.device)
        shuffled, masked = self.decide(text, sample_index, epoch)
        # Write the packed result back to where its tokens came from.
        real = attention_mask.bool()
        out_ids, out_mask = ids.clone(), attention_mask.clone()
        fill = self.pad_id if self.fill_id is None else self.fill_id
        out_ids[real] = shuffled.masked_fill(masked, fill).to(ids.dtype)
        if self.fill_id is None:
            out_mask[real] = (~masked).to(attention_mask.dtype)
        return out_ids, out_mask
