"""KL and free bits against closed forms, and the floor on the mean over all ranks' rows.

Legend: B local rows, K rows of all ranks, Z latent.
"""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from cdpvae import FreeBitsKL
from cdpvae.latents.gaussian import kl_per_row_dim
from cdpvae.loss import Rate, clamp_rate
from cdpvae.loss.rate import FREE_BITS_VARIANTS


def kl(mu, logvar):
    """The closed form, written out."""
    return (mu**2 + logvar.exp() - 1 - logvar) / 2


def posterior(rows, dims, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    mu = scale * torch.randn(rows, dims, generator=generator, dtype=torch.float64)
    logvar = torch.randn(rows, dims, generator=generator, dtype=torch.float64)
    return mu.requires_grad_(), logvar.requires_grad_()


def test_equals_the_divergence_of_torch_distributions():
    mu, logvar = posterior(5, 4)
    prior = Normal(torch.zeros_like(mu), torch.ones_like(mu))
    exact = kl_divergence(Normal(mu, (logvar / 2).exp()), prior)
    torch.testing.assert_close(kl_per_row_dim(mu, logvar), exact, rtol=1e-12, atol=1e-14)


def test_known_values():
    # mu = 2, var = 1: 2 nats. mu = 0, var = e: (e - 2) / 2. The prior itself: 0.
    mu = torch.tensor([[2.0, 0.0, 0.0]])
    logvar = torch.tensor([[0.0, 1.0, 0.0]])
    want = torch.tensor([[2.0, (math.e - 2) / 2, 0.0]])
    torch.testing.assert_close(kl_per_row_dim(mu, logvar), want)


def test_expected_kl_of_an_aggregated_standard_normal():
    # mu ~ N(0, 1 - s2), var = s2: the expected KL is d/2 ln(1/s2).
    s2, dims, rows = 0.2, 8, 200_000
    generator = torch.Generator().manual_seed(1)
    mu = math.sqrt(1 - s2) * torch.randn(rows, dims, generator=generator)
    terms = FreeBitsKL(0.0)(mu, torch.full((rows, dims), math.log(s2)))
    # mu^2 / 2 has variance (1 - s2)^2 / 2: five standard errors of the sum over dimensions.
    tolerance = 5 * (1 - s2) * math.sqrt(dims / 2 / rows)
    assert terms.kl_raw.item() == pytest.approx(dims / 2 * math.log(1 / s2), abs=tolerance)


def test_computes_in_fp32_from_bf16():
    mu, logvar = (x.detach().bfloat16() for x in posterior(3, 4))
    got = kl_per_row_dim(mu, logvar)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, kl(mu.float(), logvar.float()), rtol=1e-6, atol=1e-6)


def test_terms_follow_the_formula():
    mu, logvar = posterior(6, 5)
    terms = FreeBitsKL(0.6)(mu, logvar)
    mean = kl(mu, logvar).mean(0)
    floored = mean.clamp(min=0.6).sum()
    assert 0 < (mean > 0.6).sum() < 5  # both sides of the floor are there
    torch.testing.assert_close(terms.kl_per_dim, mean.detach())
    torch.testing.assert_close(terms.kl_raw, mean.sum().detach())
    torch.testing.assert_close(terms.kl_sum_clamped, floored)
    torch.testing.assert_close(terms.kl, floored / 5)
    assert terms.active_dims.item() == (mean > 0.6).sum().item()
    assert not terms.kl_raw.requires_grad and not terms.kl_per_dim.requires_grad


def test_gradient_only_through_dimensions_above_the_floor():
    # KL_d = mu^2 / 2 with logvar = 0: 2 nats above the floor, exactly 0.5 on it, 0.02 below it.
    mu = torch.tensor([[2.0, 1.0, 0.2], [-2.0, -1.0, -0.2]], requires_grad=True)
    FreeBitsKL(0.5)(mu, torch.zeros(2, 3)).kl_sum_clamped.backward()
    torch.testing.assert_close(mu.grad, torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]]))


def test_floor_applies_to_the_mean_and_not_to_rows():
    # Rows of 2 and 0 nats average to 1, above 0.5: the row at 0 is not lifted to the floor.
    mu = torch.tensor([[2.0], [0.0]])
    assert FreeBitsKL(0.5)(mu, torch.zeros(2, 1)).kl_sum_clamped.item() == 1.0


