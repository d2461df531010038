"""Choose as many rows as fill a budget of tokens per micro-batch and rank (`batching: tokens`).

An epoch's order is cut into steps whose rows fill FILL of the budgets of all micro-batches and
ranks. So a step is a random sample of rows, as under `batching: rows`. Inside it rows are grouped
by length: a micro-batch of long rows has few of them, one of short rows many, and attention, whose
cost is rows x longest row squared, pads little. In a global micro-batch every rank has the same
number of rows, because the losses gather them; their number differs between micro-batches.

A *bin* is what one rank gets of one global micro-batch: a step has grad_accum x world_size of them.
A row costs its instruction, as often as the backbone reads it, its response and its soft prompts.
The augmented view, which some steps have, is not counted.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cdpvae.data.balance import balance_rows, best_exchange
from cdpvae.data.sampler import StepSampler, check_sizes

# A step aims at this share of its capacity. The rest is left because rows do not fill it exactly.
FILL = 0.99
# Exchanging rows stops when the heaviest bin has at most this many times the mean.
EVEN = 1.005


class TokenBudgetSampler(StepSampler):
    """Fill grad_accum x world_size bins of at most `tokens_per_micro_batch` tokens a step.

    Every row is in one step of an epoch, except, at its end, rows that do not give every rank the
    same number: fewer rows than ranks, or, where rows are so near the budget that bins hold one
    row each, fewer rows than bins. The last two steps share what is left and may be half full.
    The number of steps may differ by epoch.

    response_lengths, instruction_lengths (rows,): tokens of each row.
    tokens_per_micro_batch: the budget of a bin.
    grad_accum: micro-batches of a rank and step.
    world_size: ranks.
    seed: of the order.
    prompt_tokens: soft prompts that a row costs beside its own tokens.
    instruction_passes: how often the backbone reads a row's instruction.

    Raises ValueError for a row above the budget and for fewer rows than bins.
    """

    unequal_rows = True

    def __init__(
        self,
        response_lengths: np.ndarray,
        instruction_lengths: np.ndarray,
        *,
        tokens_per_micro_batch: int,
        grad_accum: int,
        world_size: int,
        seed: int,
        prompt_tokens: int = 0,
        instruction_passes: int = 1,
    ) -> None:
        check_sizes(tokens_per_micro_batch=tokens_per_micro_batch)
        super().__init__(
            response_lengths,
            instruction_lengths,
            grad_accum=grad_accum,
            world_size=world_size,
            seed=seed,
            instruction_passes=instruction_passes,
        )
        # Check all rows at once, before any weight is loaded.
        self.budget = tokens_per_micro_batch
        self.prompt_tokens = prompt_tokens
        self.costs = self.tokens + prompt_tokens
        self._check()
        # The steps of one epoch, cut when they are first asked for.
        self._steps: tuple[int, list[tuple[np.ndarray, ...]]] = (-1, [])

    def _check(self) -> None:
        """Raise ValueError for a row above the budget and for fewer rows than bins."""
        # A row that no bin holds cannot be trained on; say which and how long it is.
        above = int((self.costs > self.budget).sum())
        if above:
            longest = int(self.costs.argmax())
            times = "" if self.instruction_passes == 1 else f"{self.instruction_passes} x "
            raise ValueError(
                f"tokens_per_micro_batch={self.budget}: {above} of {len(self.costs)} rows cost "
                f"more; the longest, row {longest}, has "
                f"{times}{self.instructions[longest]} instruction + {self.responses[longest]} "
                f"response + {self.prompt_tokens} prompt tokens; set at least "
                f"{self.costs[longest]}, or preprocess with lower max_*_tokens"
            )
        # Every rank needs a row in every micro-batch, or gathering would wait for it.
        if len(self.costs) < self.grad_accum * self.world_size:
            raise ValueError(
                f"{len(self.costs)} rows do not give each of {self.grad_accum} micro-batches on "
                f"{self.world_size} ranks a row; lower gradient_accumulation_steps or give more"
            )

    def steps_in(self, epoch: int) -> int:
        """Count the optimizer steps of an epoch."""
        return len(self._epoch(epoch))

    def micro_batches(self, epoch: int, step_in_epoch: int) -> tuple[np.ndarray, ...]:
        """Take the rows of one step, balanced over the ranks of each micro-batch."""
        return tuple(even_ranks(self.costs, part) for part in self._epoch(epoch)[step_in_epoch])

    def describe(self) -> str:
        """Say how many micro-batches a step has, and their budget."""
        bins = self.grad_accum * self.world_size
        return f"{bins} micro-batches of at most {self.budget} tokens a step"

    def identity(self) -> dict[str, Any]:
        """Collect everything that moves the borders of steps."""
        # grad_accum and ranks are among them: other bins hold other rows. States that know nothing
        # of passes have one.
        twice = {"instruction_passes": self.instruction_passes}
        return {
            "seed": self.seed,
            "tokens_per_micro_batch": self.budget,
            "prompt_tokens": self.prompt_tokens,
            "grad_accum": self.grad_accum,
            "world_size": self.world_size,
            "data": self.fingerprint(),
            **({} if self.instruction_passes == 1 else twice),
        }

    def _epoch(self, epoch: int) -> list[tuple[np.ndarray, ...]]:
        """Cut all steps of an epoch into `StepRows.micro_batches`, once for consecutive calls."""
        cached, steps = self._steps
        if epoch != cached:
            order = self.order(epoch)
            cut = cut_steps(self.costs[order], self.budget, self.grad_accum, self.world_size)
            steps = [tuple(order[start + part] for part in parts) for start, parts in cut]
            self._steps = (epoch, steps)
        return steps


def cut_steps(
    costs: np.ndarray, budget: int, grad_accum: int, world_size: int
) -> list[tuple[int, list[np.ndarray]]]:
    """Cut rows in their order into consecutive steps, as long as every bin gets a row.

    costs (rows,): int64, no row above `budget`.
    budget: the largest sum of a bin.
    grad_accum, world_size: their product is the number of bins a step.

    -> for each step its first row and what `pack_step` makes of the rows from there on.
    """
    bins = grad_accum * world_size
    target = FILL * budget * bins
    # `until[i]` is what rows 0..i cost together.
    until = np.cumsum(costs)
    steps, start = [], 0
    while (remaining := len(costs) - start) >= bins:
        before = until[start] - costs[start]
        left = until[-1] - before
        # Share evenly what two steps can hold, so that no step has a handful of rows and no row is
        # left out. A full step that would leave too few rows for another one is halved as well.
        for aim in [left / 2] if target < left <= 2 * target else [target, left / 2]:
            wanted = int(np.searchsorted(until, before + aim, side="right")) - start
            parts = _first_step(costs[start:], wanted, budget, grad_accum, world_size)
            count = sum(part.size for part in parts)
            if not world_size <= remaining - count < bins:
                break
        steps.append((start, parts))
        start += count
    return steps


def _first_step(
    costs: np.ndarray, wanted: int, budget: int, grad_accum: int, world_size: int
) -> list[np.ndarray]:
    """Pack the first `wanted` rows, or as many fewer as fit.

    costs (rows,): int64, no row above `budget`.
    wanted: rows to begin with.
    budget, grad_accum, world_size: as in `cut_steps`.

    -> as `pack_step`.
    """
    bins = grad_accum * world_size
    attempt = 0
    while True:
        count = max(wanted // world_size * world_size, bins)
        parts = pack_step(costs[:count], budget, grad_accum, world_size)
        if parts is not None:
            return parts
        # Try again with fewer rows. One row a bin always fits, so this ends; taking away more rows
        # after every fourth attempt keeps it short.
        wanted = count - world_size * (1 + attempt // 4)
        attempt += 1


def pack_step(
    costs: np.ndarray, budget: int, grad_accum: int, world_size: int
) -> list[np.ndarray] | None:
    """Split the rows of a step into bins, none above `budget`. Deterministic.

    costs (n,): int64, n a multiple of world_size and at least the number of bins.
    budget: the largest sum of a bin.
    grad_accum, world_size: their product is the number of bins.

    -> grad_accum arrays (world_size, rows) of indices into `costs`, longest rows first; None when
    exchanging rows leaves a bin above the budget.
    """
    # Sort by length, cut into micro-batches of nearly equal cost, and share each over the ranks.
    order = np.argsort(-costs, kind="stable")
    sizes = _group_sizes(costs[order].reshape(-1, world_size).sum(1), grad_accum)
    bin_of = _assign_ranks(sizes, world_size)
    # Exchange rows until the bins are within the budget and nearly even.
    even = EVEN * costs.sum() / (grad_accum * world_size)
    if not _even_out(costs[order], bin_of, min(budget, even), budget):
        return None
    # Collect the rows of each bin.
    by_bin = order[np.argsort(bin_of, kind="stable")]
    groups = np.split(by_bin, np.cumsum(sizes * world_size)[:-1])
    return [group.reshape(world_size, -1) for group in groups]


def even_ranks(costs: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Balance the rows of a micro-batch over its ranks, where that makes the heaviest lighter.

    ranks: (world_size, rows) indices into `costs`. -> the same rows in the same shape.
    """
    # Packing evened out all bins of the step at once; a second look at one micro-batch may help.
    rows = ranks.ravel()
    balanced = rows[np.array(balance_rows(costs[rows], len(ranks)))]
    lighter = costs[balanced].sum(1).max() < costs[ranks].sum(1).max()
    return balanced if lighter else ranks


