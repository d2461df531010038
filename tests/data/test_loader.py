import itertools

import numpy as np
import pytest

from cdpvae.data import VAECollator, WindowLoader, WindowSampler, evaluation_batches
from cdpvae.data.dataset import TokenColumn, _TokenDataset
from cdpvae.data.loader import deal


def make_dataset(rows: int) -> _TokenDataset:
    """Row i is filled with the token i, at lengths that vary."""
    rng = np.random.default_rng(rows)
    lengths = rng.integers(2, 40, (2, rows)).tolist()
    columns = [TokenColumn.from_lists([[i] * n for i, n in enumerate(side)]) for side in lengths]
    return _TokenDataset(*columns, "name", "fingerprint")


def make_sampler(dataset, batch=2, accum=3, world=2, seed=0) -> WindowSampler:
    return WindowSampler(
        dataset.response_lengths,
        dataset.instruction_lengths,
        rows_per_micro_batch=batch,
        grad_accum=accum,
        world_size=world,
        seed=seed,
    )


def make_loader(dataset, rank=0, **sizes) -> WindowLoader:
    return WindowLoader(dataset, VAECollator(), make_sampler(dataset, **sizes), rank)


def described(window) -> tuple:
    """Everything in a window, comparable."""
    batches = [
        (b.sample_index.tolist(), b.instruction.ids.tolist(), b.response.ids.tolist())
        for b in window.micro_batches
    ]
    return (window.epoch, window.step_in_epoch, window.target_divisor, window.tokens, batches)


def test_an_epoch_shows_each_row_at_most_once_and_drops_the_incomplete_window():
    dataset = make_dataset(100)
    sampler = make_sampler(dataset)
    assert sampler.window_rows == 12 and sampler.steps_per_epoch == 8
    for epoch in (0, 1):
        seen = np.concatenate([sampler.window(epoch, s).rows.ravel() for s in range(8)])
        assert len(set(seen.tolist())) == 96
        assert seen.tolist() == [*dict.fromkeys(seen.tolist())]
    assert set(sampler.order(0)) == set(sampler.order(1)) == set(range(100))


def test_order_depends_on_seed_and_epoch_alone():
    dataset = make_dataset(60)
    orders = {
        (seed, epoch): make_sampler(dataset, seed=seed).order(epoch).tolist()
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len({tuple(order) for order in orders.values()}) == 4
    sampler = make_sampler(dataset, seed=1)
    sampler.order(0), sampler.order(1)
    assert sampler.order(0).tolist() == orders[1, 0]


def test_order_is_pinned():
    # A run resumed under another numpy must go on in the same order.
    sampler = make_sampler(make_dataset(12), batch=1, accum=1, world=1)
    assert sampler.order(0).tolist() == [11, 3, 2, 1, 8, 6, 0, 7, 4, 10, 5, 9]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((4, 3, 2), (8, 3, 1)),  # 2 ranks x B rows and 1 rank x 2B rows
        ((2, 3, 4), (4, 3, 2)),  # more ranks
    ],
)
def test_global_micro_batches_do_not_depend_on_the_number_of_ranks(one, other):
    dataset = make_dataset(200)
    left, right = (
        make_sampler(dataset, batch=batch, accum=accum, world=world)
        for batch, accum, world in (one, other)
    )
    for step in range(left.steps_per_epoch):
        plans = left.window(0, step), right.window(0, step)
        groups = [[sorted(g.ravel().tolist()) for g in plan.rows] for plan in plans]
        assert groups[0] == groups[1]
        assert plans[0].target_divisor == plans[1].target_divisor


def test_ranks_together_have_the_window_and_its_divisor():
    dataset = make_dataset(100)
    loaders = [make_loader(dataset, rank) for rank in (0, 1)]
    for windows in zip(*(loader.epoch() for loader in loaders), strict=True):
        first = windows[0]
        batches = [batch for window in windows for batch in window.micro_batches]
        assert {window.target_divisor for window in windows} == {
            sum(batch.targets.numel() for batch in batches)
        }
        assert first.decoder_tokens == sum(batch.response.ids.numel() for batch in batches)
        assert first.encoder_tokens == sum(batch.instruction.ids.numel() for batch in batches)
        assert first.rows == sum(batch.num_rows for batch in batches) == 12
        for batch in batches:
            assert batch.num_rows == 2
            for row, index in zip(batch.response.rows(), batch.sample_index, strict=True):
                assert row.tolist() == [index] * int(dataset.response_lengths[index])


