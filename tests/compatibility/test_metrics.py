"""Statistics over a stream of posteriors equal their parts."""

import pytest
import torch

from cdpvae import ActiveUnitsCounter, LatentStatistics
from cdpvae.latents.gaussian import kl_per_dim, mutual_information, variance_over_rows
from cdpvae.metrics import effective_rank, pairwise_similarities
from support.posteriors import gaussian_case


def test_statistics_equal_their_parts():
    mu, logvar = (t.float() for t in gaussian_case(400, 4, 0.25))
    mu[:, 3] *= 0.25
    statistics = LatentStatistics(4)
    for batch in range(0, 400, 150):
        statistics.update(mu[batch : batch + 150], logvar[batch : batch + 150])
    report = statistics.compute()
    assert report.rows == 400
    # Variances 0.752 three times and 0.047.
    assert report.active_units == {0.01: 4, 0.05: 3, 0.1: 3, 0.2: 3}
    assert torch.equal(report.kl_per_dim, kl_per_dim(mu, logvar))
    assert report.kl_total == pytest.approx(float(report.kl_per_dim.sum()))
    assert report.mutual_information == mutual_information(mu, logvar)
    assert report.marginal_kl == report.kl_total - report.mutual_information.lower
    assert report.effective_rank == effective_rank(mu)
    pairs = (report.mean_cosine, report.max_cosine, report.mean_distance)
    assert pairs == pairwise_similarities(mu)
    assert torch.equal(report.mu_variance, variance_over_rows(mu))


def test_wrong_shapes_and_missing_rows_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 5\).*\(rows, 4\)"):
        ActiveUnitsCounter(4).update(torch.zeros(3, 5))
    statistics = LatentStatistics(4)
    with pytest.raises(ValueError, match=r"\(3, 4\) and logvar \(2, 4\)"):
        statistics.update(torch.zeros(3, 4), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="update"):
        statistics.compute()
    with pytest.raises(ValueError, match="0 rows"):
        mutual_information(torch.zeros(0, 4), torch.zeros(0, 4))
