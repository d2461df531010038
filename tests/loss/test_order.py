"""Order: each next token from z and its place, in the reconstruction's unit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cdpvae.batch import PackedText, StepSchedule
from cdpvae.loss.base import LossInputs, StepContext
from cdpvae.loss.order import Order

V, D = 31, 7


def inputs(lengths, seed=0, **changes):
    """Random states for responses of these lengths; every position but the last predicts."""
    generator = torch.Generator().manual_seed(seed)
    response = PackedText.from_lists([[5] * n for n in lengths])
    tokens = response.ids.numel()
    last = set((response.cu_seqlens[1:] - 1).tolist())
    positions = torch.tensor([i for i in range(tokens) if i not in last])
    values = {
        "hidden": torch.zeros(tokens, D).double(),
        "head_weight": torch.randn(V, D, generator=generator).double(),
        "positions": positions,
        "targets": torch.randint(V, (len(positions),), generator=generator),
        "response": response,
        "special_ids": torch.tensor([1]),
        "z": torch.zeros(len(lengths), 2),
        "anchor": torch.zeros(len(lengths), 2),
        "predicted": torch.randn(tokens, D, generator=generator).double().requires_grad_(),
        "predicted_positions": positions,
    }
    return LossInputs(**{**values, **changes})


def step(divisor, micro_batches=1, weight=2.0):
    schedule = StepSchedule(
        step=0,
        epoch=0,
        beta=0.0,
        weights={"order": weight},
        word_dropout=0.0,
        target_divisor=divisor,
    )
    return StepContext(schedule=schedule, micro_batches_per_step=micro_batches)


@pytest.mark.parametrize("objective", ["per_token", "elbo"])
def test_it_is_the_cross_entropy_of_the_next_tokens(objective):
    given = inputs([4, 2, 6])
    (term,) = Order(objective, None)(given, step(divisor=9.0))
    logits = (given.predicted @ given.head_weight.t())[given.predicted_positions]
    total = F.cross_entropy(logits, given.targets, reduction="sum")
    exact = total / (9 if objective == "per_token" else 3)
    torch.testing.assert_close(term.value, exact)
    torch.testing.assert_close(term.weighted, 2 * exact)
    (ours,) = torch.autograd.grad(term.value, given.predicted)
    (theirs,) = torch.autograd.grad(exact, given.predicted)
    torch.testing.assert_close(ours, theirs)


def test_micro_batches_average_to_the_mean_over_all_tokens():
    """Two micro-batches of 3 and 8 targets: the average of what they give is the mean over 11."""
    parts = [inputs([4], seed=1), inputs([5, 5], seed=2)]
    values = [Order("per_token", None)(p, step(11.0, micro_batches=2))[0].value for p in parts]
    sums = [
        F.cross_entropy(
            (p.predicted @ p.head_weight.t())[p.predicted_positions], p.targets, reduction="sum"
        )
        for p in parts
    ]
    torch.testing.assert_close(sum(values) / 2, sum(sums) / 11)


def test_nothing_without_a_weight_or_without_states():
    assert Order("elbo", None)(inputs([4]), step(3.0, weight=0.0)) == []
    assert Order("elbo", None)(inputs([4], predicted=None), step(3.0)) == []