def test_resume_in_mid_epoch_gives_the_identical_remainder():
    dataset = make_dataset(100)
    whole = [described(w) for w in itertools.islice(make_loader(dataset, rank=1), 20)]
    assert [w[:2] for w in whole][6:10] == [(0, 6), (0, 7), (1, 0), (1, 1)]
    for stop in (0, 3, 8, 13):  # the start, mid-epoch, the border, mid second epoch
        loader = make_loader(dataset, rank=1)
        before = [described(w) for w in itertools.islice(loader, stop)]
        resumed = make_loader(dataset, rank=1)
        resumed.load_state_dict(loader.state_dict())
        after = [described(w) for w in itertools.islice(resumed, 20 - stop)]
        assert before + after == whole


def test_resume_may_change_ranks_but_not_the_rows_of_a_step():
    dataset = make_dataset(100)
    loader = make_loader(dataset)
    next(iter(loader))
    state = loader.state_dict()
    alone = make_loader(dataset, batch=4, world=1)
    alone.load_state_dict(state)
    assert alone.position == (0, 1)
    for other, message in (
        (make_loader(dataset, seed=1), "seed was 0 and is 1"),
        (make_loader(dataset, accum=2), "rows_per_step was 12 and is 8"),
        (make_loader(make_dataset(99)), "data was"),
    ):
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)


def test_ranks_carry_nearly_the_same_number_of_tokens():
    # Lognormal lengths cut at the filter's bounds: the shape of instruction data.
    rng = np.random.default_rng(0)
    responses = np.clip(rng.lognormal(5.3, 0.8, 6000), 20, 1024).astype(np.int64)
    instructions = np.clip(rng.lognormal(3.6, 0.8, 6000), 10, 512).astype(np.int64)
    sampler = WindowSampler(
        responses, instructions, rows_per_micro_batch=8, grad_accum=12, world_size=2, seed=0
    )
    tokens = responses + instructions
    sums = np.stack(
        [tokens[sampler.window(0, s).rows].sum(-1) for s in range(sampler.steps_per_epoch)]
    )  # (steps, grad_accum, world_size)
    spread = (sums.max(2) - sums.min(2)) / sums.mean(2)
    assert spread.mean() <= 0.03
    global_sums = sums.sum(2)
    assert ((global_sums.max(1) - global_sums.min(1)) / global_sums.mean(1)).mean() <= 0.03


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_deal_gives_every_position_once(groups):
    tokens = np.array([5, 5, 5, 1, 90, 7, 2, 2, 30, 31, 4, 4])
    parts = deal(tokens, groups)
    assert [len(part) for part in parts] == [12 // groups] * groups
    assert sorted(np.concatenate(parts).tolist()) == list(range(12))


def test_deal_exchanges_what_greedy_leaves_uneven():
    # Longest first gives 8+5+4 and 7+6+1; exchanging 8 and 7 evens them out (31 is odd).
    parts = deal(np.array([8, 7, 6, 5, 4, 1]), 2)
    sums = sorted(int(np.array([8, 7, 6, 5, 4, 1])[part].sum()) for part in parts)
    assert sums == [15, 16]


def test_impossible_sizes_are_refused_with_the_numbers():
    dataset = make_dataset(11)
    with pytest.raises(ValueError, match=r"11 rows do not fill .* 2 x 3 x 2 = 12 rows"):
        make_sampler(dataset)
    with pytest.raises(ValueError, match="grad_accum=0 must be at least 1"):
        make_sampler(dataset, accum=0)
    with pytest.raises(ValueError, match=r"rank=2 must be in 0\.\.1"):
        make_loader(make_dataset(12), rank=2)
    with pytest.raises(ValueError, match="have 1 steps"):
        make_sampler(make_dataset(12)).window(0, 1)
    with pytest.raises(ValueError, match="plans 12 rows, the data set has 11"):
        WindowLoader(dataset, VAECollator(), make_sampler(make_dataset(12)))


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