def _group_sizes(costs: np.ndarray, groups: int) -> np.ndarray:
    """Cut units into consecutive groups of at least one unit and nearly equal sums.

    A unit is world_size rows of similar length, one for each rank. Sums are rounded up from the
    front: a group of long rows that is too heavy can exchange rows with one of short rows that is
    too light, and not the other way round.

    costs: (units,), falling. -> (groups,) units of each group.
    """
    # Cut after the unit that reaches each group's share, but leave a unit for every group.
    sums = np.cumsum(costs)
    aims = sums[-1] * np.arange(1, groups) / groups
    cuts = [0]
    for number, cut in enumerate(np.searchsorted(sums, aims).tolist(), start=1):
        cuts.append(min(max(cut + 1, cuts[-1] + 1), len(costs) - groups + number))
    return np.diff([*cuts, len(costs)])


def _assign_ranks(sizes: np.ndarray, world_size: int) -> np.ndarray:
    """Give the rows of each group, sorted by cost, to its ranks, to and fro.

    sizes: (groups,) units of each group. -> (rows,) the bin of each row.
    """
    # To and fro, so that no rank always gets the longest row of a unit.
    ranks = np.tile(np.arange(world_size), (int(sizes.sum()), 1))
    ranks[1::2] = ranks[1::2, ::-1]
    return (np.repeat(np.arange(len(sizes)), sizes)[:, None] * world_size + ranks).ravel()


def _even_out(costs: np.ndarray, bin_of: np.ndarray, enough: float, limit: float) -> bool:
    """Exchange rows of the heaviest bin for others', until no bin is above `enough`.

    costs (rows,): tokens of every row.
    bin_of (rows,): the bin of every row; changed in place.
    enough: a sum at which exchanging stops.
    limit: the largest sum that is allowed.

    -> whether every bin ended at or below `limit`.
    """
    sums = np.bincount(bin_of, weights=costs)
    # The bound caps the time that an unlucky step takes.
    for _ in range(4 * len(sums)):
        heavy = int(sums.argmax())
        if sums[heavy] <= enough:
            break
        mine, others = np.flatnonzero(bin_of == heavy), np.flatnonzero(bin_of != heavy)
        pair = best_exchange(costs, mine, sums[heavy], others, sums[bin_of[others]])
        if pair is None:
            break
        # Move both rows, and what they cost.
        given, taken = mine[pair[0]], others[pair[1]]
        other = bin_of[taken]
        moved = costs[given] - costs[taken]
        sums[heavy] -= moved
        sums[other] += moved
        bin_of[given], bin_of[taken] = other, heavy
    return bool(sums.max() <= limit)
