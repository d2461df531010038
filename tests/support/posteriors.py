"""Posteriors whose figures are known."""

from __future__ import annotations

import math

import torch


def gaussian_case(rows, dims, noise, seed=0):
    """(N, Z) mu of mean 0 and mean square 1 - noise per dimension, exactly: so is the KL."""
    # Far from the small seeds of the estimator, whose draws must not be these.
    generator = torch.Generator().manual_seed(1000 + seed)
    mu = torch.randn(rows, dims, generator=generator, dtype=torch.float64)
    mu = mu - mu.mean(0)
    mu = mu * ((1 - noise) / mu.square().mean(0)).sqrt()
    return mu, torch.full((rows, dims), math.log(noise), dtype=torch.float64)
