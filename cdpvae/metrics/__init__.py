"""What the numbers are: latent statistics, text scores, throughput. Imports nothing of ours."""

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
from cdpvae.metrics.throughput import ThroughputMeter, peak_flops, training_flops

__all__ = [
    "ActiveUnitsCounter",
    "LatentStatistics",
    "LatentSummary",
    "MutualInformation",
    "ReconstructionMetrics",
    "TextScores",
    "ThroughputMeter",
    "active_units",
    "effective_rank",
    "kl_per_dim",
    "mutual_information",
    "peak_flops",
    "training_flops",
]
