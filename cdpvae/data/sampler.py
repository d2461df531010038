"""Choose the rows of each optimizer step: shuffled by epoch, balanced over ranks, resumable.

`RowCountSampler` gives every optimizer step the same number of rows,
per_device_batch_size x grad_accum x world_size; `token_budget.TokenBudgetSampler` as many as fill a
budget of tokens. Every rank computes the rows of all ranks from the lengths; nothing is
communicated.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from cdpvae.data.balance import balance_step


@dataclass(frozen=True)
class StepRows:
    """Name the rows of one optimizer step, of all ranks.

    micro_batches: grad_accum arrays (world_size, rows) int64, indices into the data set; every
    rank has the same number of rows in a global micro-batch, so that rows can be gathered.
    target_divisor: valid target tokens (response length - 1, summed).
    encoder_tokens, decoder_tokens: instruction and response tokens.
    """

    micro_batches: tuple[np.ndarray, ...]
    target_divisor: int
    encoder_tokens: int
    decoder_tokens: int

    @property
    def num_rows(self) -> int:
        """Count the rows of all micro-batches and ranks."""
        return sum(rows.size for rows in self.micro_batches)


class StepSampler(ABC):
    """Choose the rows of each step from the lengths and the order of an epoch.

    response_lengths, instruction_lengths (rows,): tokens of every row.
    grad_accum: global micro-batches a step.
    world_size: ranks that share each of them.
    seed: of the order.
    instruction_passes: how often the backbone reads a row's instruction; weighs it in `tokens`,
        which micro-batches and ranks are balanced by.

    `unequal_rows`: whether micro-batches of a step may differ in their number of rows.
    Raises ValueError for sizes below 1, a negative seed or lengths that do not belong together.
    """

    unequal_rows = False

    def __init__(
        self,
        response_lengths: np.ndarray,
        instruction_lengths: np.ndarray,
        *,
        grad_accum: int,
        world_size: int,
        seed: int,
        instruction_passes: int = 1,
    ) -> None:
        check_sizes(
            grad_accum=grad_accum, world_size=world_size, instruction_passes=instruction_passes
        )
        if seed < 0:
            raise ValueError(f"seed={seed} must be at least 0")
        if len(response_lengths) != len(instruction_lengths):
            raise ValueError(
                f"{len(response_lengths)} response lengths but {len(instruction_lengths)} "
                "instruction lengths; give both of every row"
            )
        # int64 whatever the data set stores: sums over a step must not overflow.
        self.responses = np.asarray(response_lengths, dtype=np.int64)
        self.instructions = np.asarray(instruction_lengths, dtype=np.int64)
        self.instruction_passes = instruction_passes
        self.tokens = self.responses + instruction_passes * self.instructions
        self.grad_accum = grad_accum
        self.world_size = world_size
        self.seed = seed
        # One attribute, so that a prefetching thread never sees half of a change.
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, dtype=np.int64))

    @property
    def steps_per_epoch(self) -> int:
        """Count the steps of the first epoch."""
        return self.steps_in(0)

    @abstractmethod
    def steps_in(self, epoch: int) -> int:
        """Count the optimizer steps of an epoch."""

    @abstractmethod
    def micro_batches(self, epoch: int, step_in_epoch: int) -> tuple[np.ndarray, ...]:
        """Choose what `StepRows.micro_batches` holds, for a step that exists."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Collect, ready for JSON, what must be equal for an order to be continued."""

    @abstractmethod
    def describe(self) -> str:
        """Say in a few words how large a step is."""

    def order(self, epoch: int) -> np.ndarray:
        """Permute the rows for an epoch -> (rows,) int64."""
        # Keep the last permutation: consecutive steps share it.
        cached, order = self._order
        if epoch != cached:
            order = permutation(len(self.tokens), self.seed, epoch)
            self._order = (epoch, order)
        return order

    def step_rows(self, epoch: int, step_in_epoch: int) -> StepRows:
        """Choose the rows of one optimizer step. Raises ValueError beyond the epoch's last."""
        if epoch < 0 or not 0 <= step_in_epoch < self.steps_in(epoch):
            raise ValueError(
                f"epoch {epoch}, step {step_in_epoch}: epochs start at 0 and have "
                f"{self.steps_in(max(epoch, 0))} steps"
            )
        # Count over all ranks, so that every rank knows the step's totals without communication.
        micro_batches = self.micro_batches(epoch, step_in_epoch)
        rows = np.concatenate([part.ravel() for part in micro_batches])
        return StepRows(
            micro_batches=micro_batches,
            target_divisor=int((self.responses[rows] - 1).sum()),
            encoder_tokens=int(self.instructions[rows].sum()),
            decoder_tokens=int(self.responses[rows].sum()),
        )

    def fingerprint(self) -> str:
        """Hash the lengths with SHA-256, to notice another data set when a run resumes."""
        # Little-endian on every machine, so that a run can move.
        digest = hashlib.sha256(self.responses.astype("<i8").tobytes())
        digest.update(self.instructions.astype("<i8").tobytes())
        return digest.hexdigest()


