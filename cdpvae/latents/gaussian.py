"""The diagonal Gaussian: q(z|x) = N(mu, exp(logvar)), p(z) = N(0, I).

The family of the original description. Its formulas are here, once: the KL, the density, active
units. The estimator of the mutual information, which only needs densities, is in `information.py`.

Legend: B rows, N rows of a larger set, M latents, D pooled width, Z latent dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cdpvae.config import GaussianConfig, ModelConfig
from cdpvae.latents.base import Code, Latent, variance_over_rows
from cdpvae.latents.commitment import BoundedVariance, NormalizedMean, missing_mean_square
from cdpvae.latents.information import MutualInformation, information_from_densities
from cdpvae.latents.noise import Noise
from cdpvae.latents.priors.base import Prior
from cdpvae.latents.priors.standard import StandardNormal

# A unit is active when its posterior mean varies by more; the first is that of Burda et al. 2016,
# section 5.2.
AU_THRESHOLDS = (0.01, 0.05, 0.1, 0.2)
ACTIVE_VARIANCE = AU_THRESHOLDS[0]

# The original description's API has the values of the settings as defaults.
DEFAULT, DEFAULT_LATENT = ModelConfig(), GaussianConfig()


@dataclass(frozen=True)
class Posterior(Code):
    """q(z|x) of B rows. mu (B, Z), logvar (B, Z), both fp32 as the encoder gives them."""

    mu: Tensor
    logvar: Tensor


class VariationalEncoder(nn.Module):
    """Map pooled texts to mu and logvar of q(z|x).

    input_dim: D.
    latent_dim: Z.
    hidden_dim: width of both layers; None leaves them out, the heads read the pooled text itself.
    dropout: after each of them.
    logvar_init_bias, logvar_clamp: where logvar starts, and the bounds it is held in.

    Two GELU layers with dropout. The logvar head starts at weight N(0, 0.01) (standard deviation)
    and a constant bias, -2 by default: neither exploding nor, as with zeros, cut off from the
    gradient.
    """

    def __init__(
        self,
        input_dim: int,
        latent_dim: int = DEFAULT_LATENT.latent_dim,
        hidden_dim: int | None = DEFAULT.vae_hidden_dim,
        dropout: float = DEFAULT.encoder_dropout,
        logvar_init_bias: float = DEFAULT_LATENT.logvar_init_bias,
        logvar_clamp: float = DEFAULT_LATENT.logvar_clamp,
    ) -> None:
        super().__init__()
        self.logvar_clamp = logvar_clamp
        # Two layers that both heads share.
        self.mlp = nn.Sequential()
        if hidden_dim is not None:
            self.mlp = nn.Sequential(
                nn.Linear(input_dim, hidden_dim),
                nn.GELU(),
                nn.Dropout(dropout),
                nn.Linear(hidden_dim, hidden_dim),
                nn.GELU(),
                nn.Dropout(dropout),
            )
        hidden_dim = hidden_dim or input_dim
        self.mu_head = nn.Linear(hidden_dim, latent_dim)
        self.logvar_head = nn.Linear(hidden_dim, latent_dim)
        # Start with a small, nearly constant variance.
        nn.init.normal_(self.logvar_head.weight, mean=0.0, std=0.01)
        nn.init.constant_(self.logvar_head.bias, logvar_init_bias)

    def forward(self, pooled_BD: Tensor) -> Posterior:
        """Map (B, D) to mu and logvar, each (B, Z), computed in fp32 whatever the MLP's dtype."""
        # The heads compute in fp32: an error of logvar is a factor of the variance.
        hidden = self.mlp(pooled_BD).float()
        mu = F.linear(hidden, self.mu_head.weight.float(), self.mu_head.bias.float())
        logvar = F.linear(hidden, self.logvar_head.weight.float(), self.logvar_head.bias.float())
        return Posterior(mu, logvar.clamp(-self.logvar_clamp, self.logvar_clamp))


