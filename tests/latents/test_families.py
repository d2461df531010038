"""What every latent family promises, and that a new one needs no line outside its own file.

Legend: B rows, Z latent dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch.distributions import Normal

from cdpvae.batch import PackedText, StepOutput, StepSchedule, Term, next_token_targets
from cdpvae.config import GaussianConfig, ModelConfig, NoLatentConfig, Settings
from cdpvae.latents import (
    FAMILIES,
    Code,
    Gaussian,
    GeneratorNoise,
    KeyedNoise,
    Latent,
    NoLatent,
    Posterior,
    family_of,
)
from cdpvae.latents.priors.standard import StandardNormal
from cdpvae.loss import LossInputs, build_objective
from cdpvae.tasks.text_vae.step_log import gradient_norms
from cdpvae_kernels import Stream

D, Z, B = 12, 5, 4


def gaussian() -> Gaussian:
    torch.manual_seed(0)
    config = ModelConfig(latent=GaussianConfig(latent_dim=Z), vae_hidden_dim=8, encoder_dropout=0.0)
    return Gaussian.of(config, D)


def posterior(rows: int = B) -> Posterior:
    generator = torch.Generator().manual_seed(3)
    return Posterior(
        torch.randn(rows, Z, generator=generator), torch.randn(rows, Z, generator=generator)
    )


def keyed(*index: int, epoch: int = 2) -> KeyedNoise:
    return KeyedNoise(7, Stream.NOISE, torch.tensor(index), epoch)


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_shapes_of_the_interface(kind):
    """z is what the projector reads; vectors and penalties have the rows first."""
    latent = FAMILIES[kind].of(ModelConfig.model_validate({"latent": {"kind": kind}}), D)
    code = latent.infer(torch.randn(B, D))
    noise = keyed(*range(B))
    assert isinstance(code, latent.code_type) and code.num_rows == B
    for z in (latent.sample(code, noise), latent.mean(code), latent.prior.sample(B, noise)):
        assert z.shape == (B, *latent.shape) and z.dtype == torch.float32
    assert latent.flat(code).shape == (B, latent.flat_dim)
    assert all(len(rows) == B for rows in latent.penalties(code).values())
    assert latent.prior.log_prob(latent.mean(code)).shape == (B,)


def test_the_settings_choose_the_family():
    assert family_of(ModelConfig()) is Gaussian
    assert family_of(ModelConfig(latent=NoLatentConfig())) is NoLatent


def test_noise_belongs_to_the_sample_and_not_to_its_place_in_the_batch():
    latent, code = gaussian(), posterior()
    whole = latent.sample(code, keyed(10, 11, 12, 13))
    alone = latent.sample(code.rows(2, 3), keyed(12))
    assert torch.equal(whole[2:3], alone)
    assert not torch.equal(whole, latent.sample(code, keyed(10, 11, 12, 13, epoch=3)))
    with pytest.raises(ValueError, match="4 rows of noise for 3 sample indices"):
        latent.sample(code, keyed(10, 11, 12))


def test_densities_equal_those_of_torch_distributions():
    latent, code = gaussian(), posterior()
    z = torch.randn(3, Z, dtype=torch.float64)
    q = Normal(code.mu.double(), (code.logvar.double() / 2).exp())
    # fp64 sums of Z terms of size 10 agree to 1e-12.
    expected = torch.stack([q.log_prob(row).sum(1) for row in z])
    torch.testing.assert_close(latent.log_q(z, code), expected, rtol=1e-12, atol=1e-12)
    p = Normal(torch.zeros(Z, dtype=torch.float64), 1.0)
    torch.testing.assert_close(latent.prior.log_prob(z), p.log_prob(z).sum(1), rtol=1e-12, atol=0)


def test_the_exact_kl_is_the_expected_log_ratio():
    """KL = E_q[log q(z|x) - log p(z)], by 20,000 draws of one row."""
    latent, code = gaussian(), posterior(1)
    many = Posterior(code.mu.expand(20_000, Z), code.logvar.expand(20_000, Z))
    z = latent.sample(many, GeneratorNoise(torch.Generator().manual_seed(1)))
    ratio = latent.log_q(z, code)[:, 0] - latent.prior.log_prob(z)
    # Within five standard errors of the mean.
    error = 5 * float(ratio.std()) / 20_000**0.5
    assert float(ratio.mean()) == pytest.approx(float(latent.exact_kl(code)), abs=error)


def test_the_generic_mutual_information_agrees_with_the_gaussians_own():
    """The interface's estimate through log_q, other draws: equal within what draws do to it."""
    latent, code = gaussian(), posterior(400)
    generic = Latent.information(latent, code, seed=0)
    own = [latent.information(code, seed=seed) for seed in range(8)]
    spread = torch.tensor([estimate.lower for estimate in own])
    assert generic.cap == own[0].cap
    assert generic.lower == pytest.approx(float(spread.mean()), abs=5 * float(spread.std()))