def test_the_global_mean_decides_whose_gradient_flows():
    # Dimension 0 is above the floor here and below it globally; dimension 1 the other way round.
    mu = torch.tensor([[1.2, 0.6], [1.2, 0.6]], requires_grad=True)
    others = kl(torch.tensor([[0.1, 3.0], [0.1, 3.0]]), torch.zeros(2, 2))
    seen = []

    def gather(rows):
        seen.append(rows.shape)
        return torch.cat((rows, others))

    terms = FreeBitsKL(0.5)(mu, torch.zeros(2, 2), gather)
    terms.kl_sum_clamped.backward()
    assert seen == [(2, 2)]
    mean = [(1.2**2 / 2 + 0.1**2 / 2) / 2, (0.6**2 / 2 + 3.0**2 / 2) / 2]
    assert terms.kl_per_dim.tolist() == pytest.approx(mean)
    assert terms.kl_sum_clamped.item() == pytest.approx(0.5 + mean[1])
    assert terms.active_dims.item() == 1
    # d/dmu of mean over 4 rows of mu^2 / 2 is mu / 4.
    torch.testing.assert_close(mu.grad, torch.tensor([[0.0, 0.15], [0.0, 0.15]]))


def test_no_floor_is_the_plain_kl():
    mu, logvar = posterior(4, 3, scale=0.1)
    terms = FreeBitsKL(0.0)(mu, logvar)
    torch.testing.assert_close(terms.kl_sum_clamped.detach(), terms.kl_raw)


@pytest.mark.parametrize("free_bits", [-0.1, float("nan"), float("inf")])
def test_bad_floor_is_refused(free_bits):
    with pytest.raises(ValueError, match=f"free_bits={free_bits}"):
        FreeBitsKL(free_bits)


def test_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
        kl_per_row_dim(torch.zeros(2, 3), torch.zeros(2, 4))


# Rows of 2 and 0.02 nats, and of 0.5 and 0 nats: means of 1.01 and 0.25.
ROWS = torch.tensor([[2.0, 0.5], [0.02, 0.0]])


@pytest.mark.parametrize(
    ("variant", "floor", "value", "gradient"),
    [
        # max(0.3, 1.01) + max(0.3, 0.25).
        ("dimension_batch", 0.3, 1.31, [[0.5, 0.0], [0.5, 0.0]]),
        # ((2 + 0.3) + (0.5 + 0.3)) / 2: each row has its own floor.
        ("sample", 0.3, 1.55, [[0.5, 0.5], [0.0, 0.0]]),
        # max(0.6, 1.26): the second dimension is paid for with the first.
        ("aggregate", 0.3, 1.26, [[0.5, 0.5], [0.5, 0.5]]),
        ("aggregate", 0.7, 1.40, [[0.0, 0.0], [0.0, 0.0]]),
    ],
)
def test_variants_of_the_floor_by_hand(variant, floor, value, gradient):
    rows = ROWS.clone().requires_grad_()
    terms = clamp_rate(rows, floor, None, variant)
    assert terms.kl_sum_clamped.item() == pytest.approx(value)
    assert terms.kl.item() == pytest.approx(value / 2)
    # What is measured has no floor, whatever is trained on.
    assert terms.kl_raw.item() == pytest.approx(1.26)
    terms.kl_sum_clamped.backward()
    torch.testing.assert_close(rows.grad, torch.tensor(gradient))


def test_variants_are_means_over_the_rows_of_all_ranks():
    others = torch.tensor([[0.0, 4.0], [0.1, 0.0]])
    for variant in FREE_BITS_VARIANTS:
        here = clamp_rate(ROWS, 0.3, lambda rows: torch.cat((rows, others)), variant)
        alone = clamp_rate(torch.cat((ROWS, others)), 0.3, None, variant)
        assert torch.equal(here.kl_sum_clamped, alone.kl_sum_clamped), variant


def test_without_a_floor_all_variants_are_the_kl():
    for variant in FREE_BITS_VARIANTS:
        assert clamp_rate(ROWS, 0.0, None, variant).kl_sum_clamped.item() == pytest.approx(1.26)


def test_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="free_bits_variant='rows'.*aggregate"):
        Rate(0.5, "elbo", "rows")
