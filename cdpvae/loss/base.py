"""What a loss term is given, and what it returns.

The losses know no ranks. What they need of the other ranks comes through `gather`, a callable
that takes local rows (B, ...) and returns the rows of all ranks (K, ...), concatenated in rank
order and differentiable; None means local. The convention: every rank computes the same scalar
from the gathered rows, and the engine averages gradients over ranks. So the backward of `gather`
hands each rank its own slice of the incoming gradient times world_size; the average over ranks
then is the gradient of that scalar, as on a single rank that holds all rows.

Legend: B rows, T packed positions, N target positions, D hidden, V vocabulary, F numbers of one
row's latent vector.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from cdpvae.batch import PackedText, StepSchedule, Term

Gather = Callable[[Tensor], Tensor]


class LinearHead(Protocol):
    """A linear layer with bias, such as `nn.Linear`."""

    @property
    def weight(self) -> Tensor:
        """(outputs, inputs)."""
        ...

    @property
    def bias(self) -> Tensor:
        """(outputs,)."""
        ...


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """What a forward pass leaves for the losses.

    hidden (T, D): the packed decoder output.
    head_weight (V, D): the output head, in the dtype of `hidden`.
    positions (N,) int64: positions of `hidden` that predict.
    targets (N,) int64: what they predict.
    ignore_index: the target that is ignored; None says that all are valid, as a collator's are, and
        no host waits for a device to count them.
    response: the B rows of the decoder's text.
    special_ids (S,) int64: tokens that are no content (BOS, EOS and pad).
    z (B, F): the sample that the decoder was given, one vector a row; (B, 0) without a latent.
    penalties: by name (B,) or (B, F), not reduced; see `Latent.penalties`.
    anchor (B, F): one vector a row that stands for the text, with its graph.
    view (B, F): the same of the augmented texts, where they were computed.
    bow_head: predicts the response's tokens from z, V outputs; None without a latent.
    predicted (R, D): hidden states of the response's R positions that know z and their place but
        no word; None where the model makes none.
    predicted_positions (N,) int64: the rows of `predicted` that predict `targets`.
    """

    hidden: Tensor
    head_weight: Tensor
    positions: Tensor
    targets: Tensor
    response: PackedText
    special_ids: Tensor
    z: Tensor
    anchor: Tensor
    penalties: Mapping[str, Tensor] = field(default_factory=dict)
    ignore_index: int | None = -100
    view: Tensor | None = None
    bow_head: LinearHead | None = None
    predicted: Tensor | None = None
    predicted_positions: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """What a term needs to know of the optimizer step that its micro-batch belongs to.

    schedule: weights and divisors. micro_batches_per_step: grad_accum x world_size, which the
    engine divides by. gather: rows of all ranks, None for local.
    """

    schedule: StepSchedule
    micro_batches_per_step: int
    gather: Gather | None = None

    def weight(self, name: str) -> float:
        """Return the weight of a setting `<name>_weight` in this step."""
        return self.schedule.weights[name]


class LossTerm(ABC):
    """One term of the objective: a callable object; what it keeps between steps is its state."""

    # Columns of a term that some steps do not compute; such a step writes 0 there, so that every
    # line of `steps.jsonl` has the same keys.
    optional_columns: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def __call__(self, inputs: LossInputs, step: StepContext) -> list[Term]:
        """Return the terms of one micro-batch; none where the inputs do not have what it needs."""

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and tensors for a checkpoint, the same on every rank."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue there. Raises ValueError for a state that does not fit."""
        if state:
            raise ValueError(
                f"{type(self).__name__} keeps no state, the saved one is {sorted(state)}"
            )


def graph_if(weight: float) -> AbstractContextManager[Any]:
    """Return a context that records a graph only for a term that has a weight."""
    return torch.set_grad_enabled(torch.is_grad_enabled() and weight != 0)
