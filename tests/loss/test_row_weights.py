"""Micro-batches with different numbers of rows (`batching: tokens`): a step is a mean over rows."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from cdpvae import Posterior, SoftPromptVAELoss, StepPlan
from cdpvae.batch import PackedText

Z, V, D = 3, 20, 4
TEXTS = [[0, 3 + i, 4 + i, 5 + i, *[6] * (i % 3), 1] for i in range(8)]
NUM_TARGETS = sum(len(text) - 1 for text in TEXTS)
# 8 rows as micro-batches of 1, 4 and 3: a mean of means is another number.
CUTS = [(0, 1), (1, 5), (5, 8)]
PLAN = StepPlan(0, 0, 0.7, 1.3, 0.4, 0.0, float(NUM_TARGETS), True, row_divisor=8)


class Rows:
    """Inputs of the loss for some of eight rows; fp64 leaves with gradients."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)

        def leaf(*shape):
            value = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return value.requires_grad_()

        self.hidden = leaf(sum(map(len, TEXTS)), D)
        self.head, self.bow_weight, self.bow_bias = leaf(V, D), leaf(V, Z), leaf(V)
        self.mu, self.logvar, self.view = leaf(8, Z), leaf(8, Z), leaf(8, Z)
        self.leaves = [self.hidden, self.mu, self.logvar, self.view, self.bow_weight]

    def loss(self, start: int, end: int, scale: str, plan: StepPlan, cuts: int, free_bits=0.0):
        starts = [0]
        for text in TEXTS:
            starts.append(starts[-1] + len(text))
        rows = torch.tensor(
            [i for r in range(start, end) for i in range(starts[r], starts[r + 1] - 1)]
        )
        posterior = Posterior(self.mu[start:end], self.logvar[start:end])
        loss = SoftPromptVAELoss(
            latent_dim=Z, free_bits=free_bits, loss_scale=scale, micro_batches_per_step=cuts
        )
        terms = loss(
            hidden=self.hidden,
            head_weight=self.head,
            target_rows=rows,
            targets=torch.tensor([t for text in TEXTS[start:end] for t in text[1:]]),
            posterior=posterior,
            z=posterior.mu,
            bow_weight=self.bow_weight,
            bow_bias=self.bow_bias,
            response=PackedText.from_lists(TEXTS[start:end]),
            special_ids=torch.tensor([0, 1]),
            view=Posterior(self.view[start:end], self.logvar[start:end]),
            plan=plan,
        )
        return loss, terms


def wanted(rows: Rows, scale: str) -> torch.Tensor:
    """The step's total by its formula. InfoNCE's candidates are those of the micro-batch."""
    kl = 0.5 * (rows.mu.square() + rows.logvar.exp() - 1 - rows.logvar)
    present = torch.zeros(8, V, dtype=torch.float64)
    for row, text in enumerate(TEXTS):
        present[row, [t for t in text if t not in (0, 1)]] = 1
    bow = F.binary_cross_entropy_with_logits(rows.mu @ rows.bow_weight.t() + rows.bow_bias, present)
    anchor, positive = F.normalize(rows.mu, dim=1), F.normalize(rows.view, dim=1)
    contrast = sum(
        -(anchor[a:b] @ positive[a:b].t() / 0.07).log_softmax(1).diag().sum() for a, b in CUTS
    )
    tokens = torch.tensor([t for text in TEXTS for t in text[1:]])
    ends = torch.tensor([len(text) for text in TEXTS]).cumsum(0) - 1
    predicting = [i for i in range(len(rows.hidden)) if i not in ends.tolist()]
    nats = F.cross_entropy(rows.hidden[predicting] @ rows.head.t(), tokens, reduction="sum")
    if scale == "per_token":
        main, kl = nats / NUM_TARGETS, kl.mean(0).sum() / Z
    else:
        main, kl = nats / 8, kl.mean(0).sum()
    return main + 0.7 * kl + 1.3 * bow + 0.4 * contrast / 8


@pytest.mark.parametrize("scale", ["per_token", "elbo"])
def test_a_step_of_unequal_micro_batches_is_the_mean_over_its_rows(scale):
    rows = Rows()
    totals = [rows.loss(a, b, scale, PLAN, len(CUTS))[1].total for a, b in CUTS]
    got, want = torch.stack(totals).mean(), wanted(rows, scale)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    for a, b in zip(
        torch.autograd.grad(got, rows.leaves),
        torch.autograd.grad(want, rows.leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)
    # Without the rows of the step each micro-batch would count the same.
    equal = dataclasses.replace(PLAN, row_divisor=None)
    unweighted = torch.stack([rows.loss(*cut, scale, equal, len(CUTS))[1].total for cut in CUTS])
    assert abs((unweighted.mean() - want).item()) > 1e-3


@pytest.mark.parametrize("scale", ["per_token", "elbo"])
def test_weighted_terms_add_up_with_weights(scale):
    loss, terms = Rows().loss(1, 5, scale, PLAN, len(CUTS), free_bits=0.5)
    assert terms.row_weight == 4 * 3 / 8
    weighted = loss.weighted_terms(terms, PLAN)
    torch.testing.assert_close(sum(weighted.values()), terms.total, rtol=1e-13, atol=0)
    # What is reported is the mean over the micro-batch's own rows.
    kl = terms.kl * (Z if scale == "elbo" else 1)
    torch.testing.assert_close(weighted["kl"], 0.7 * 1.5 * kl, rtol=1e-13, atol=0)


@pytest.mark.parametrize("scale", ["per_token", "elbo"])
def test_equal_micro_batches_have_the_same_bits_with_and_without_row_divisor(scale):
    rows = Rows()
    equal = dataclasses.replace(PLAN, row_divisor=None)
    for cut in [(0, 4), (4, 8)]:
        with_divisor = rows.loss(*cut, scale, PLAN, 2)[1].total
        assert torch.equal(with_divisor, rows.loss(*cut, scale, equal, 2)[1].total)
