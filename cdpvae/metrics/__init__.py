"""What the numbers are: latent statistics and text scores. Imports nothing of ours."""

from cdpvae.metrics.latent import (
    ActiveUnitsCounter,
    LatentStatistics,
    LatentSummary,
    MutualInformation,
    active_units,
    effective_rank,
    kl_per_dim,
    mutual_information,
)
from cdpvae.metrics.text import ReconstructionMetrics, TextScores

__all__ = [
    "ActiveUnitsCounter",
    "LatentStatistics",
    "LatentSummary",
    "MutualInformation",
    "ReconstructionMetrics",
    "TextScores",
    "active_units",
    "effective_rank",
    "kl_per_dim",
    "mutual_information",
]
