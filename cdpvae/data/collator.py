"""Rows of token ids to batches: packed for training, padded at the border.

Legend: B rows, T packed tokens, L longest row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from cdpvae.batch import PackedText, VAEBatch

Row = Mapping[str, Sequence[int] | np.ndarray]


class VAECollator:
    """Packs rows into a `VAEBatch`, on the CPU. Packing adds no token.

    pad_id: kept for those who pad a batch afterwards, `batch.to_padded(collator.pad_id)`.
    """

    def __init__(self, pad_id: int | None = None) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: Sequence[Row], sample_index: Sequence[int]) -> VAEBatch:
        """rows: B dicts with instruction_ids and response_ids. sample_index: B ints.

        Raises ValueError for no row, an empty row, or another number of indices.
        """
        if len(rows) != len(sample_index):
            raise ValueError(f"{len(rows)} rows but {len(sample_index)} sample indices")
        instruction = _pack([row["instruction_ids"] for row in rows], "instruction_ids")
        response = _pack([row["response_ids"] for row in rows], "response_ids")
        return VAEBatch.build(
            instruction, response, torch.as_tensor(sample_index, dtype=torch.int64)
        )


class DynamicPaddingCollator:
    """Pads rows on the right to the longest of the batch, or to fixed lengths.

    max_instruction_tokens, max_response_tokens: fixed L; None pads to the longest row.
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
        """-> instruction_ids/_mask, response_ids/_mask, each (B, L) int64, and sample_index (B,).

        `sample_index` defaults to 0..B-1. Raises ValueError for a row above a fixed length.
        """
        index = range(len(rows)) if sample_index is None else sample_index
        batch = self._collate(rows, list(index))
        padded = batch.to_padded(self.pad_id)
        for side, length in self._fixed.items():
            if length is not None:
                for key, fill in ((f"{side}_ids", self.pad_id), (f"{side}_mask", 0)):
                    padded[key] = _widen(padded[key], length, fill, side)
        return padded | {"sample_index": batch.sample_index}


def _pack(rows: Sequence[Sequence[int] | np.ndarray], name: str) -> PackedText:
    """numpy does the concatenation: rows come as int32 views of a memory map."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    if len(lengths) == 0 or lengths.min() == 0:
        raise ValueError(
            f"{name}: cannot pack rows of lengths {lengths.tolist()}; a batch needs a row and "
            "every row a token"
        )
    cu_seqlens = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    ids = np.concatenate(rows).astype(np.int64)
    return PackedText(torch.from_numpy(ids), torch.from_numpy(cu_seqlens), int(lengths.max()))


def _widen(padded: Tensor, length: int, fill: int, side: str) -> Tensor:
    if padded.shape[1] > length:
        raise ValueError(
            f"max_{side}_tokens={length} is below the longest row of the batch "
            f"({padded.shape[1]} tokens)"
        )
    return torch.nn.functional.pad(padded, (0, length - padded.shape[1]), value=fill)
