import itertools

import numpy as np
import pytest

from cdpvae.data import StepLoader, TokenBudgetSampler, VAECollator, evaluation_batches
from support.rows import described, make_dataset, make_sampler


def rows_loader(dataset, rank=0, batch=2, accum=3, world=2, seed=0, prefetch=0) -> StepLoader:
    sampler = make_sampler(dataset, batch, accum, world, seed)
    return StepLoader(dataset, VAECollator(), sampler, rank, prefetch)


def tokens_loader(dataset, rank=0, budget=150, accum=3, world=2, prefetch=0) -> StepLoader:
    sampler = TokenBudgetSampler(
        dataset.response_lengths,
        dataset.instruction_lengths,
        tokens_per_micro_batch=budget,
        grad_accum=accum,
        world_size=world,
        seed=0,
    )
    return StepLoader(dataset, VAECollator(), sampler, rank, prefetch)


MAKERS = {"rows": rows_loader, "tokens": tokens_loader}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_ranks_together_have_the_step_and_its_divisors(make):
    dataset = make_dataset(100)
    loaders = [make(dataset, rank) for rank in (0, 1)]
    for step_batches in zip(*(loader.epoch() for loader in loaders), strict=True):
        first = step_batches[0]
        batches = [batch for step_batch in step_batches for batch in step_batch.micro_batches]
        assert {step_batch.target_divisor for step_batch in step_batches} == {
            sum(batch.targets.numel() for batch in batches)
        }
        assert first.decoder_tokens == sum(batch.response.ids.numel() for batch in batches)
        assert first.encoder_tokens == sum(batch.instruction.ids.numel() for batch in batches)
        assert first.rows == sum(batch.num_rows for batch in batches)
        assert first.row_divisor == (first.rows if make is tokens_loader else None)
        for left, right in zip(
            step_batches[0].micro_batches, step_batches[1].micro_batches, strict=True
        ):
            assert left.num_rows == right.num_rows  # rows of all ranks can be gathered
        for batch in batches:
            for row, index in zip(batch.response.rows(), batch.sample_index, strict=True):
                assert row.tolist() == [index] * int(dataset.response_lengths[index])


# Without a thread, one step ahead, and further ahead than the shortest run before a stop.
@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_resume_in_mid_epoch_gives_the_identical_remainder(make, prefetch):
    dataset = make_dataset(100)
    whole = [described(s) for s in itertools.islice(make(dataset, rank=1), 20)]
    steps = make(dataset).steps_per_epoch
    assert [s[:2] for s in whole][steps - 1 : steps + 1] == [(0, steps - 1), (1, 0)]
    # The start, mid-epoch, the border of an epoch, mid second epoch.
    for stop in (0, 3, steps, steps + 2):
        loader = make(dataset, rank=1, prefetch=prefetch)
        before = [described(s) for s in itertools.islice(loader, stop)]
        state = loader.state_dict()
        loader.close()
        resumed = make(dataset, rank=1, prefetch=prefetch)
        resumed.load_state_dict(state)
        assert resumed.position == loader.position
        after = [described(s) for s in itertools.islice(resumed, 20 - stop)]
        resumed.close()
        assert before + after == whole


def test_a_loaded_state_counts_although_steps_were_built_ahead():
    dataset = make_dataset(100)
    loader = rows_loader(dataset, prefetch=2)
    step_batches = [described(s) for s in itertools.islice(loader, 4)]
    fresh = rows_loader(dataset)
    loader.load_state_dict(fresh.state_dict())
    assert [described(s) for s in itertools.islice(loader, 4)] == step_batches
    loader.close()


def test_an_epoch_ends_and_the_next_begins():
    loader = rows_loader(make_dataset(100), prefetch=2)
    assert [s.step_in_epoch for s in loader.epoch()] == list(range(8))
    assert loader.position == (1, 0)
    assert [s.epoch for s in loader.epoch()] == [1] * 8
    loader.close()


