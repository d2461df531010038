"""Pack rows of token ids into batches.

Legend: B rows, T packed tokens, N target positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from cdpvae.batch import PackedText, VAEBatch

Row = Mapping[str, Sequence[int] | np.ndarray]
"""instruction_ids and response_ids of one row."""


class VAECollator:
    """Pack rows into a `VAEBatch`, on the CPU. Packing adds no token.

    pad_id: kept for those who pad a batch afterwards, `batch.to_padded(collator.pad_id)`.
    """

    def __init__(self, pad_id: int | None = None) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: Sequence[Row], sample_index: Sequence[int]) -> VAEBatch:
        """Pack B rows and find their N targets.

        sample_index: B ints, the index in the data set of each row.
        Raises ValueError for no row, an empty row, or another number of indices.
        """
        if len(rows) != len(sample_index):
            raise ValueError(
                f"{len(rows)} rows but {len(sample_index)} sample indices; give one index a row"
            )
        # Both sides are packed alike; which response tokens are targets follows from the packing.
        instruction = _pack([row["instruction_ids"] for row in rows], "instruction_ids")
        response = _pack([row["response_ids"] for row in rows], "response_ids")
        return VAEBatch.build(
            instruction, response, torch.as_tensor(sample_index, dtype=torch.int64)
        )


def _pack(rows: Sequence[Sequence[int] | np.ndarray], name: str) -> PackedText:
    """Lay B rows end to end. numpy does it: rows come as int32 views of a memory map."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    if len(lengths) == 0 or lengths.min() == 0:
        raise ValueError(
            f"{name}: cannot pack rows of lengths {lengths.tolist()}; a batch needs a row and "
            "every row a token"
        )
    # Kernels want int32 borders; embeddings want int64 ids.
    cu_seqlens = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    ids = np.concatenate(rows).astype(np.int64)
    return PackedText(torch.from_numpy(ids), torch.from_numpy(cu_seqlens), int(lengths.max()))
