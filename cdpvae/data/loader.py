"""Step batches, one for each optimizer step, from a position on that a checkpoint can keep.

`StepLoader` reads a data set of rows; `streaming.StreamLoader` has the same interface and reads
records as they come. Both can build step batches ahead in a background thread (`prefetch`), which
changes neither the batches nor the state: that always describes what was handed out.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from cdpvae.batch import VAEBatch
from cdpvae.data.collator import VAECollator
from cdpvae.data.prefetch import Prefetcher
from cdpvae.data.sampler import StepSampler


class TokenRows(Protocol):
    """`PreprocessedDataset`, `InstructionDataset`, or anything that reads like them."""

    def __len__(self) -> int: ...

    def rows(self, indices: Sequence[int]) -> list[dict[str, np.ndarray]]: ...


@dataclass
class StepBatch:
    """One optimizer step. micro_batches: this rank's; every count is that of all ranks.

    target_divisor: valid target tokens. encoder_tokens, decoder_tokens: instruction and response
    tokens (soft prompts not counted). row_divisor: `rows` where micro-batches differ in their
    number of rows, so that means over rows must be weighted; else None.
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
        return self.encoder_tokens + self.decoder_tokens


class Position(NamedTuple):
    """The step after the last one handed out."""

    epoch: int
    step_in_epoch: int


C = TypeVar("C")


class Loader(Generic[C]):
    """Hands out step batches from a cursor on.

    A subclass says what a cursor is and makes step batches from one on; it starts with `epoch` and
    `step_in_epoch` of the step after the last one handed out, so that a checkpoint taken after
    training on a step resumes with the next.

    prefetch: step batches built ahead in a background thread; 0 builds each when it is asked for.
    """

    def __init__(self, start: C, prefetch: int = 0) -> None:
        if prefetch < 0:
            raise ValueError(f"prefetch={prefetch} must be at least 0")
        self._prefetch = prefetch
        self._cursor = start
        self._ahead: Iterator[tuple[StepBatch, C]] | None = None

    def steps_from(self, cursor: C) -> Generator[tuple[StepBatch, C], None, None]:
        """Step after step, without end, each with the cursor behind it. Leaves `self` alone."""
        raise NotImplementedError

    def describe(self) -> str:
        """What a step and an epoch are, in a few words."""
        raise NotImplementedError

    def summary(self) -> str | None:
        """What became of the records read so far; None where preprocessing has told it."""
        return None

    @property
    def position(self) -> Position:
        return Position(self._cursor.epoch, self._cursor.step_in_epoch)

    def epoch(self) -> Iterator[StepBatch]:
        """The step batches left in this epoch; afterwards the position is the next epoch's."""
        current = self._cursor.epoch
        while self._cursor.epoch == current:
            yield self._next()

    def __iter__(self) -> Iterator[StepBatch]:
        """Epoch after epoch, without end."""
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
        try:
            step_batch, self._cursor = next(self._ahead)
        except BaseException:
            # What failed is built anew when it is asked for again.
            self.close()
            raise
        return step_batch

    def _move_to(self, cursor: C) -> None:
        self.close()
        self._cursor = cursor


class StepLoader(Loader[Position]):
    """This rank's share of the rows that `sampler` chooses, read from `dataset`."""

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
                f"the sampler plans {len(sampler.tokens)} rows, the data set has {len(dataset)}"
            )
        super().__init__(Position(0, 0), prefetch)
        self.dataset = dataset
        self.collator = collator
        self.sampler = sampler
        self.rank = rank

    @property
    def steps_per_epoch(self) -> int:
        return self.sampler.steps_per_epoch

    def steps_from(self, cursor: Position) -> Generator[tuple[StepBatch, Position], None, None]:
        while True:
            epoch, step = cursor
            step_batch = self.build(epoch, step)
            last = step + 1 == self.sampler.steps_in(epoch)
            cursor = Position(epoch + 1, 0) if last else Position(epoch, step + 1)
            yield step_batch, cursor

    def build(self, epoch: int, step_in_epoch: int) -> StepBatch:
        """One step of this rank; the state stays as it is."""
        step_rows = self.sampler.step_rows(epoch, step_in_epoch)
        own = [rows[self.rank] for rows in step_rows.micro_batches]
        return StepBatch(
            epoch,
            step_in_epoch,
            [self.collator(self.dataset.rows(rows.tolist()), rows) for rows in own],
            step_rows.target_divisor,
            step_rows.num_rows,
            step_rows.encoder_tokens,
            step_rows.decoder_tokens,
            step_rows.num_rows if self.sampler.unequal_rows else None,
        )

    def describe(self) -> str:
        return f"{self.sampler.describe()}, {self.steps_per_epoch} steps an epoch"

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready; the same on every rank."""
        return {**self.position._asdict(), **self.sampler.identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue there. Under `batching: rows` ranks and grad_accum may differ, rows of a step
        may not.

        Raises ValueError when seed, size of a step or data differ: the order would be another.
        """
        check_identity(state, self.sampler.identity())
        epoch, step = int(state["epoch"]), int(state["step_in_epoch"])
        self._move_to(Position(epoch, step))


def check_identity(state: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raise ValueError for the first value that a saved state has otherwise."""
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
