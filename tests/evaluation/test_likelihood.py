"""Likelihoods and the z-use test against cross-entropies of whole logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cdpvae.batch import PackedText, VAEBatch
from cdpvae.compatibility.forward import padded_logits
from cdpvae.config import NoLatentConfig
from cdpvae.evaluation.likelihood import (
    EVALUATION_EPOCH,
    Likelihood,
    LikelihoodSums,
    backbone_nll,
    evaluate_likelihood,
    measure_batches,
)
from cdpvae.latents import KeyedNoise
from cdpvae_kernels import Stream

SEED = 5


def whole_nll(model, z, batch: VAEBatch) -> float:
    """Summed cross-entropy of every response token after BOS, from padded logits."""
    response = batch.response
    logits = padded_logits(model, model.decode(z, response.ids, response), response)
    ids, mask = response.to_padded(0)
    labels = torch.where(mask[:, 1:] == 1, ids[:, 1:], -100)
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum"))


@torch.no_grad()
def test_every_sum_equals_the_cross_entropy_of_whole_logits(make_model, batch):
    model = make_model()
    sums, code = measure_batches(model, [batch], seed=SEED)
    noise = model.training_noise(batch.sample_index, seed=SEED, epoch=EVALUATION_EPOCH)
    z = model.latent.sample(code, noise)
    prior = KeyedNoise(SEED, Stream.PRIOR, batch.sample_index, 0).normal(4, model.latent.shape)
    expected = {
        "nll_q": z,
        "nll_mu": code.mu,
        "shuffled": z.roll(1, 0),
        "prior": prior,
        "zero": torch.zeros_like(z),
    }
    for name, latent in expected.items():
        # fp64 throughout, but for z, which is fp32: nats of size 100 agree to 1e-4.
        assert getattr(sums, name) == pytest.approx(whole_nll(model, latent, batch), rel=1e-6)
    assert (sums.rows, sums.replaced) == (4, 4)
    assert sums.tokens == sum(n - 1 for n in batch.response.lengths.tolist())
    kl = 0.5 * (code.mu**2 + code.logvar.exp() - 1 - code.logvar)
    assert sums.kl == pytest.approx(float(kl.sum()), rel=1e-6)


@torch.no_grad()
def test_the_backbone_itself_is_the_llama_before_tuning(make_model, make_llama, batch):
    """Oracle: transformers' own loss of the untouched Llama, one row at a time."""
    llama = make_llama()
    expected = []
    for row in batch.response.rows():
        logits = llama(input_ids=row[None]).logits[0, :-1]
        expected.append(F.cross_entropy(logits, row[1:], reduction="sum"))
    found = backbone_nll(make_model(), batch.response)
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=1e-5, atol=1e-4)


def row(batch: VAEBatch, number: int) -> VAEBatch:
    """One row of a batch as a batch of its own."""
    instruction, response = batch.instruction.rows()[number], batch.response.rows()[number]
    return VAEBatch.build(
        PackedText.from_lists([instruction.tolist()]),
        PackedText.from_lists([response.tolist()]),
        batch.sample_index[number : number + 1],
    )


def test_a_row_alone_is_left_out_of_the_z_use_test(make_model, batch):
    """Its likelihood counts; a cost is a difference over the rows that have another row's z."""
    model = make_model()
    together = evaluate_likelihood(model, [batch], seed=SEED)
    alone, _ = measure_batches(model, [row(batch, 2)], seed=SEED)
    assert (alone.rows, alone.replaced, alone.nll_replaced) == (1, 0, 0)
    both = evaluate_likelihood(model, [batch, row(batch, 2)], seed=SEED)
    assert both.rows == 5 and both.costs == pytest.approx(together.costs)
    assert both.nll_q != together.nll_q


def test_a_model_without_a_latent_has_no_costs(make_model, batch):
    result = evaluate_likelihood(make_model(latent=NoLatentConfig()), [batch], seed=SEED)
    assert result.nll_q == result.nll_mu == result.neg_elbo and result.kl == 0
    assert result.costs == {} and result.to_json()["active_unit_ratio"] == 0.0


def test_sums_add_up_over_batches_and_ranks():
    one = LikelihoodSums(rows=2, tokens=10, nll_q=6, kl=1, replaced=2, nll_replaced=6, prior=8)
    other = LikelihoodSums(rows=1, tokens=2, nll_q=3, kl=2)
    both = one + other
    assert (both.rows, both.tokens, both.nll_q, both.kl, both.prior) == (3, 12, 9, 3, 8)
    # Two ranks with the same sums.
    reduced = both.all_reduce(lambda tensor: 2 * tensor, torch.device("cpu"))
    assert reduced == both + both
    result = Likelihood.of(reduced, {})
    assert (result.nll_q, result.kl, result.neg_elbo) == (3.0, 1.0, 4.0)
    assert result.costs["prior"] == (8 - 6) / 2


def test_no_row_is_refused():
    with pytest.raises(ValueError, match="no row to evaluate"):
        Likelihood.of(LikelihoodSums(), {})
