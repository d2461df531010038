"""How well a model explains held-out text, and whether it uses z to do so.

All likelihoods are nats per sequence, dropout and word dropout off. The z-use test replaces z by
another row's, by a prior draw and by zero: a decoder that ignores z loses nothing, however many
units look active.

Legend: B rows, N target positions, Z latent.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from cdpvae.batch import PackedText, VAEBatch, next_token_targets
from cdpvae.loss import kl_per_row_dim
from cdpvae.models.text_vae import LlamaSoftPromptVAE
from cdpvae_kernels import linear_cross_entropy, philox

# Evaluation noise must not repeat what training drew for the same rows.
EVALUATION_EPOCH = 2**20

ACTIVE_VARIANCE = 0.01
REPLACEMENTS = ("shuffled", "prior", "zero")


@dataclass
class Likelihood:
    """Means over rows, nats per sequence; `tokens` is the mean number of target tokens.

    nll_q: z ~ q(z|x), one sample. nll_mu: z = mu. kl: KL(q(z|x) || N(0, I)).
    neg_elbo: nll_q + kl, an upper bound on -log p(x) in expectation.
    active_unit_ratio: share of dimensions whose mu varies by more than 0.01 over the rows (N-1).
    costs: nats lost when z is replaced by another row's, a prior draw, or zero, by name.
    A model without latent has nll_q = nll_mu = neg_elbo, kl = 0 and no costs.
    """

    rows: int
    tokens: float
    nll_q: float
    nll_mu: float
    kl: float
    neg_elbo: float
    active_unit_ratio: float
    costs: dict[str, float]


def sequence_nll(model: LlamaSoftPromptVAE, z: Tensor | None, response: PackedText) -> Tensor:
    """-log p(response | z) of each row -> (B,) fp32 nats. z: (B, Z), None without latent."""
    decoded = model.decode(z, response.ids, response)
    target_rows, targets = next_token_targets(response)
    _, stats = linear_cross_entropy(
        decoded.hidden,
        model.backbone.head_weight,
        targets,
        rows=decoded.rows[target_rows],
        divisor=1,
        return_stats=True,
        impl=model.impl,
    )
    nll = stats.nll.new_zeros(response.num_rows)
    return nll.index_add(0, target_row_of(response), stats.nll)


def target_row_of(response: PackedText) -> Tensor:
    """(N,) the row each target position belongs to."""
    predicting = response.lengths.long() - 1
    rows = torch.arange(response.num_rows, device=response.ids.device)
    return torch.repeat_interleave(rows, predicting)


@torch.no_grad()
def likelihood_sums(
    model: LlamaSoftPromptVAE,
    batches: Iterable[VAEBatch],
    *,
    seed: int,
    z_use: bool = True,
) -> Tensor:
    """Sums over rows, (10 + 2 Z,) fp64, that add up over ranks: `likelihood_from_sums` reads them.

    A batch of one row has no other row to take z from, and is left out of the z-use test.
    """
    dims = 0 if model.config.latent.kind == "none" else model.config.latent.latent_dim
    total = torch.zeros(10 + 2 * dims, dtype=torch.float64, device=model.device)
    with model.evaluating():
        for batch in batches:
            total += _batch_sums(model, batch.to(model.device), seed, z_use)
    return total


def _batch_sums(model, batch: VAEBatch, seed: int, z_use: bool) -> Tensor:
    response, rows = batch.response, batch.num_rows

    def summed(z: Tensor | None) -> Tensor:
        return sequence_nll(model, z, response).double().sum()

    tokens = (response.lengths - 1).sum()
    if model.config.latent.kind == "none":
        nll = summed(None)
        return _vector(model, [rows, tokens, nll, nll])
    posterior = model.posterior(batch.instruction)
    index = batch.sample_index
    z = model.sample_posterior(posterior, index, seed=seed, epoch=EVALUATION_EPOCH)
    nll = summed(z)
    kl = kl_per_row_dim(posterior.mu, posterior.logvar).double().sum()
    values = [rows, tokens, nll, summed(posterior.mu), kl]
    if z_use and rows > 1:
        position = torch.arange(z.shape[1], device=z.device)[None]
        prior = philox.normal(seed, philox.Stream.PRIOR, index[:, None], 0, position)
        values += [rows, nll]
        values += [summed(z.roll(1, 0)), summed(prior), summed(torch.zeros_like(z))]
    mu = posterior.mu.double()
    return torch.cat((_vector(model, values), mu.sum(0), mu.square().sum(0)))


def _vector(model, values: list) -> Tensor:
    """(10,) fp64, zeros for what was not measured."""
    padded = [float(value) for value in values] + [0.0] * (10 - len(values))
    return torch.tensor(padded, dtype=torch.float64, device=model.device)


def likelihood_from_sums(sums: Tensor) -> Likelihood:
    """The means. Raises ValueError when no row was evaluated."""
    rows, tokens, nll_q, nll_mu, kl, replaced, nll_replaced, *replacements = sums[:10].tolist()
    if rows == 0:
        raise ValueError("no row to evaluate: the split is empty")
    # A cost is the difference over the same rows, so that left-out rows do not enter it.
    costs = {
        name: (total - nll_replaced) / replaced
        for name, total in zip(REPLACEMENTS, replacements, strict=True)
        if replaced
    }
    return Likelihood(
        rows=int(rows),
        tokens=tokens / rows,
        nll_q=nll_q / rows,
        nll_mu=nll_mu / rows,
        kl=kl / rows,
        neg_elbo=(nll_q + kl) / rows,
        active_unit_ratio=_active_unit_ratio(rows, sums[10:]),
        costs=costs,
    )


def _active_unit_ratio(rows: float, moments_2Z: Tensor) -> float:
    """From the sums of mu and of its square; 0 without latent or for a single row."""
    if not moments_2Z.numel() or rows < 2:
        return 0.0
    total, square = moments_2Z.chunk(2)
    variance = (square - total.square() / rows) / (rows - 1)
    return float((variance > ACTIVE_VARIANCE).double().mean())


def evaluate_likelihood(
    model: LlamaSoftPromptVAE, batches: Iterable[VAEBatch], *, seed: int, z_use: bool = True
) -> Likelihood:
    """`Likelihood` of one process over its batches."""
    return likelihood_from_sums(likelihood_sums(model, batches, seed=seed, z_use=z_use))
