"""Where the tiles of a vocabulary cut an ascending list of token ids."""

import torch
from torch import Tensor


def tile_bounds(ascending: Tensor, vocab: int, columns: int) -> list[int]:
    """Where each tile's tokens start in an ascending list of token ids, and where the last ends."""
    edges = torch.arange(0, vocab + columns, columns)
    return torch.searchsorted(ascending, edges).tolist()
