import numpy as np
import pytest

from cdpvae.data import TokenBudgetSampler
from cdpvae.data.token_budget import cut_steps, even_ranks
from support.rows import make_dataset, real_lengths

PROMPTS = 32


def make_sampler(
    lengths, budget=4096, accum=12, world=2, seed=0, instruction_passes=1
) -> TokenBudgetSampler:
    return TokenBudgetSampler(
        *lengths,
        tokens_per_micro_batch=budget,
        grad_accum=accum,
        world_size=world,
        seed=seed,
        prompt_tokens=PROMPTS,
        instruction_passes=instruction_passes,
    )


def epoch_of(sampler: TokenBudgetSampler, epoch: int = 0) -> list[tuple[np.ndarray, ...]]:
    return [sampler.step_rows(epoch, s).micro_batches for s in range(sampler.steps_in(epoch))]


def check_budget_and_order(sampler: TokenBudgetSampler, epoch: int = 0) -> np.ndarray:
    """The rows of an epoch, after the promises that hold for any lengths."""
    seen = []
    for parts in epoch_of(sampler, epoch):
        assert len(parts) == sampler.grad_accum
        for part in parts:
            assert part.shape[0] == sampler.world_size and part.shape[1] >= 1
            assert sampler.costs[part].sum(1).max() <= sampler.budget
            seen.append(part.ravel())
    seen = np.concatenate(seen)
    assert len(np.unique(seen)) == len(seen)
    return seen


# The ranks of one machine of the target, and of two; about 11, 23 and 46 rows a bin.
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("budget", [2048, 4096, 8192])
@pytest.mark.parametrize(
    "name", ["gsm8k_alpaca/gsm_8k_train.json", "gpteacher/codegen-instruct.json"]
)
def test_steps_of_real_lengths_are_97_percent_full(name, budget, world):
    """Every step but the last two of an epoch, which share what is left.

    The lengths come four times over, for several steps at the largest size.
    """
    lengths = [np.tile(side, 4) for side in real_lengths(name)]
    sampler = make_sampler(lengths, budget=budget, world=world)
    seen = check_budget_and_order(sampler)
    assert len(sampler.costs) - len(seen) < world
    fills = []
    for parts in epoch_of(sampler):
        sums = np.array([sampler.costs[part].sum(1) for part in parts])
        fills.append(sums.mean() / budget)
    assert len(fills) >= 4 and min(fills[:-2]) >= 0.97 and min(fills) >= 0.45


def test_a_micro_batch_holds_rows_of_similar_length():
    """Padded to the longest row, as attention does it, they grow by less than half as much."""
    sampler = make_sampler(real_lengths("gsm8k_alpaca/gsm_8k_train.json"))
    rng = np.random.default_rng(0)
    padded = mixed = total = 0
    for parts in epoch_of(sampler)[:-2]:
        # The same rows of the step in bins of the same sizes, but at random.
        rows = rng.permutation(np.concatenate([part.ravel() for part in parts]))
        at = 0
        for part in parts:
            random = rows[at : at + part.size].reshape(part.shape)
            at += part.size
            padded += (sampler.tokens[part].max(1) * part.shape[1]).sum()
            mixed += (sampler.tokens[random].max(1) * part.shape[1]).sum()
            total += sampler.tokens[part].sum()
    assert padded - total < 0.5 * (mixed - total)


def test_ranks_are_evened_out_and_never_made_heavier():
    costs = np.array([9, 8, 2, 1, 100])
    assert sorted(costs[even_ranks(costs, np.array([[0, 1], [2, 3]]))].sum(1)) == [10, 10]
    as_good = np.array([[0, 3], [1, 2]])
    assert even_ranks(costs, as_good) is as_good


