"""The geometry of latent vectors against constructed and hand-computed cases."""

import pytest
import torch

from cdpvae.metrics import effective_rank, pairwise_similarities


def test_effective_rank_counts_equal_directions():
    """Orthogonal directions of equal spread: exactly their number; unequal ones fewer."""
    signs = torch.tensor([[a, b, c] for a in (-1.0, 1.0) for b in (-1.0, 1.0) for c in (-1.0, 1.0)])
    mu = torch.cat((signs, torch.zeros(8, 2)), dim=1) + 5
    assert effective_rank(mu) == pytest.approx(3, rel=1e-6)
    assert effective_rank(mu[:, :1]) == pytest.approx(1, rel=1e-6)
    stretched = (mu - 5) * torch.tensor([4.0, 1.0, 1.0, 1.0, 1.0])
    assert 1 < effective_rank(stretched) < 3 - 1e-3


def test_similarities_of_a_hand_computed_case():
    mu = torch.tensor([[3.0, 0.0], [0.0, 4.0], [-3.0, 0.0]])
    # Cosines 0, -1, 0; distances 5, 6, 5.
    mean_cosine, max_cosine, mean_distance = pairwise_similarities(mu)
    assert mean_cosine == pytest.approx(-1 / 3)
    assert max_cosine == pytest.approx(0.0, abs=1e-15)
    assert mean_distance == pytest.approx(16 / 3)
