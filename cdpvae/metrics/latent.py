"""The geometry of latent vectors: effective rank, and how alike the vectors of rows are.

What belongs to a latent family, such as its active units and its KL, is in `cdpvae.latents`. None
of these figures proves that a decoder uses z; the z-use test does.

Legend: N rows, F numbers of one row's vector.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def effective_rank(mu: Tensor) -> float:
    """Return exp of the entropy of the normalised singular values of the centred (N, F) vectors.

    Roy & Vetterli 2007. 0 when all rows are equal.
    """
    values = torch.linalg.svdvals(mu.double() - mu.double().mean(0))
    total = values.sum()
    if total <= 1e-12:
        return 0.0
    p = values / total
    p = p[p > 0]
    return float(torch.exp(-(p * p.log()).sum()))


def pairwise_similarities(mu: Tensor, limit: int = 2000) -> tuple[float, float, float]:
    """Return mean cosine, largest cosine and mean Euclidean distance over pairs of rows (N, F).

    At most the first `limit` rows are compared. Zeros for fewer than two rows.
    """
    mu = mu[:limit].double()
    rows = mu.shape[0]
    if rows < 2:
        return 0.0, 0.0, 0.0
    unit = F.normalize(mu, dim=1)
    upper = torch.triu_indices(rows, rows, offset=1)
    cosine = (unit @ unit.T)[upper[0], upper[1]]
    return float(cosine.mean()), float(cosine.max()), float(torch.pdist(mu).mean())
