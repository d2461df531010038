"""The objective, one term a file; `elbo.py` adds them up."""

from cdpvae.loss.annealing import CyclicalAnnealingSchedule
from cdpvae.loss.bow import bow_loss, compute_bow_loss, content_tokens
from cdpvae.loss.contrastive import InfoNCELoss, InfoNCETerms, MomentumQueue
from cdpvae.loss.objective import SoftPromptVAELoss
from cdpvae.loss.rate import FreeBitsKL, KLTerms, kl_per_row_dim
from cdpvae.loss.reconstruction import reconstruction_nll

__all__ = [
    "CyclicalAnnealingSchedule",
    "FreeBitsKL",
    "InfoNCELoss",
    "InfoNCETerms",
    "KLTerms",
    "MomentumQueue",
    "SoftPromptVAELoss",
    "bow_loss",
    "compute_bow_loss",
    "content_tokens",
    "kl_per_row_dim",
    "reconstruction_nll",
]
