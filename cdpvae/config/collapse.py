"""The collapse monitor and its interventions."""

from __future__ import annotations

from pydantic import Field

from cdpvae.config.base import Group


class CollapseConfig(Group):
    """Thresholds, factors and bounds of the collapse monitor and its interventions."""

    enable_collapse_monitoring: bool = Field(True, description="watch, and intervene")
    collapse_interventions: bool = Field(True, description="false: watch and log only")
    check_every: int = Field(20, ge=1, description="optimizer steps between checks")
    patience: int = Field(2, ge=1, description="checks in a row before an intervention")
    window_rows: int = Field(1024, ge=2, description="posteriors kept, from all ranks")
    au_variance: float = Field(0.01, gt=0, description="a unit is active above this variance of mu")
    min_au_ratio: float = Field(0.3, ge=0, le=1)
    severe_au_ratio: float = Field(0.1, ge=0, le=1)
    min_mi: float = Field(1.0, ge=0, description="nats")
    severe_mi: float = Field(0.5, ge=0, description="nats")
    min_kl: float = Field(0.1, ge=0, description="nats per dimension")
    mild_factor: float = Field(1.1, ge=1)
    moderate_factor: float = Field(1.3, ge=1)
    moderate_dropout_factor: float = Field(0.8, gt=0, le=1)
    max_bow_weight: float = Field(3.0, ge=0)
    max_contrastive_weight: float = Field(0.5, ge=0)
    min_word_dropout: float = Field(0.1, ge=0, le=1)
    relaxation_rate: float = Field(
        0.1, ge=0, le=1, description="share of the way back to the defaults, each healthy check"
    )
