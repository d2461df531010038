"""Mutual information between texts and latents, from densities alone.

The estimator of Hoffman & Johnson 2016 ("ELBO surgery") as Li et al. 2019 compute it, over all
rows at once: E log q(z|x) - E log q(z), with q(z) the mixture of the posteriors of all N rows.

Legend: N rows, C rows of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_ROWS = 256


@dataclass(frozen=True)
class MutualInformation:
    """I(x; z) in nats from N rows.

    `lower` cannot exceed `cap` = log N. `upper` leaves each row out of its own mixture and
    overshoots once the posteriors are further apart than N rows can tell. `lower_error` and
    `upper_error` are their standard errors over rows, None for one row; they leave out that all
    rows share one mixture.
    """

    lower: float
    upper: float
    cap: float
    lower_error: float | None = None
    upper_error: float | None = None


def information_from_densities(
    log_q: Callable[[Tensor], Tensor], z: Tensor, chunk_rows: int = CHUNK_ROWS
) -> MutualInformation:
    """Estimate I(x; z) from one z of each row.

    log_q: (C, *shape) latents -> (C, N) log q(z_c | x_n), fp64. z (N, *shape): row n drawn from
    q(z | x_n). Raises ValueError for no row.
    """
    rows = z.shape[0]
    if rows == 0:
        raise ValueError("mutual information of 0 rows; give at least one")
    lower, upper = [], []
    for start in range(0, rows, chunk_rows):
        densities = log_q(z[start : start + chunk_rows])
        here = torch.arange(densities.shape[0])
        # The same draw in both halves: their noise cancels, and no row can exceed log N.
        own = densities[here, start + here]
        lower.append(own - densities.logsumexp(1) + math.log(rows))
        if rows > 1:
            nothing = torch.tensor(-math.inf, dtype=densities.dtype)
            others = densities.index_put((here, start + here), nothing)
            upper.append(own - others.logsumexp(1) + math.log(rows - 1))
    least = torch.cat(lower)
    if not upper:
        return MutualInformation(float(least.mean()), float(least.mean()), math.log(rows))
    # Of two rows or more the spread over rows is known as well.
    most = torch.cat(upper)
    errors = (float(values.std() / math.sqrt(rows)) for values in (least, most))
    return MutualInformation(float(least.mean()), float(most.mean()), math.log(rows), *errors)
