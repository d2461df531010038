"""Choose the rows of each optimizer step: shuffled by epoch, balanced over ranks, resumable.

`RowCountSampler` gives every optimizer step the same number of rows,
per_device_batch_size x grad_accum x world_size; `token_budget.TokenBudgetSampler` as many as fill a
budget of tokens. Every rank computes the whole plan from the lengths; nothing is communicated.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from cdpvae.data.balance import balance_step


@dataclass(frozen=True)
class StepRows:
    """Which rows make up one optimizer step.

    micro_batches: grad_accum arrays (world_size, rows) int64, indices into the data set; every
    rank has the same number of rows in a global micro-batch, so that rows can be gathered.
    target_divisor: valid target tokens (response length - 1, summed), all ranks.
    encoder_tokens, decoder_tokens: instruction and response tokens, all ranks.
    """

    micro_batches: tuple[np.ndarray, ...]
    target_divisor: int
    encoder_tokens: int
    decoder_tokens: int

    @property
    def num_rows(self) -> int:
        """Rows of all micro-batches and ranks."""
        return sum(rows.size for rows in self.micro_batches)


class StepSampler:
    """What plans have in common: the lengths, and the order of an epoch.

    response_lengths, instruction_lengths: (rows,) tokens. Raises ValueError for sizes below 1,
    a negative seed or lengths that do not belong together.
    unequal_rows: whether micro-batches of a step may differ in their number of rows.
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
    ) -> None:
        check_sizes(grad_accum=grad_accum, world_size=world_size)
        if seed < 0:
            raise ValueError(f"seed={seed} must be at least 0")
        if len(response_lengths) != len(instruction_lengths):
            raise ValueError(
                f"{len(response_lengths)} response lengths but {len(instruction_lengths)} "
                "instruction lengths"
            )
        self.responses = np.asarray(response_lengths, dtype=np.int64)
        self.instructions = np.asarray(instruction_lengths, dtype=np.int64)
        self.tokens = self.responses + self.instructions
        self.grad_accum = grad_accum
        self.world_size = world_size
        self.seed = seed
        # One attribute, so that a prefetching thread never sees half of a change.
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, dtype=np.int64))

    @property
    def steps_per_epoch(self) -> int:
        """Steps of the first epoch."""
        return self.steps_in(0)

    def steps_in(self, epoch: int) -> int:
        """Optimizer steps of an epoch."""
        raise NotImplementedError

    def micro_batches(self, epoch: int, step_in_epoch: int) -> tuple[np.ndarray, ...]:
        """Those of `StepRows`, for a step that exists."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """What must be equal for an order to be continued, JSON-ready."""
        raise NotImplementedError

    def describe(self) -> str:
        """The size of a step, in a few words."""
        raise NotImplementedError

    def order(self, epoch: int) -> np.ndarray:
        """(rows,) int64, the permutation of an epoch."""
        cached, order = self._order
        if epoch != cached:
            order = permutation(len(self.tokens), self.seed, epoch)
            self._order = (epoch, order)
        return order

    def step_rows(self, epoch: int, step_in_epoch: int) -> StepRows:
        """The plan of one optimizer step. Raises ValueError beyond the epoch's last."""
        if epoch < 0 or not 0 <= step_in_epoch < self.steps_in(epoch):
            raise ValueError(
                f"epoch {epoch}, step {step_in_epoch}: epochs start at 0 and have "
                f"{self.steps_in(max(epoch, 0))} steps"
            )
        micro_batches = self.micro_batches(epoch, step_in_epoch)
        rows = np.concatenate([part.ravel() for part in micro_batches])
        return StepRows(
            micro_batches=micro_batches,
            target_divisor=int((self.responses[rows] - 1).sum()),
            encoder_tokens=int(self.instructions[rows].sum()),
            decoder_tokens=int(self.responses[rows].sum()),
        )

    def fingerprint(self) -> str:
        """SHA-256 over the lengths: tells this data set from another when a run resumes."""
        digest = hashlib.sha256(self.responses.astype("<i8").tobytes())
        digest.update(self.instructions.astype("<i8").tobytes())
        return digest.hexdigest()


class RowCountSampler(StepSampler):
    """The rows of every step of every epoch from (seed, epoch) and the lengths alone.

    rows_per_micro_batch: per rank. The last, incomplete step of an epoch is dropped.
    Raises ValueError when there is none left.
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
    ) -> None:
        check_sizes(rows_per_micro_batch=rows_per_micro_batch)
        super().__init__(
            response_lengths,
            instruction_lengths,
            grad_accum=grad_accum,
            world_size=world_size,
            seed=seed,
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
        """The same for every epoch."""
        return len(self.tokens) // self.rows_per_step

    def micro_batches(self, epoch: int, step_in_epoch: int) -> tuple[np.ndarray, ...]:
        start = step_in_epoch * self.rows_per_step
        rows = self.order(epoch)[start : start + self.rows_per_step]
        parts = balance_step(self.tokens[rows], self.grad_accum, self.world_size)
        return tuple(rows[part] for part in parts)

    def describe(self) -> str:
        return f"{self.rows_per_step} rows a step"

    def identity(self) -> dict[str, Any]:
        """Ranks and grad_accum may differ, the rows of a step may not."""
        return {
            "seed": self.seed,
            "rows_per_step": self.rows_per_step,
            "data": self.fingerprint(),
        }


def permutation(count: int, *key: int) -> np.ndarray:
    """(count,) int64, a permutation of 0..count-1 that depends on the arguments alone.

    Sorted random keys: numpy promises the bits of PCG64 across versions, not `permutation`.
    """
    bits = np.random.PCG64(np.random.SeedSequence(key))
    return np.argsort(bits.random_raw(count), kind="stable")


def check_sizes(**sizes: int) -> None:
    """Raise ValueError for the first that is below 1."""
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
