"""Rows to optimizer steps: shuffled, balanced, resumable.

A *window* is the rows of one optimizer step: rows_per_micro_batch x grad_accum x world_size. Its
rows are dealt twice, by token count: to the `grad_accum` global micro-batches, then inside each to
the ranks. The first deal sees only the rows and the size of a global micro-batch, so that two
ranks of B rows and one rank of 2B rows train on the same global micro-batches. Every rank computes
the whole plan from the lengths; nothing is communicated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from cdpvae.batch import VAEBatch
from cdpvae.data.collator import VAECollator


class TokenRows(Protocol):
    """`PreprocessedDataset`, `InstructionDataset`, or anything that reads like them."""

    def __len__(self) -> int: ...

    def rows(self, indices: Sequence[int]) -> list[dict[str, np.ndarray]]: ...


@dataclass(frozen=True)
class WindowPlan:
    """Which rows make up one optimizer step.

    rows: (grad_accum, world_size, rows_per_micro_batch) int64 indices into the data set.
    target_divisor: valid target tokens (response length - 1, summed), all ranks.
    encoder_tokens, decoder_tokens: instruction and response tokens, all ranks.
    """

    rows: np.ndarray
    target_divisor: int
    encoder_tokens: int
    decoder_tokens: int


@dataclass
class Window:
    """One optimizer step. micro_batches: this rank's; every count is that of all ranks.

    target_divisor: valid target tokens. encoder_tokens, decoder_tokens: instruction and response
    tokens (soft prompts not counted).
    """

    epoch: int
    step_in_epoch: int
    micro_batches: list[VAEBatch]
    target_divisor: int
    rows: int
    encoder_tokens: int
    decoder_tokens: int

    @property
    def tokens(self) -> int:
        return self.encoder_tokens + self.decoder_tokens


class WindowSampler:
    """Plans every window of every epoch from (seed, epoch) and the lengths alone.

    response_lengths, instruction_lengths: (rows,) tokens. rows_per_micro_batch: per rank.
    The last, incomplete window of an epoch is dropped. Raises ValueError when there is none left.
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
        sizes = {
            "rows_per_micro_batch": rows_per_micro_batch,
            "grad_accum": grad_accum,
            "world_size": world_size,
        }
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
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
        self.rows_per_micro_batch = rows_per_micro_batch
        self.grad_accum = grad_accum
        self.world_size = world_size
        self.seed = seed
        self.window_rows = rows_per_micro_batch * grad_accum * world_size
        self.steps_per_epoch = len(self.tokens) // self.window_rows
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"{len(self.tokens)} rows do not fill one optimizer step of {rows_per_micro_batch} "
                f"x {grad_accum} x {world_size} = {self.window_rows} rows (per_device_batch_size x "
                "gradient_accumulation_steps x ranks); lower one of them or give more data"
            )
        self._epoch = -1
        self._order = np.zeros(0, dtype=np.int64)

    def order(self, epoch: int) -> np.ndarray:
        """(rows,) int64, the permutation of an epoch.

        Sorted random keys: numpy promises the bits of PCG64 across versions, not `permutation`.
        """
        if epoch != self._epoch:
            bits = np.random.PCG64(np.random.SeedSequence((self.seed, epoch)))
            self._order = np.argsort(bits.random_raw(len(self.tokens)), kind="stable")
            self._epoch = epoch
        return self._order

    def window(self, epoch: int, step_in_epoch: int) -> WindowPlan:
        """The plan of one optimizer step. Raises ValueError beyond the epoch's last."""
        if epoch < 0 or not 0 <= step_in_epoch < self.steps_per_epoch:
            raise ValueError(
                f"epoch {epoch}, step {step_in_epoch}: epochs start at 0 and have "
                f"{self.steps_per_epoch} steps"
            )
        start = step_in_epoch * self.window_rows
        window = self.order(epoch)[start : start + self.window_rows]
        plan = []
        for group in deal(self.tokens[window], self.grad_accum):
            members = window[group]
            ranks = deal(self.tokens[members], self.world_size)
            plan.append([members[rank] for rank in ranks])
        return WindowPlan(
            rows=np.array(plan),
            target_divisor=int((self.responses[window] - 1).sum()),
            encoder_tokens=int(self.instructions[window].sum()),
            decoder_tokens=int(self.responses[window].sum()),
        )

    def fingerprint(self) -> str:
        """SHA-256 over the lengths: tells this data set from another when a run resumes."""
        digest = hashlib.sha256(self.responses.astype("<i8").tobytes())
        digest.update(self.instructions.astype("<i8").tobytes())
        return digest.hexdigest()


