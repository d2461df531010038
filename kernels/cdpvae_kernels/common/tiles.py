"""Where the tiles of a vocabulary cut an ascending list of token ids."""

import torch
from torch import Tensor


def tile_bounds(ascending: Tensor, vocab: int, columns: int) -> list[int]:
    """Return where each tile's tokens start in an ascending list, and where the last tile ends.

    Tile i holds the ids from i * columns on, `columns` of them or what is left of `vocab`.
    """
    edges = torch.arange(0, vocab + columns, columns)
    return torch.searchsorted(ascending, edges).tolist()