def test_every_row_has_its_turn_in_an_order_that_the_seed_and_the_epoch_decide():
    dataset = make_dataset(101)
    lengths = dataset.response_lengths, dataset.instruction_lengths
    make = {seed: make_sampler(lengths, budget=400, accum=2, seed=seed) for seed in (0, 1)}
    orders = {(s, e): check_budget_and_order(make[s], e).tolist() for s in (0, 1) for e in (0, 1)}
    assert len({tuple(order) for order in orders.values()}) == 4
    for order in orders.values():
        assert len(order) == 100  # 101 rows on 2 ranks
    # The steps of one epoch are kept; asking for another first changes nothing.
    again = make_sampler(lengths, budget=400, accum=2, seed=0)
    again.step_rows(1, 0)
    assert check_budget_and_order(again, 0).tolist() == orders[0, 0]


@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([700] * 30, id="one_row_a_bin"),
        pytest.param([1000] * 5 + [10] * 400, id="a_row_as_long_as_the_budget_among_short_ones"),
        pytest.param([501] * 20 + [499] * 21, id="two_rows_a_bin_if_well_chosen"),
        pytest.param([3] * 7, id="less_than_a_step"),
        pytest.param([990, *[300] * 40, *[990] * 3], id="long_rows_at_the_end"),
    ],
)
# One rank has no exchange inside a micro-batch; 3 does not divide most counts.
@pytest.mark.parametrize("world", [1, 2, 3])
def test_hard_lengths_stay_below_the_budget(lengths, world):
    costs = np.array(lengths)
    steps = cut_steps(costs, 1000, 2, world)
    rows = np.concatenate([start + part.ravel() for start, parts in steps for part in parts])
    assert len(np.unique(rows)) == len(rows) and rows.max() < len(costs)
    assert len(costs) - len(rows) < 2 * world
    for start, parts in steps:
        assert len(parts) == 2
        for part in parts:
            assert len(part) == world and costs[start + part].sum(1).max() <= 1000


def test_a_row_above_the_budget_is_refused_with_the_numbers():
    lengths = np.array([50, 900, 40, 30]), np.array([10, 100, 10, 10])
    with pytest.raises(ValueError) as refused:
        make_sampler(lengths, budget=1000, accum=1, world=1)
    assert str(refused.value) == (
        "tokens_per_micro_batch=1000: 1 of 4 rows cost more; the longest, row 1, has 100 "
        "instruction + 900 response + 32 prompt tokens; set at least 1032, or preprocess with "
        "lower max_*_tokens"
    )
    assert make_sampler(lengths, budget=1032, accum=1, world=1).steps_in(0) >= 2
    # A decoder that reads the instruction as well: it counts once for each pass.
    with pytest.raises(ValueError, match=r"2 x 100 instruction .*; set at least 1132"):
        make_sampler(lengths, budget=1131, accum=1, world=1, instruction_passes=2)
    with pytest.raises(ValueError, match="4 rows do not give each of 3 micro-batches on 2 ranks"):
        make_sampler(lengths, budget=2000, accum=3, world=2)


def test_instructions_that_are_read_twice_are_budgeted_twice():
    """Steps hold fewer rows; no bin is above the budget in tokens that pass the backbone."""
    dataset = make_dataset(400)
    lengths = dataset.response_lengths, dataset.instruction_lengths
    once, twice = (make_sampler(lengths, 400, 2, 2, instruction_passes=n) for n in (1, 2))
    assert twice.steps_in(0) > once.steps_in(0)
    responses, instructions = (np.asarray(side, dtype=np.int64) for side in lengths)
    cost = responses + 2 * instructions + PROMPTS
    for parts in epoch_of(twice):
        assert all(cost[part].sum(1).max() <= 400 for part in parts)
    check_budget_and_order(twice)
    # What is counted of a step stays what it was; states of before have no key for one pass.
    rows = twice.step_rows(0, 0)
    chosen = np.concatenate([part.ravel() for part in rows.micro_batches])
    assert rows.encoder_tokens == instructions[chosen].sum()
    assert rows.target_divisor == (responses[chosen] - 1).sum()
    assert "instruction_passes" not in once.identity()
    assert twice.identity()["instruction_passes"] == 2
