"""The objective, one term a file; `objective.py` adds them up."""

from cdpvae.loss.annealing import CyclicalAnnealingSchedule
from cdpvae.loss.base import Gather, LossInputs, LossTerm, StepContext
from cdpvae.loss.bow import BagOfWords, bow_loss, content_ids
from cdpvae.loss.contrastive import Contrastive, InfoNCELoss, InfoNCETerms, MomentumQueue
from cdpvae.loss.objective import Objective, build_objective
from cdpvae.loss.rate import Rate, RateTerms, clamp_rate
from cdpvae.loss.rate_control import (
    LagrangeMultiplier,
    ProportionalIntegral,
    RateController,
    build_rate_controller,
)
from cdpvae.loss.reconstruction import Reconstruction, reconstruction_nll

__all__ = [
    "BagOfWords",
    "Contrastive",
    "CyclicalAnnealingSchedule",
    "Gather",
    "InfoNCELoss",
    "InfoNCETerms",
    "LagrangeMultiplier",
    "LossInputs",
    "LossTerm",
    "MomentumQueue",
    "Objective",
    "ProportionalIntegral",
    "Rate",
    "RateController",
    "RateTerms",
    "Reconstruction",
    "StepContext",
    "bow_loss",
    "build_objective",
    "build_rate_controller",
    "clamp_rate",
    "content_ids",
    "reconstruction_nll",
]