def test_resume_may_change_ranks_but_not_the_rows_of_a_step():
    dataset = make_dataset(100)
    loader = rows_loader(dataset)
    next(iter(loader))
    state = loader.state_dict()
    alone = rows_loader(dataset, batch=4, world=1)
    alone.load_state_dict(state)
    assert alone.position == (0, 1)
    for other, message in (
        (rows_loader(dataset, seed=1), "seed was 0 and is 1"),
        (rows_loader(dataset, accum=2), "rows_per_step was 12 and is 8"),
        (rows_loader(make_dataset(99)), "data was"),
        (tokens_loader(dataset), "tokens_per_micro_batch was None and is 150"),
    ):
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)
    state = tokens_loader(dataset).state_dict()
    with pytest.raises(ValueError, match="tokens_per_micro_batch was 150 and is 160"):
        tokens_loader(dataset, budget=160).load_state_dict(state)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"rank=2 must be in 0\.\.1"):
        rows_loader(make_dataset(12), rank=2)
    with pytest.raises(ValueError, match="prefetch=-1 must be at least 0"):
        rows_loader(make_dataset(12), prefetch=-1)
    sampler = rows_loader(make_dataset(12)).sampler
    with pytest.raises(ValueError, match="plans 12 rows, the data set has 11"):
        StepLoader(make_dataset(11), VAECollator(), sampler)


class Broken:
    """A data set with one row that cannot be read."""

    def __init__(self, dataset, bad: int) -> None:
        self.dataset, self.bad = dataset, bad

    def __len__(self) -> int:
        return len(self.dataset)

    def rows(self, indices):
        if self.bad in indices:
            raise OSError(f"row {self.bad} is unreadable")
        return self.dataset.rows(indices)


# The error arises in this thread and in the other one.
@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_comes_at_its_step_and_leaves_the_position(prefetch):
    dataset = make_dataset(100)
    loader = rows_loader(dataset, world=1, prefetch=prefetch)
    bad = int(loader.sampler.step_rows(0, 5).micro_batches[0][0, 0])
    broken = StepLoader(Broken(dataset, bad), VAECollator(), loader.sampler, 0, prefetch)
    read = []
    with pytest.raises(OSError, match="unreadable") as raised:
        for step_batch in broken:
            read.append(step_batch.step_in_epoch)
    assert read == [0, 1, 2, 3, 4] and broken.position == (0, 5)
    assert "rows" in [entry.name for entry in raised.traceback]  # where it happened
    broken.dataset = dataset  # and once the row can be read
    assert next(iter(broken)).step_in_epoch == 5
    broken.close()


# 20 rows do not divide by 3; no limit, no row, fewer and more than there are.
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("limit", [None, 0, 7, 50])
def test_evaluation_shows_every_row_once_in_order(world, limit):
    dataset = make_dataset(20)
    seen = []
    for rank in range(world):
        for batch in evaluation_batches(dataset, VAECollator(), 4, limit, rank, world):
            assert batch.num_rows <= 4
            assert [row[0].item() for row in batch.response.rows()] == batch.sample_index.tolist()
            seen += batch.sample_index.tolist()
    assert seen == list(range(20 if limit is None else min(limit, 20)))


def test_rows_are_read_once_for_each_step():
    """Building ahead is not building twice."""
    dataset, read = make_dataset(100), []

    class Counting(Broken):
        def rows(self, indices):
            read.extend(indices)
            return self.dataset.rows(indices)

    sampler = rows_loader(dataset, world=1).sampler
    loader = StepLoader(Counting(dataset, -1), VAECollator(), sampler, 0, prefetch=2)
    shown = [b.sample_index.tolist() for s in loader.epoch() for b in s.micro_batches]
    loader.close()
    shown = [index for batch in shown for index in batch]
    assert read[: len(shown)] == shown
    assert len(read) - len(shown) <= 2 * sampler.rows_per_step
    assert len(np.unique(shown)) == len(shown)