class RowCountSampler(StepSampler):
    """Give every step the same number of rows.

    The rows depend on (seed, epoch) and the lengths alone. The last, incomplete step of an epoch
    is dropped.

    response_lengths, instruction_lengths (rows,): tokens of each row.
    rows_per_micro_batch: per rank.
    grad_accum: micro-batches of a rank and step.
    world_size: ranks.
    seed: of the order.
    instruction_passes: as in `StepSampler`.

    Raises ValueError when the rows do not fill one step.
    """

    def __init__(
        self,
        response_lengths: np.ndarray,
        instruction_lengths: np.ndarray,
        *,
        rows_per_micro_batch: int,
        grad_accum: int,
        world_size: int,
        seed: int,
        instruction_passes: int = 1,
    ) -> None:
        check_sizes(rows_per_micro_batch=rows_per_micro_batch)
        super().__init__(
            response_lengths,
            instruction_lengths,
            grad_accum=grad_accum,
            world_size=world_size,
            seed=seed,
            instruction_passes=instruction_passes,
        )
        self.rows_per_step = rows_per_micro_batch * grad_accum * world_size
        if len(self.tokens) < self.rows_per_step:
            raise ValueError(
                f"{len(self.tokens)} rows do not fill one optimizer step of {rows_per_micro_batch} "
                f"x {grad_accum} x {world_size} = {self.rows_per_step} rows "
                "(per_device_batch_size x gradient_accumulation_steps x ranks); "
                "lower one of them or give more data"
            )

    def steps_in(self, epoch: int) -> int:
        """Count the optimizer steps of an epoch; every epoch has the same number."""
        return len(self.tokens) // self.rows_per_step

    def micro_batches(self, epoch: int, step_in_epoch: int) -> tuple[np.ndarray, ...]:
        """Balance the next `rows_per_step` rows of the epoch's order."""
        # Balance inside the step only: which rows a step has depends on the order alone.
        start = step_in_epoch * self.rows_per_step
        rows = self.order(epoch)[start : start + self.rows_per_step]
        parts = balance_step(self.tokens[rows], self.grad_accum, self.world_size)
        return tuple(rows[part] for part in parts)

    def describe(self) -> str:
        """Say how many rows a step has."""
        return f"{self.rows_per_step} rows a step"

    def identity(self) -> dict[str, Any]:
        """Collect what must be equal to continue: the rows of a step, not ranks and grad_accum."""
        # Old checkpoints carry these keys.
        return {
            "seed": self.seed,
            "rows_per_step": self.rows_per_step,
            "data": self.fingerprint(),
        }


def permutation(count: int, *key: int) -> np.ndarray:
    """Permute 0..count-1 in a way that depends on the arguments alone -> (count,) int64.

    Sorts random keys: numpy promises the bits of PCG64 across versions, not `permutation`.
    """
    # Stable, so that equal keys, however unlikely, keep one order everywhere.
    bits = np.random.PCG64(np.random.SeedSequence(key))
    return np.argsort(bits.random_raw(count), kind="stable")


def check_sizes(**sizes: int) -> None:
    """Raise ValueError for the first of the named sizes that is below 1."""
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
