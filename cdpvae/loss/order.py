"""Order: z and a position alone must say which token comes next there.

The bag of words asks z for the words of a text, this term for their places. It reads the states of
`PositionalProjector`, which know z and a position but no word, through the decoder's own frozen
output head. The sum over targets is divided as the reconstruction's is, so that both are in the
same unit whatever the objective.
"""

from __future__ import annotations

from typing import ClassVar

from cdpvae.batch import Term
from cdpvae.loss.base import LossInputs, LossTerm, StepContext
from cdpvae.loss.reconstruction import mean_of_targets, reconstruction_nll


class Order(LossTerm):
    """The cross-entropy of the next tokens under z and their places, weighted by `order_weight`.

    objective: as in `Reconstruction`. impl: passed on to `cdpvae_kernels`.
    """

    # Where the weight has fallen to 0, the column says 0.
    optional_columns: ClassVar[tuple[str, ...]] = ("order",)

    def __init__(self, objective: str, impl: str | None) -> None:
        self.objective = objective
        self.impl = impl

    def __call__(self, inputs: LossInputs, step: StepContext) -> list[Term]:
        """Return `order`; nothing without a weight, or from a model that predicts no positions."""
        weight = step.weight("order")
        if not weight or inputs.predicted is None or inputs.predicted_positions is None:
            return []
        # The output head in the hidden states' dtype, as everywhere.
        token_sum = reconstruction_nll(
            inputs.predicted.to(inputs.head_weight.dtype),
            inputs.head_weight,
            inputs.predicted_positions,
            inputs.targets,
            ignore_index=inputs.ignore_index,
            impl=self.impl,
        )
        per, value = mean_of_targets(token_sum, self.objective, inputs.response.num_rows, step)
        return [Term(name="order", value=value, weight=weight, per=per)]