def deal(tokens: np.ndarray, groups: int) -> list[np.ndarray]:
    """Positions 0..n-1 dealt into equally large groups of nearly equal token sums.

    tokens: (n,) int64, n divisible by groups. Longest first, each to the lightest group with
    room; then, as long as it helps, the heaviest and the lightest group exchange two rows.
    Positions are ascending inside a group. Deterministic.
    """
    if groups == 1:
        return [np.arange(len(tokens))]
    room = len(tokens) // groups
    members: list[list[int]] = [[] for _ in range(groups)]
    sums = [0] * groups
    for position in np.argsort(-tokens, kind="stable").tolist():
        lightest = min((g for g in range(groups) if len(members[g]) < room), key=sums.__getitem__)
        members[lightest].append(position)
        sums[lightest] += int(tokens[position])
    parts = [np.array(sorted(group)) for group in members]
    # Each exchange narrows the gap; the bound only caps the time spent on unlucky windows.
    for _ in range(4 * groups):
        if not _exchange(tokens, parts):
            break
    return [np.sort(part) for part in parts]


def _exchange(tokens: np.ndarray, parts: list[np.ndarray]) -> bool:
    """Swap the pair of rows that best evens out the heaviest and lightest group; False if none."""
    sums = [int(tokens[part].sum()) for part in parts]
    heavy, light = int(np.argmax(sums)), int(np.argmin(sums))
    gap = sums[heavy] - sums[light]
    moved = tokens[parts[heavy]][:, None] - tokens[parts[light]][None, :]
    remaining = np.abs(gap - 2 * moved)
    i, j = np.unravel_index(int(remaining.argmin()), remaining.shape)
    if remaining[i, j] >= gap:
        return False
    parts[heavy][i], parts[light][j] = parts[light][j], parts[heavy][i]
    return True


class WindowLoader:
    """Hands out windows from `position` on.

    position: (epoch, step_in_epoch) of the window after the last one handed out, so that a
    checkpoint taken after training on a window resumes with the next.
    """

    def __init__(
        self, dataset: TokenRows, collator: VAECollator, sampler: WindowSampler, rank: int = 0
    ) -> None:
        if not 0 <= rank < sampler.world_size:
            raise ValueError(f"rank={rank} must be in 0..{sampler.world_size - 1}")
        if len(dataset) != len(sampler.tokens):
            raise ValueError(
                f"the sampler plans {len(sampler.tokens)} rows, the data set has {len(dataset)}"
            )
        self.dataset = dataset
        self.collator = collator
        self.sampler = sampler
        self.rank = rank
        self.position = (0, 0)

    @property
    def steps_per_epoch(self) -> int:
        return self.sampler.steps_per_epoch

    def epoch(self) -> Iterator[Window]:
        """The windows left in the current epoch; afterwards the position is the next epoch's."""
        current = self.position[0]
        while self.position[0] == current:
            epoch, step = self.position
            window = self.build(epoch, step)
            last = step + 1 == self.steps_per_epoch
            self.position = (epoch + 1, 0) if last else (epoch, step + 1)
            yield window

    def __iter__(self) -> Iterator[Window]:
        """Epoch after epoch, without end."""
        while True:
            yield from self.epoch()

    def build(self, epoch: int, step_in_epoch: int) -> Window:
        """One window of this rank; the state stays as it is."""
        plan = self.sampler.window(epoch, step_in_epoch)
        micro_batches = [
            self.collator(self.dataset.rows(rows.tolist()), rows)
            for rows in plan.rows[:, self.rank]
        ]
        return Window(
            epoch,
            step_in_epoch,
            micro_batches,
            plan.target_divisor,
            plan.rows.size,
            plan.encoder_tokens,
            plan.decoder_tokens,
        )

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready; the same on every rank."""
        epoch, step_in_epoch = self.position
        return {"epoch": epoch, "step_in_epoch": step_in_epoch, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue there. Ranks and grad_accum may differ, the rows of a step may not.

        Raises ValueError when seed, rows per step or data differ: the order would be another.
        """
        for name, value in self._identity().items():
            if state[name] != value:
                raise ValueError(
                    f"cannot resume: {name} was {state[name]} and is {value}; the order of the "
                    "rows would not be continued"
                )
        self.position = (int(state["epoch"]), int(state["step_in_epoch"]))

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.sampler.seed,
            "rows_per_step": self.sampler.window_rows,
            "data": self.sampler.fingerprint(),
        }


def evaluation_batches(
    dataset: TokenRows,
    collator: VAECollator,
    rows_per_batch: int,
    limit: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[VAEBatch]:
    """The first `limit` rows (None: all), each once, in order; ranks take contiguous shares.

    Shares differ by at most one row, so ranks may have different numbers of batches: no
    collective may be called per batch.
    """
    if rows_per_batch < 1 or not 0 <= rank < world_size:
        raise ValueError(
            f"rows_per_batch={rows_per_batch} must be at least 1 and rank={rank} in "
            f"0..{world_size - 1}"
        )
    total = len(dataset) if limit is None else min(limit, len(dataset))
    start, stop = total * rank // world_size, total * (rank + 1) // world_size
    for first in range(start, stop, rows_per_batch):
        indices = range(first, min(first + rows_per_batch, stop))
        yield collator(dataset.rows(indices), list(indices))
