"""Types and small helpers for operators that come with their own backward pass."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class OperatorContext(Protocol):
    """The object on which an operator keeps what its backward pass needs."""

    @property
    def saved_tensors(self) -> tuple[Any, ...]:
        """The tensors handed to `save_for_backward`; None where None was handed over."""

    @property
    def needs_input_grad(self) -> tuple[bool, ...]:
        """One flag per input of the operator."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep tensors until the backward pass."""

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        """Declare outputs that carry no gradient."""

    def set_materialize_grads(self, value: bool) -> None:
        """Choose whether a gradient that is not defined arrives as zeros (True) or as None."""


def gradients_of_first(
    ctx: OperatorContext, *gradients: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return one entry per input of the operator: `gradients`, then None for all other inputs."""
    # torch wants one entry for every input, settings included.
    without = len(ctx.needs_input_grad) - len(gradients)
    return (*gradients, *[None] * without)
