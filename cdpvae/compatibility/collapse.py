"""The collapse monitor and the interventions of the original description, on mu and logvar.

Legend: Z latent.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cdpvae.collapse import AdaptiveInterventionScheduler as InterventionScheduler
from cdpvae.collapse import CollapseMetrics as HealthMetrics
from cdpvae.collapse import CollapseMonitor as HealthMonitor
from cdpvae.compatibility.loss import InfoNCELoss
from cdpvae.config import CollapseConfig, LossConfig
from cdpvae.latents import Code, Posterior, gaussian

LOSS = LossConfig()


@dataclass(frozen=True)
class CollapseMetrics(HealthMetrics):
    """One check, with the figures under the description's names.

    infonce_bound: log K - InfoNCE of anchor against augmented means, where they were given.
    """

    infonce_bound: float | None = None

    @property
    def au(self) -> int:
        """Active units."""
        return int(self.health.get("active_units", 0))

    @property
    def au_ratio(self) -> float:
        """Share of active units."""
        return self.health.get("active_unit_ratio", 0.0)

    @property
    def mi(self) -> float:
        """Mutual information, nats."""
        return self.health.get("mutual_information", 0.0)

    @property
    def mi_cap(self) -> float:
        """What the mutual information cannot exceed: the log of the rows in the window."""
        return self.health.get("mutual_information_cap", 0.0)

    @property
    def mean_kl(self) -> float:
        """KL in nats per dimension."""
        return self.health.get("mean_kl", 0.0)


class _GaussianFamily:
    """The Gaussian as the monitor needs it, without a network."""

    code_type: ClassVar[type[Code]] = Posterior

    def health(self, code: Code, *, seed: int, active_variance: float) -> dict[str, float]:
        """Return the Gaussian's figures."""
        assert isinstance(code, Posterior)
        return gaussian.health(code, seed=seed, active_variance=active_variance)


class CollapseMonitor(HealthMonitor):
    """The monitor on mu and logvar.

    latent_dim: Z. config: thresholds, window and patience.
    """

    def __init__(self, latent_dim: int, config: CollapseConfig | None = None) -> None:
        super().__init__(_GaussianFamily(), config or CollapseConfig())
        self.latent_dim = latent_dim
        self.window = Posterior(torch.zeros(0, latent_dim), torch.zeros(0, latent_dim))

    def update(
        self, mu: Tensor, logvar: Tensor, mu_augmented: Tensor | None = None
    ) -> CollapseMetrics:
        """Take in posteriors of all ranks (rows, Z) and check: for loops that look at every batch.

        Raises ValueError for another shape.
        """
        if mu.shape != logvar.shape or mu.dim() != 2 or mu.shape[1] != self.latent_dim:
            raise ValueError(
                f"mu {tuple(mu.shape)} and logvar {tuple(logvar.shape)} must both be "
                f"(rows, {self.latent_dim})"
            )
        # Every batch is looked at, so every batch is a check.
        self.add(Posterior(mu, logvar))
        found = self.check()
        parts = {part.name: getattr(found, part.name) for part in dataclasses.fields(found)}
        if mu_augmented is None:
            return CollapseMetrics(**parts)
        # The bound compares each anchor with its augmented view.
        contrast = InfoNCELoss()(mu.detach().float(), mu_augmented.detach().float())
        return CollapseMetrics(**parts, infonce_bound=float(contrast.mi_bound))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly there. Raises ValueError for another latent size."""
        if "mu" in state and state["mu"].shape[1] != self.latent_dim:
            raise ValueError(
                f"the saved window has {state['mu'].shape[1]} dimensions, this monitor "
                f"{self.latent_dim}"
            )
        super().load_state_dict(state)


class AdaptiveInterventionScheduler(InterventionScheduler):
    """The scheduler with the description's default weights.

    initial_bow_weight, initial_contrastive_weight: where these weights start and return to.
    initial_word_dropout: likewise.
    config: factors and bounds.
    """

    def __init__(
        self,
        initial_bow_weight: float = LOSS.bow_weight,
        initial_contrastive_weight: float = LOSS.contrastive_weight,
        initial_word_dropout: float = LOSS.word_dropout,
        config: CollapseConfig | None = None,
    ) -> None:
        super().__init__(
            initial_bow_weight,
            initial_contrastive_weight,
            initial_word_dropout,
            config or CollapseConfig(),
        )
