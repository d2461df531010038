"""Reconstruction against cross-entropy on full logits in fp64.

Legend: T packed positions, N target positions, D hidden, V vocabulary.
"""

import pytest
import torch
import torch.nn.functional as F

from cdpvae.loss import reconstruction_nll

T, D, V = 13, 7, 31


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(T, D, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype)
    rows = torch.tensor([0, 1, 2, 5, 6, 7, 11])
    targets = torch.tensor([4, 30, 0, -100, 9, 9, 17])
    return hidden.requires_grad_(), weight.requires_grad_(), rows, targets


def test_token_sum_and_gradients_equal_full_logits():
    hidden, weight, rows, targets = inputs()
    nll = reconstruction_nll(hidden, weight, rows, targets)
    got = torch.autograd.grad(nll, (hidden, weight))
    exact = F.cross_entropy((hidden @ weight.t())[rows], targets, reduction="sum")
    want = torch.autograd.grad(exact, (hidden, weight))
    torch.testing.assert_close(nll, exact, rtol=1e-13, atol=0)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_bf16_hidden_gives_an_fp32_sum():
    hidden, weight, rows, targets = inputs(torch.bfloat16)
    nll = reconstruction_nll(hidden, weight, rows, targets)
    logits = (hidden.double() @ weight.double().t())[rows]
    exact = F.cross_entropy(logits, targets, reduction="sum")
    assert nll.dtype == torch.float32
    # fp32 sums of exact bf16 products: far below bf16's 4e-3.
    torch.testing.assert_close(nll.double(), exact, rtol=1e-6, atol=0)


def test_gradient_flows_only_into_predicting_rows():
    hidden, weight, rows, targets = inputs()
    reconstruction_nll(hidden, weight, rows, targets).backward()
    predicting = set(rows[targets != -100].tolist())
    touched = set(hidden.grad.abs().sum(1).nonzero().flatten().tolist())
    assert touched == predicting


@pytest.mark.parametrize(
    "count",
    [
        pytest.param(0, id="no_targets"),
        pytest.param(3, id="all_ignored"),
    ],
)
def test_nothing_to_predict_is_zero_with_zero_gradient(count):
    hidden, weight, _, _ = inputs()
    rows = torch.arange(count)
    nll = reconstruction_nll(hidden, weight, rows, torch.full((count,), -100))
    nll.backward()
    assert nll.item() == 0.0
    assert hidden.grad.count_nonzero() == 0 and weight.grad.count_nonzero() == 0


def test_target_outside_the_vocabulary_is_refused():
    hidden, weight, _, _ = inputs()
    with pytest.raises(ValueError, match=r"targets.*holds 31"):
        reconstruction_nll(hidden, weight, torch.tensor([0]), torch.tensor([V]))
