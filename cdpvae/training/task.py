"""All that the training loop knows of what it trains.

The loop calls these members in this order for every optimizer step:

    schedule -> prepare -> module (through the engine) -> inspect -> ... -> observe -> adapt -> log

and, when it is time, `evaluate` and `save_pretrained`. One object of plain callables, so that the
loop imports no model, no loss and no metric.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from cdpvae.batch import StepOutput, StepSchedule, VAEBatch
from cdpvae.data import StepBatch

Observed = Mapping[str, Tensor]
# A figure is better high, better low, or says neither by itself.
Direction = Literal["+", "-", ""]


class Stateful(Protocol):
    """Something that a checkpoint keeps: plain values and tensors, the same on every rank."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue there. Raises ValueError for a state that does not fit."""
        ...


@dataclass(frozen=True)
class Evaluated:
    """The latest evaluation of a run: after which step, and its figures by name."""

    step: int
    figures: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class LoggedStep:
    """What is known of a step that is logged; means over micro-batches and ranks.

    step: optimizer steps taken, this one included.
    figures: scalars by name, `total` and those of every term.
    vectors: one number for each latent dimension, by name.
    inspected: what `Task.inspect` found on this rank; rank 0 writes its own.
    """

    step: int
    step_batch: StepBatch
    schedule: StepSchedule
    figures: Mapping[str, float]
    vectors: Mapping[str, Tensor]
    inspected: Mapping[str, float]
    grad_norm: float
    learning_rate: float


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained, and what happens around its steps.

    module: forward(batch, schedule) -> StepOutput.
    stateful: parts that save and resume loop over, by the name under which they are saved.
    optional_columns: figures that some steps do not compute; `steps.jsonl` has 0 for them.
    current_name: the name that a tensor stored by an older version has now.
    schedule: (steps taken, data of the next one) -> what varies by step.
    prepare: a batch as the loader made it -> the batch that the module is given, on its device.
    inspect: called before backward of a logged step's first micro-batch -> figures by name.
    observe: sees every step that was applied: its number, its data, and what each micro-batch's
        forward observed on this rank.
    adapt: sees the scalars of every step that was applied, by name, means over micro-batches and
        ranks; None where nothing follows them.
    log: writes a logged step.
    evaluate: measures on held-out rows after a step -> figures by name on rank 0, whatever on
        others; None where there are no rows.
    directions: returns the figures that `evaluate` will have, and when each is better.
    save_pretrained: writes what it takes to use the result into a directory, with what is known
        of the latest evaluation; rank 0 calls it.
    summary: one line for the end of a run, however it ends; empty for nothing to say.
    """

    module: nn.Module
    stateful: Mapping[str, Stateful]
    optional_columns: Sequence[str]
    current_name: Callable[[str], str]
    schedule: Callable[[int, StepBatch], StepSchedule]
    prepare: Callable[[VAEBatch, StepSchedule], VAEBatch]
    inspect: Callable[[StepOutput], dict[str, float]]
    observe: Callable[[int, StepBatch, list[Observed]], None]
    log: Callable[[LoggedStep], None]
    evaluate: Callable[[int], Mapping[str, float]] | None
    directions: Callable[[], Mapping[str, Direction]]
    save_pretrained: Callable[[Path, Evaluated | None], None]
    adapt: Callable[[Mapping[str, float]], None] | None = None
    summary: Callable[[], str] = str