class Gaussian(Latent):
    """The family of one Gaussian vector a text.

    encoder: gives mu and logvar.
    posterior: what holds the rate at or above `committed_rate`, see `commitment.py`; `free` for
        nothing.
    committed_rate: nats per dimension.
    """

    code_type: ClassVar[type[Code]] = Posterior
    activity_thresholds: ClassVar[tuple[float, ...]] = AU_THRESHOLDS

    normalized_mean: NormalizedMean | None
    bounded_variance: BoundedVariance | None

    def __init__(
        self,
        encoder: VariationalEncoder,
        posterior: str = "free",
        committed_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.shape = (encoder.mu_head.out_features,)
        # Without a commitment there is no module, and no tensor in a checkpoint.
        self.normalized_mean = self.bounded_variance = None
        self.forced_rate = committed_rate if posterior == "mu_forcing" else 0.0
        if posterior == "batch_norm":
            self.normalized_mean = NormalizedMean(self.flat_dim, committed_rate)
        elif posterior == "delta":
            self.bounded_variance = BoundedVariance(committed_rate)
        self.prior: Prior = StandardNormal(self.shape)

    @classmethod
    def of(cls, config: ModelConfig, input_dim: int) -> Gaussian:
        """Build the family of the settings for pooled texts of `input_dim` numbers."""
        latent = config.latent
        assert isinstance(latent, GaussianConfig)
        encoder = VariationalEncoder(
            input_dim,
            latent.latent_dim,
            config.mlp_hidden_dim,
            config.encoder_dropout,
            latent.logvar_init_bias,
            latent.logvar_clamp,
        )
        return cls(encoder, latent.posterior, latent.committed_rate)

    def infer(self, pooled_BD: Tensor) -> Posterior:
        """Return mu and logvar of pooled texts (B, D), each (B, Z) fp32."""
        posterior: Posterior = self.encoder(pooled_BD)
        if self.normalized_mean is not None:
            posterior = Posterior(self.normalized_mean(posterior.mu), posterior.logvar)
        if self.bounded_variance is not None:
            posterior = Posterior(posterior.mu, self.bounded_variance(posterior.logvar))
        return posterior

    def sample(self, code: Code, noise: Noise) -> Tensor:
        """Draw z (B, Z) from q(z|x)."""
        posterior = _posterior(code)
        return reparameterize(posterior, noise.normal(posterior.num_rows, self.shape))

    def mean(self, code: Code) -> Tensor:
        """Return mu (B, Z)."""
        return _posterior(code).mu

    def penalties(self, code: Code) -> Mapping[str, Tensor]:
        """Return the KL of each row and dimension, (B, Z) nats; `mu_forcing` (B,) where asked."""
        posterior = _posterior(code)
        found = {"kl": kl_per_row_dim(posterior.mu, posterior.logvar)}
        if self.forced_rate:
            found["mu_forcing"] = missing_mean_square(posterior.mu, self.forced_rate)
        return found

    def log_q(self, z: Tensor, code: Code) -> Tensor:
        """Return log N(z_m; mu_n, var_n) of z (M, Z) and N rows -> (M, N) fp64."""
        return log_density(z, _posterior(code))

    def log_q_of_dim(self, points: Tensor, dim: int, code: Code) -> Tensor:
        """Return log N(point; mu_n, var_n) of one dimension, for points (G,) -> (G, N) fp64."""
        return log_density(points[:, None], _posterior(code).map(lambda x: x[:, dim : dim + 1]))

    def exact_kl(self, code: Code) -> Tensor:
        """Return KL(q(z|x) || N(0, I)) of each row (B,)."""
        return self.penalties(code)["kl"].sum(1)

    def active_units(self, code: Code, threshold: float) -> int:
        """Count dimensions whose mean varies by more than `threshold` over the rows."""
        return active_units(_posterior(code).mu, threshold)

    def information(self, code: Code, *, seed: int) -> MutualInformation:
        """Estimate I(x; z) over the rows of the code; draws and densities are fp64."""
        posterior = _posterior(code)
        return mutual_information(posterior.mu, posterior.logvar, seed=seed)

    def interpolate(self, a: Tensor, b: Tensor, steps: int, mode: str) -> Tensor:
        """Return latents on the way from a to b; `interpolate`.

        a, b: the ends.
        steps: how many.
        mode: `linear`, the straight line, or `slerp`, the great arc.
        """
        return interpolate(a, b, steps, mode)

    def health(self, code: Code, *, seed: int, active_variance: float) -> dict[str, float]:
        """Return active units, mutual information beside its cap, and the mean KL."""
        return health(_posterior(code), seed=seed, active_variance=active_variance)


def _posterior(code: Code) -> Posterior:
    """Narrow a code of this family."""
    assert isinstance(code, Posterior)
    return code


def reparameterize(posterior: Posterior, noise_BZ: Tensor) -> Tensor:
    """Return z = mu + exp(logvar/2) * noise, fp32. Kingma & Welling 2014, section 2.4."""
    return posterior.mu + torch.exp(0.5 * posterior.logvar) * noise_BZ


def kl_per_row_dim(mu_BZ: Tensor, logvar_BZ: Tensor) -> Tensor:
    """Return KL(N(mu, exp(logvar)) || N(0, 1)) of each row and dimension, in nats.

    mu_BZ, logvar_BZ: (B, Z) float. -> (B, Z) fp32, whatever the inputs (fp64 for fp64 inputs).
    Raises ValueError when the shapes differ or are not (B, Z).
    """
    if mu_BZ.dim() != 2 or mu_BZ.shape != logvar_BZ.shape:
        raise ValueError(
            f"mu {tuple(mu_BZ.shape)} and logvar {tuple(logvar_BZ.shape)} must both be "
            "(batch, latent_dim)"
        )
    dtype = torch.promote_types(mu_BZ.dtype, torch.float32)
    mu, logvar = mu_BZ.to(dtype), logvar_BZ.to(dtype)
    return 0.5 * (mu.square() + logvar.exp() - 1.0 - logvar)


def kl_per_dim(mu_NZ: Tensor, logvar_NZ: Tensor) -> Tensor:
    """Return the mean over rows of the KL of each dimension -> (Z,) fp64 nats."""
    return kl_per_row_dim(mu_NZ.double(), logvar_NZ.double()).mean(0)


def count_active(variance_Z: Tensor, threshold: float = ACTIVE_VARIANCE) -> int:
    """Count dimensions whose posterior mean has a variance (Z,) above `threshold`.

    Burda et al. 2016, "Importance Weighted Autoencoders", section 5.2.
    """
    return int((variance_Z > threshold).sum())


def active_units(mu_NZ: Tensor, threshold: float = ACTIVE_VARIANCE) -> int:
    """Count dimensions whose posterior mean varies by more than `threshold` over rows."""
    return count_active(variance_over_rows(mu_NZ), threshold)


def log_density(z_MZ: Tensor, posterior: Posterior) -> Tensor:
    """Return log N(z_m; mu_n, var_n) -> (M, N), expanded into matrix products, fp64."""
    z, mu, logvar = z_MZ.double(), posterior.mu.double(), posterior.logvar.double()
    # (z - mu)^2 / var, multiplied out, so that no (M, N, Z) tensor is made.
    precision = torch.exp(-logvar)
    square = z.square() @ precision.T - 2 * z @ (mu * precision).T
    constant = (mu.square() * precision + logvar + math.log(2 * math.pi)).sum(1)
    return -0.5 * (square + constant)


def mutual_information(
    mu: Tensor, logvar: Tensor, *, z: Tensor | None = None, seed: int = 0
) -> MutualInformation:
    """Estimate I(x; z) over N rows; `information.py` has the estimator.

    mu, logvar (N, Z): of the posteriors.
    z (N, Z): one draw a row, made when None.
    seed: of the draws.

    Computes in fp64 on the CPU. Raises ValueError for no row.
    """
    posterior = Posterior(mu.double().cpu(), logvar.double().cpu())
    # One draw a row, the same for the same seed.
    if z is None:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(posterior.mu.shape, generator=generator, dtype=torch.float64)
        z = reparameterize(posterior, noise)
    return information_from_densities(lambda rows: log_density(rows, posterior), z.double().cpu())


def health(posterior: Posterior, *, seed: int, active_variance: float) -> dict[str, float]:
    """Return active units and their share, mutual information beside its cap, and the mean KL.

    The mutual information is the lower estimate and draws one z a row with `seed`. The KL is the
    mean over rows and dimensions. Nats.
    """
    units = active_units(posterior.mu, active_variance)
    information = mutual_information(posterior.mu, posterior.logvar, seed=seed)
    return {
        "active_units": float(units),
        "active_unit_ratio": units / posterior.mu.shape[1],
        "mutual_information": information.lower,
        "mutual_information_cap": information.cap,
        "mean_kl": float(kl_per_dim(posterior.mu, posterior.logvar).mean()),
    }


def interpolate(z1: Tensor, z2: Tensor, num_steps: int = 10, mode: str = "linear") -> Tensor:
    """Return a way from z1 to z2, ends included: (Z,) -> (S, Z), (B, Z) -> (S, B, Z).

    z1, z2 (Z,) or (B, Z): the ends.
    num_steps: S, at least 2.
    mode: `linear` or `slerp`.

    `slerp` turns the direction at constant angular speed and interpolates the length linearly
    (Shoemake 1985; White 2016): the middle of two Gaussian samples keeps a typical length.
    Raises ValueError for differing shapes, num_steps < 2 or an unknown mode.
    """
    if z1.shape != z2.shape:
        raise ValueError(f"z1 {tuple(z1.shape)} and z2 {tuple(z2.shape)} must have one shape")
    if num_steps < 2 or mode not in ("linear", "slerp"):
        raise ValueError(
            f"num_steps={num_steps} must be at least 2 and mode={mode!r} 'linear' or 'slerp'"
        )
    steps = torch.linspace(0, 1, num_steps, device=z1.device, dtype=z1.dtype)
    t = steps.view(-1, *([1] * z1.dim()))
    if mode == "linear":
        return torch.lerp(z1[None], z2[None], t)
    # Turn the directions along the arc between them.
    length1, length2 = z1.norm(dim=-1, keepdim=True), z2.norm(dim=-1, keepdim=True)
    unit1, unit2 = F.normalize(z1, dim=-1), F.normalize(z2, dim=-1)
    cosine = (unit1 * unit2).sum(-1, keepdim=True).clamp(-1, 1)
    angle = torch.acos(cosine)
    sine = torch.sin(angle)
    turned = (torch.sin((1 - t) * angle) * unit1 + torch.sin(t * angle) * unit2) / sine
    # Parallel or opposite directions have no arc: fall back to the straight line.
    direction = torch.where(sine.abs() > 1e-6, turned, torch.lerp(unit1[None], unit2[None], t))
    return direction * torch.lerp(length1[None], length2[None], t)
