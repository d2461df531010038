"""Measure latents and score texts. Imports nothing else of cdpvae."""

from cdpvae.metrics.latent import (
    LatentStatistics,
    LatentSummary,
    MutualInformation,
    active_units,
    count_active,
    effective_rank,
    kl_per_dim,
    mutual_information,
    variance_from_sums,
)
from cdpvae.metrics.text import ReconstructionMetrics, TextScores

__all__ = [
    "LatentStatistics",
    "LatentSummary",
    "MutualInformation",
    "ReconstructionMetrics",
    "TextScores",
    "active_units",
    "count_active",
    "effective_rank",
    "kl_per_dim",
    "mutual_information",
    "variance_from_sums",
]
