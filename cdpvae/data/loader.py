"""Hand out step batches, one for each optimizer step, from a position that a checkpoint can keep.

`StepLoader` reads a data set of rows; `preprocessing.streaming.loader.StreamLoader` has the same
interface and reads records as they come. Both can build step batches ahead in a background thread
(`prefetch`), which changes neither the batches nor the state: the state describes what was handed
out, not what was built.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from cdpvae.batch import VAEBatch
from cdpvae.data.collator import VAECollator
from cdpvae.data.prefetch import Prefetcher
from cdpvae.data.sampler import StepSampler


class TokenRows(Protocol):
    """Rows of token ids by index, as `TokenDataset` and its subclasses give them."""

    def __len__(self) -> int: ...

    def rows(self, indices: Sequence[int]) -> list[dict[str, np.ndarray]]:
        """Read rows: instruction_ids and response_ids, int32 arrays."""
        ...


@dataclass(frozen=True)
class StepBatch:
    """The data of one optimizer step on one rank; every count is over all ranks.

    micro_batches: those of this rank.
    target_divisor: valid target tokens.
    rows: rows of all micro-batches.
    encoder_tokens, decoder_tokens: instruction and response tokens, without soft prompts.
    row_divisor: `rows` where micro-batches differ in their number of rows, so that means over rows
    must be weighted; else None.
    """

    epoch: int
    step_in_epoch: int
    micro_batches: list[VAEBatch]
    target_divisor: int
    rows: int
    encoder_tokens: int
    decoder_tokens: int
    row_divisor: int | None = None

    @property
    def tokens(self) -> int:
        """Add up instruction and response tokens of all ranks."""
        return self.encoder_tokens + self.decoder_tokens


class Cursor(Protocol):
    """Where a loader stands: the step after the last one handed out."""

    @property
    def epoch(self) -> int:
        """Count epochs from 0."""
        ...

    @property
    def step_in_epoch(self) -> int:
        """Count the steps of the epoch from 0."""
        ...


class Position(NamedTuple):
    """The cursor of a `StepLoader`, and of every loader what the training state records."""

    epoch: int
    step_in_epoch: int


C = TypeVar("C", bound=Cursor)


class Loader(ABC, Generic[C]):
    """Hand out step batches from a cursor on.

    A subclass says what a cursor is and builds step batches from a cursor on. The cursor names the
    step after the last one handed out, so that a checkpoint taken after training on a step resumes
    with the next.

    start: the first cursor. prefetch: step batches built ahead in a background thread; 0 builds
    each when it is asked for. Raises ValueError for a negative `prefetch`.
    """

    def __init__(self, start: C, prefetch: int = 0) -> None:
        if prefetch < 0:
            raise ValueError(f"prefetch={prefetch} must be at least 0")
        self._prefetch = prefetch
        self._cursor = start
        self._ahead: (
            Generator[tuple[StepBatch, C], None, None] | Prefetcher[tuple[StepBatch, C]] | None
        ) = None

    @abstractmethod
    def steps_from(self, cursor: C) -> Generator[tuple[StepBatch, C], None, None]:
        """Build step after step without end, each with the cursor after it; `self` stays as it is.

        Called on a copy of the loader, and in a thread when `prefetch` is above 0.
        """

    @property
    @abstractmethod
    def steps_per_epoch(self) -> int | None:
        """Count the optimizer steps of an epoch; None where nobody knows before its end.

        Where epochs differ, the steps of the first.
        """

    @abstractmethod
    def describe(self) -> str:
        """Say in a few words what a step and an epoch are."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Save where the loader stands, and what must be equal to continue there.

        Numbers, strings, lists of them and tensors; the same on every rank.
        """

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was saved.

        Raises ValueError when the order of the rows would be another.
        """

    def summary(self) -> str | None:
        """Say how many of the records read so far gave rows, and why others did not.

        None where preprocessing has reported that.
        """
        return None

    @property
    def position(self) -> Position:
        """Name the step after the last one handed out."""
        return Position(self._cursor.epoch, self._cursor.step_in_epoch)

    def epoch(self) -> Iterator[StepBatch]:
        """Hand out what is left of this epoch; afterwards the position is in the next epoch."""
        # The cursor moves to the next epoch with the last step of this one.
        current = self._cursor.epoch
        while self._cursor.epoch == current:
            yield self._next()

    def __iter__(self) -> Iterator[StepBatch]:
        """Hand out epoch after epoch, without end."""
        while True:
            yield from self.epoch()

    def close(self) -> None:
        """Stop building ahead. The position stays; asking for more starts again from there."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _next(self) -> StepBatch:
        if self._ahead is None:
            # Read through a copy: a thread that knows `self` would keep an abandoned loader alive.
            steps = copy.copy(self).steps_from(self._cursor)
            self._ahead = Prefetcher(steps, self._prefetch) if self._prefetch else steps
        # The cursor moves with what is handed out, whatever has been built beyond it.
        try:
            step_batch, self._cursor = next(self._ahead)
        except BaseException:
            # Close, so that asking again builds the failed step anew.
            self.close()
            raise
        return step_batch

    def _move_to(self, cursor: C) -> None:
        """Continue at `cursor`; what was built ahead is thrown away."""
        self.close()
        self._cursor = cursor


class StepLoader(Loader[Position]):
    """Read this rank's share of the rows that a sampler chooses.

    dataset: where the rows are read.
    collator: what packs the rows of a micro-batch.
    sampler: what chooses the rows of every step.
    rank: whose share is read, 0 to sampler.world_size - 1.
    prefetch: step batches built ahead in a background thread.

    Raises ValueError when `rank` is no rank of the sampler, or when the sampler was made for
    another number of rows.
    """

    def __init__(
        self,
        dataset: TokenRows,
        collator: VAECollator,
        sampler: StepSampler,
        rank: int = 0,
        prefetch: int = 0,
    ) -> None:
        if not 0 <= rank < sampler.world_size:
            raise ValueError(f"rank={rank} must be in 0..{sampler.world_size - 1}")
        if len(dataset) != len(sampler.tokens):
            raise ValueError(
                f"the sampler plans {len(sampler.tokens)} rows, the data set has {len(dataset)}; "
                "make the sampler from the lengths of this data set"
            )
        super().__init__(Position(0, 0), prefetch)
        self.dataset = dataset
        self.collator = collator
        self.sampler = sampler
        self.rank = rank

    @property
    def steps_per_epoch(self) -> int:
        """Count the optimizer steps of the first epoch."""
        return self.sampler.steps_per_epoch

    def steps_from(self, cursor: Position) -> Generator[tuple[StepBatch, Position], None, None]:
        """Build step after step, epoch after epoch, each with the position after it."""
        while True:
            epoch, step = cursor
            step_batch = self.build(epoch, step)
            # Epochs may differ in their number of steps, so each is asked for its own.
            last = step + 1 == self.sampler.steps_in(epoch)
            cursor = Position(epoch + 1, 0) if last else Position(epoch, step + 1)
            yield step_batch, cursor

    def build(self, epoch: int, step_in_epoch: int) -> StepBatch:
        """Build the batch of one step; the position stays as it is."""
        chosen = self.sampler.step_rows(epoch, step_in_epoch)
        # Read only the rows of this rank; the counts are those of all ranks.
        own = [rows[self.rank].tolist() for rows in chosen.micro_batches]
        return StepBatch(
            epoch,
            step_in_epoch,
            [self.collator(self.dataset.rows(rows), rows) for rows in own],
            chosen.target_divisor,
            chosen.num_rows,
            chosen.encoder_tokens,
            chosen.decoder_tokens,
            chosen.num_rows if self.sampler.unequal_rows else None,
        )

    def describe(self) -> str:
        """Say what a step is and how many an epoch has."""
        return f"{self.sampler.describe()}, {self.steps_per_epoch} steps an epoch"

    def state_dict(self) -> dict[str, Any]:
        """Save the position and the sampler's identity, ready for JSON; the same on every rank."""
        return {**self.position._asdict(), **self.sampler.identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was saved.

        Under `batching: rows` the ranks and grad_accum may differ, the rows of a step may not.
        Raises ValueError when seed, size of a step or data differ: the order would be another.
        """
        # Refuse before anything changes.
        check_identity(state, self.sampler.identity())
        epoch, step = int(state["epoch"]), int(state["step_in_epoch"])
        self._move_to(Position(epoch, step))


def check_identity(state: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raise ValueError for the first value of `identity` that differs in a saved state."""
    for name, value in identity.items():
        if state.get(name) != value:
            raise ValueError(
                f"cannot resume: {name} was {state.get(name)} and is {value}; the order of the "
                "rows would not be continued"
            )


def evaluation_batches(
    dataset: TokenRows,
    collator: VAECollator,
    rows_per_batch: int,
    limit: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[VAEBatch]:
    """Read a rank's share of the first rows, each once, in order.

    Ranks take contiguous shares that differ by at most one row, so they may have different numbers
    of batches: no collective may be called per batch.

    dataset: where the rows are read.
    collator: what packs the rows of a batch.
    rows_per_batch: rows of every batch but the last.
    limit: how many of the first rows all ranks share; None for all rows.
    rank, world_size: whose share.

    Raises ValueError for `rows_per_batch` below 1 and for a rank outside 0..world_size - 1.
    """
    if rows_per_batch < 1 or not 0 <= rank < world_size:
        raise ValueError(
            f"rows_per_batch={rows_per_batch} must be at least 1 and rank={rank} in "
            f"0..{world_size - 1}"
        )
    # Cut the rows into contiguous shares, then a share into batches.
    total = len(dataset) if limit is None else min(limit, len(dataset))
    start, stop = total * rank // world_size, total * (rank + 1) // world_size
    for first in range(start, stop, rows_per_batch):
        indices = range(first, min(first + rows_per_batch, stop))
        yield collator(dataset.rows(indices), list(indices))
