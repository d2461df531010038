"""The collapse monitor, which measures the posterior, and its interventions.

A check gives a level: mild (one threshold missed), moderate (two or more) or severe (below a severe
threshold). An intervention moves the weights by that level; a healthy check moves them back.
With `watch_use` the measured use of z comes first; docs/collapse.md has the table.
"""

from __future__ import annotations

from pydantic import Field

from cdpvae.config.base import Group


class CollapseConfig(Group):
    """Thresholds, factors and bounds of the collapse monitor and its interventions."""

    # Whether to measure, and whether to act on the result.
    enable_collapse_monitoring: bool = Field(default=True, description="watch, and intervene")
    collapse_interventions: bool = Field(default=True, description="off: watch and log only")
    # When a check takes place, and over which rows.
    check_every: int = Field(default=20, ge=1, description="optimizer steps between checks")
    patience: int = Field(default=2, ge=1, description="checks in a row before an intervention")
    window_rows: int = Field(default=1024, ge=2, description="posteriors kept, from all ranks")
    # The use of z: what the decoder loses on held-out rows when z is another row's.
    watch_use: bool = Field(
        default=False, description="judge first by the measured use of z on validation rows"
    )
    use_rows: int = Field(
        default=64, ge=2, description="validation rows decoded twice at a check, by all ranks"
    )
    use_window_rows: int = Field(
        default=256, ge=2, description="rows over which the use is averaged"
    )
    min_use_share: float = Field(
        default=0.1, ge=0, le=1, description="least healthy use of z as a share of the KL"
    )
    min_use: float = Field(
        default=0.3, ge=0, description="least healthy use of z whatever the KL, nats per sequence"
    )
    grace_ratio: float = Field(
        default=1 / 3, ge=0, le=1 / 3, description="share of the steps before the use is judged"
    )
    # Thresholds: active units (Burda et al. 2016), mutual information of text and z, KL.
    au_variance: float = Field(
        default=0.01, gt=0, description="a unit is active above this variance of mu"
    )
    min_au_ratio: float = Field(
        default=0.3, ge=0, le=1, description="least healthy share of active units"
    )
    severe_au_ratio: float = Field(
        default=0.1, ge=0, le=1, description="share of active units below which it is severe"
    )
    min_mi: float = Field(
        default=1.0, ge=0, description="least healthy mutual information of text and z, nats"
    )
    severe_mi: float = Field(
        default=0.5, ge=0, description="mutual information below which it is severe, nats"
    )
    min_kl: float = Field(default=0.1, ge=0, description="least healthy KL, nats per dimension")
    # What an intervention multiplies: the weights of bag of words and InfoNCE, the word dropout.
    mild_factor: float = Field(
        default=1.1, ge=1, description="multiplies both weights at a mild collapse"
    )
    moderate_factor: float = Field(
        default=1.3, ge=1, description="multiplies both weights at a moderate collapse"
    )
    moderate_dropout_factor: float = Field(
        default=0.8, gt=0, le=1, description="multiplies the word dropout at a moderate collapse"
    )
    # Bounds, which a severe collapse sets at once; a start beyond its bound stays where it is.
    max_bow_weight: float = Field(
        default=3.0, ge=0, description="highest weight of the bag of words by intervention"
    )
    max_contrastive_weight: float = Field(
        default=0.5, ge=0, description="highest weight of InfoNCE by intervention"
    )
    min_word_dropout: float = Field(
        default=0.1, ge=0, le=1, description="lowest word dropout by intervention"
    )
    relaxation_rate: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="share of the way back to the configured weights, each healthy check",
    )