def test_codes_are_cut_and_put_together_by_rows():
    code = posterior()
    parts = [code.rows(0, 1), code.rows(1)]
    assert [part.num_rows for part in parts] == [1, 3]
    again = Posterior.concat(parts)
    assert torch.equal(again.mu, code.mu) and torch.equal(again.logvar, code.logvar)
    with pytest.raises(ValueError, match="no code"):
        Posterior.concat([])


def test_a_model_without_a_latent_has_nothing_to_interpolate():
    with pytest.raises(ValueError, match="nothing to interpolate"):
        NoLatent().interpolate(torch.zeros(0), torch.zeros(0), 3, "linear")


@dataclass(frozen=True)
class Point(Code):
    """A code without noise. point (B, Z)."""

    point: torch.Tensor


class Deterministic(Latent):
    """A plain autoencoder's latent, as somebody might add it: no KL, a penalty of its own."""

    code_type: ClassVar[type[Code]] = Point

    def __init__(self) -> None:
        super().__init__()
        self.shape = (2, 3)
        self.prior = StandardNormal(self.shape)
        self.head = torch.nn.Linear(D, 6)

    @classmethod
    def of(cls, config, input_dim):
        return cls()

    def infer(self, pooled_BD):
        return Point(self.head(pooled_BD).view(-1, *self.shape))

    def sample(self, code, noise):
        return code.point

    def mean(self, code):
        return code.point

    def penalties(self, code):
        return {"length": 0.25 * code.point.flatten(1).square().sum(1)}

    def interpolate(self, a, b, steps, mode):
        return torch.lerp(a[None], b[None], torch.linspace(0, 1, steps).view(-1, 1, 1))

    def health(self, code, *, seed, active_variance):
        return {"length": float(code.point.norm())}


def test_a_new_familys_penalty_becomes_a_term():
    """Without a KL there is no rate; what the family asks for enters the total with weight 1."""
    torch.manual_seed(1)
    latent = Deterministic()
    code = latent.infer(torch.randn(B, D))
    response = PackedText.from_lists([[1, 2, 3]] * B)
    positions, targets = next_token_targets(response)
    inputs = LossInputs(
        hidden=torch.randn(response.ids.numel(), 4),
        head_weight=torch.randn(7, 4),
        positions=positions,
        targets=targets,
        response=response,
        special_ids=torch.tensor([0]),
        z=latent.mean(code).flatten(1),
        anchor=latent.flat(code),
        penalties=latent.penalties(code),
    )
    schedule = StepSchedule(
        step=0,
        epoch=0,
        beta=1.0,
        weights=Settings().loss.weights,
        word_dropout=0.0,
        target_divisor=float(len(targets)) * 12,
    )
    terms = build_objective(Settings(), latent.flat_dim, world_size=1)(inputs, schedule)
    by_name = {term.name: term for term in terms}
    assert "kl" not in by_name
    expected = 0.25 * code.point.flatten(1).square().sum(1).mean()
    torch.testing.assert_close(by_name["length"].weighted, expected)
    assert by_name["neg_elbo"].weighted == 0


def test_gradients_are_compared_where_every_loss_passes():
    """A z that is no view of the vectors: the norm is that of the code itself, not 0."""
    latent = Deterministic()
    code = latent.infer(torch.randn(B, D))
    z = latent.sample(code, keyed(*range(B)))
    term = Term(name="recon", value=z.square().sum(), weight=0.5, per="row")
    output = StepOutput([term], {}, latent.gradient_point(code))
    # d(0.5 sum z^2)/dz = z.
    assert gradient_norms(output) == {"recon": pytest.approx(float(z.norm()))}
    still = StepOutput([term], {}, latent.gradient_point(code.detach()))
    assert gradient_norms(still) == {}


def test_a_code_keeps_its_integers():
    """Indices of a codebook stay indices in another precision."""
    code = Indices(torch.tensor([2, 0]), torch.tensor([0.5, 0.25], dtype=torch.float64))
    moved = code.to(torch.float32, "cpu")
    assert moved.index.dtype == torch.int64 and moved.weight.dtype == torch.float32


@dataclass(frozen=True)
class Indices(Code):
    """A discrete code."""

    index: torch.Tensor
    weight: torch.Tensor
