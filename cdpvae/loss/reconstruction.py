"""Reconstruction: the negative log-likelihood of the response tokens, without logits in memory.

Two means of one sum are reported. Per token: over *all* target tokens of the optimizer step, on
every rank. As the engine averages over micro-batches (accumulation x ranks), each contributes
token_sum x micro_batches_per_step / target_divisor, and the average of these contributions is
exactly that mean, however the step is cut. Per sequence: over the rows of the micro-batch, the
form in which an ELBO is written. `objective` says which of the two is trained on.

Legend: T packed positions, N target positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from cdpvae.batch import Term
from cdpvae.config.loss import Objective
from cdpvae.loss.base import LossInputs, LossTerm, StepContext
from cdpvae_kernels import linear_cross_entropy

IGNORE_INDEX = -100
OBJECTIVES = get_args(Objective)


class Reconstruction(LossTerm):
    """The two means of the cross-entropy.

    objective: `per_token` trains on the mean over tokens, `elbo` on nats per sequence.
    impl: passed on to `cdpvae_kernels`. Raises ValueError for another objective.
    """

    def __init__(self, objective: str, impl: str | None) -> None:
        if objective not in OBJECTIVES:
            raise ValueError(f"objective={objective!r}: it must be one of {OBJECTIVES}")
        self.objective = objective
        self.impl = impl

    def __call__(self, inputs: LossInputs, step: StepContext) -> list[Term]:
        """Return `recon` and `recon_nats_per_sequence`; one of them has weight 1, the other 0."""
        # One sum over all targets; the two means divide it differently.
        token_sum = reconstruction_nll(
            inputs.hidden,
            inputs.head_weight,
            inputs.positions,
            inputs.targets,
            ignore_index=inputs.ignore_index,
            impl=self.impl,
        )
        rows = inputs.response.num_rows
        _, per_token = mean_of_targets(token_sum, "per_token", rows, step)
        _, per_sequence = mean_of_targets(token_sum, "elbo", rows, step)
        elbo = self.objective == "elbo"
        return [
            Term(name="recon", value=per_token, weight=0.0 if elbo else 1.0, per="token"),
            Term(
                name="recon_nats_per_sequence",
                value=per_sequence if elbo else per_sequence.detach(),
                weight=1.0 if elbo else 0.0,
                per="row",
            ),
        ]


def mean_of_targets(
    token_sum: Tensor, objective: str, num_rows: int, step: StepContext
) -> tuple[Literal["token", "row"], Tensor]:
    """Divide a micro-batch's sum over targets () as the objective says -> what it is per, and ().

    token_sum: in nats.
    objective: `per_token`, by the targets of the whole step; `elbo`, by the micro-batch's rows.
    num_rows: B.
    step: has the divisor.
    """
    if objective == "elbo":
        return "row", token_sum / num_rows
    # At least 1: a count of 0 comes with a sum of 0, and 0 / 0 would be NaN.
    divisor = max(step.schedule.target_divisor, 1.0)
    return "token", token_sum * (step.micro_batches_per_step / divisor)


def reconstruction_nll(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    positions_N: Tensor,
    targets_N: Tensor,
    *,
    ignore_index: int | None = IGNORE_INDEX,
    impl: str | None = None,
) -> Tensor:
    """Return the sum over targets of -log softmax(hidden W^T)[target], in nats.

    hidden_TD (T, D) float: the decoder's packed output.
    weight_VD (V, D): the head, in the dtype of `hidden_TD`.
    positions_N (N,) int64: the positions of `hidden_TD` that predict.
    targets_N (N,) int64: what they predict.
    ignore_index: the target that is ignored; None says that all are valid.
    impl: passed on to `cdpvae_kernels.linear_cross_entropy`.

    Returns a scalar fp32 (fp64 for fp64 inputs), differentiable in `hidden_TD`, and in `weight_VD`
    if that requires a gradient; 0 with zero gradients when nothing is to be predicted.
    Raises ValueError for wrong shapes or dtypes and for values out of range.
    """
    return linear_cross_entropy(
        hidden_TD,
        weight_VD,
        targets_N,
        positions=positions_N,
        divisor=1.0,
        ignore_index=ignore_index,
        impl=impl,
    )
