"""Step batches from a stream of records (`data.streaming`): nothing is prepared, nothing is stored.

Every rank reads and tokenises all records and keeps its share of the rows, balanced as for data on
disk: so all ranks know the lengths of a whole step without communication. Rows are shuffled inside
blocks of consecutive records, anew in each epoch. The order depends on the seed, the settings and
the sources alone, and is the same for any number of ranks with the same number of rows a step.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cdpvae.data.balance import balance_step
from cdpvae.data.collator import VAECollator
from cdpvae.data.loader import Loader, StepBatch, check_identity
from cdpvae.data.sampler import check_sizes, permutation
from cdpvae.preprocessing.records import StreamedRow
from cdpvae.preprocessing.streaming.records import BlockStart, RecordStream


@dataclass(frozen=True)
class StreamCursor:
    """The step after the last one handed out.

    epoch, step_in_epoch: numbers from 0. block: the block that the step's rows begin in.
    taken: how many rows of the shuffled block are used up.
    """

    epoch: int
    step_in_epoch: int
    block: BlockStart
    taken: int


class StreamLoader(Loader[StreamCursor]):
    """Builds this rank's step batches from a stream; an epoch's last, incomplete step is dropped.

    stream: where rows are read.
    collator: packs the rows of a micro-batch.
    rows_per_micro_batch: rows of a micro-batch on one rank.
    grad_accum: micro-batches of a step.
    world_size: number of ranks.
    seed: of the order of rows.
    rank: whose share is read, 0 to world_size - 1.
    prefetch: step batches built ahead in a background thread.

    A checkpoint holds the position in the sources and the keys of recent rows: a resumed run reads
    one block again. Raises ValueError for sizes below 1 and a rank that does not exist.
    """

    def __init__(
        self,
        stream: RecordStream,
        collator: VAECollator,
        *,
        rows_per_micro_batch: int,
        grad_accum: int,
        world_size: int,
        seed: int,
        rank: int,
        prefetch: int,
    ) -> None:
        check_sizes(
            rows_per_micro_batch=rows_per_micro_batch, grad_accum=grad_accum, world_size=world_size
        )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} must be in 0..{world_size - 1}")
        super().__init__(StreamCursor(0, 0, BlockStart.of_epoch(len(stream.sources)), 0), prefetch)
        self.stream, self.collator = stream, collator
        self.grad_accum, self.world_size, self.rank = grad_accum, world_size, rank
        self.rows_per_step = rows_per_micro_batch * grad_accum * world_size
        self.seed = seed
        self._sources = [source.identity() for source in stream.sources]

    def steps_from(
        self, cursor: StreamCursor
    ) -> Generator[tuple[StepBatch, StreamCursor], None, None]:
        """Build step after step, epoch after epoch, each with the cursor after it.

        Raises ValueError when an epoch has fewer rows than a step takes.
        """
        while True:
            # A step is held back until the next step shows whether the epoch goes on.
            held: tuple[list[StreamedRow], StreamCursor, StreamCursor] | None = None
            for rows, after in self._epoch_from(cursor):
                if held is not None:
                    yield self._step_batch(*held[:2]), held[2]
                held, cursor = (rows, cursor, after), after
            if held is None:
                raise ValueError(
                    f"streaming: an epoch {self.stream.describe()}; one optimizer step takes "
                    f"{self.rows_per_step} rows"
                )
            # The last step of an epoch is followed by the first step of the next.
            first = BlockStart.of_epoch(len(self.stream.sources))
            cursor = StreamCursor(cursor.epoch + 1, 0, first, 0)
            yield self._step_batch(*held[:2]), cursor

    @property
    def steps_per_epoch(self) -> None:
        """Return None: how long a stream is, only its end shows."""
        return None

    def describe(self) -> str:
        """Say in a few words where rows come from and what a step is."""
        names = ", ".join(source.name for source in self.stream.sources)
        duplicates = (
            "none removed"
            if self.stream.config.deduplication == "none"
            else f"exact ones among {self.stream.recent_keys} rows removed"
        )
        return f"{self.rows_per_step} rows a step, streamed from {names} (duplicates: {duplicates})"

    def summary(self) -> str:
        """Say how many of the records read so far gave rows, and why others did not."""
        return f"streaming {self.stream.describe()}"

    def state_dict(self) -> dict[str, Any]:
        """Save where the loader stands: numbers, strings and one tensor, equal on every rank."""
        cursor, block = self._cursor, self._cursor.block
        return {
            "epoch": cursor.epoch,
            "step_in_epoch": cursor.step_in_epoch,
            "taken": cursor.taken,
            "block": block.number,
            "read": list(block.read),
            "rows": block.rows,
            "recent": torch.from_numpy(block.recent.copy()),
            **self._identity(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was saved.

        Raises ValueError when sources, seed, tokenizer or sizes differ.
        """
        check_identity(state, self._identity())
        recent = state["recent"].numpy().astype(np.int64)
        block = BlockStart(state["block"], tuple(state["read"]), state["rows"], recent)
        self._move_to(StreamCursor(state["epoch"], state["step_in_epoch"], block, state["taken"]))

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "rows_per_step": self.rows_per_step,
            "sources": self._sources,
            "max_samples": self.stream.config.max_samples,
            "tokenizer": self.stream.wrapper.fingerprint(),
            "block_records": self.stream.block_records,
            "recent_keys": self.stream.recent_keys,
        }

    def _epoch_from(self, cursor: StreamCursor) -> Iterator[tuple[list[StreamedRow], StreamCursor]]:
        """Yield the rows of every step left in the epoch, each with the cursor after it."""
        # Rows of the step that is being filled; it may begin in one block and end in another.
        waiting: list[StreamedRow] = []
        step, taken = cursor.step_in_epoch, cursor.taken
        for start, rows in self.stream.blocks(cursor.block):
            # A block has its own order in every epoch, whatever was read before it.
            order = permutation(len(rows), self.seed, cursor.epoch, start.number)
            while taken < len(rows):
                end = taken + self.rows_per_step - len(waiting)
                waiting += [rows[i] for i in order[taken:end]]
                taken = min(end, len(rows))
                if len(waiting) == self.rows_per_step:
                    step += 1
                    yield waiting, StreamCursor(cursor.epoch, step, start, taken)
                    waiting = []
            taken = 0

    def _step_batch(self, rows: list[StreamedRow], cursor: StreamCursor) -> StepBatch:
        """Build this rank's share of the step at `cursor`. rows: those of all ranks."""
        # All ranks share the rows out in the same way, by the lengths of both sides.
        instructions = np.array([len(row.instruction_ids) for row in rows])
        responses = np.array([len(row.response_ids) for row in rows])
        parts = balance_step(instructions + responses, self.grad_accum, self.world_size)
        own = [[rows[i] for i in part[self.rank]] for part in parts]
        # Sums over all ranks divide the losses of the step.
        return StepBatch(
            cursor.epoch,
            cursor.step_in_epoch,
            [self.collator([r.columns for r in part], [r.index for r in part]) for part in own],
            int((responses - 1).sum()),
            len(rows),
            int(instructions.sum()),
            int(responses.sum()),
        )
