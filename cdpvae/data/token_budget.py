"""`batching: tokens`: as many rows as fill a budget of tokens per micro-batch and rank.

An epoch's order is cut into steps whose rows fill FILL of the budgets of all micro-batches and
ranks. So a step is a random sample of rows, as under `batching: rows`. Inside it rows are grouped
by length: a micro-batch of long rows has few of them, one of short rows many, and attention, whose
cost is rows x longest row squared, pads little. In a global micro-batch every rank has the same
number of rows, because the losses gather them; their number differs between micro-batches.

A row costs its instruction, its response and its soft prompts: what passes through the backbone.
The augmented view, which some steps have, is not counted.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from cdpvae.data.balance import balance_rows
from cdpvae.data.sampler import StepSampler, check_sizes

# A step aims at this share of its capacity: what is left makes room for rows not to fit exactly.
FILL = 0.99
# Heaviest bin over mean, at which exchanging stops.
EVEN = 1.005


class TokenBudgetSampler(StepSampler):
    """Steps of grad_accum x world_size bins of at most `tokens_per_micro_batch` tokens.

    prompt_tokens: soft prompts a row costs beside its own tokens. Every row is in one step of an
    epoch, except, at its end, what does not give every rank the same number: fewer rows than
    ranks, or, where rows are so near the budget that bins hold one each, fewer than bins. The last
    two steps share what is left and may be half full; their number may differ by epoch.
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
    ) -> None:
        check_sizes(tokens_per_micro_batch=tokens_per_micro_batch)
        super().__init__(
            response_lengths,
            instruction_lengths,
            grad_accum=grad_accum,
            world_size=world_size,
            seed=seed,
        )
        self.budget = tokens_per_micro_batch
        self.prompt_tokens = prompt_tokens
        self.costs = self.tokens + prompt_tokens
        self._check()
        self._steps: tuple[int, list[tuple[np.ndarray, ...]]] = (-1, [])

    def _check(self) -> None:
        above = int((self.costs > self.budget).sum())
        if above:
            longest = int(self.costs.argmax())
            raise ValueError(
                f"tokens_per_micro_batch={self.budget}: {above} of {len(self.costs)} rows cost "
                f"more; the longest, row {longest}, has {self.instructions[longest]} instruction + "
                f"{self.responses[longest]} response + {self.prompt_tokens} prompt tokens; set at "
                f"least {self.costs[longest]}, or preprocess with lower max_*_tokens"
            )
        if len(self.costs) < self.grad_accum * self.world_size:
            raise ValueError(
                f"{len(self.costs)} rows do not give each of {self.grad_accum} micro-batches on "
                f"{self.world_size} ranks a row; lower gradient_accumulation_steps or give more"
            )

    def steps_in(self, epoch: int) -> int:
        return len(self._epoch(epoch))

    def micro_batches(self, epoch: int, step_in_epoch: int) -> tuple[np.ndarray, ...]:
        return tuple(even_ranks(self.costs, part) for part in self._epoch(epoch)[step_in_epoch])

    def describe(self) -> str:
        bins = self.grad_accum * self.world_size
        return f"{bins} micro-batches of at most {self.budget} tokens a step"

    def identity(self) -> dict[str, Any]:
        """Everything that moves the borders of steps."""
        return {
            "seed": self.seed,
            "tokens_per_micro_batch": self.budget,
            "prompt_tokens": self.prompt_tokens,
            "grad_accum": self.grad_accum,
            "world_size": self.world_size,
            "data": self.fingerprint(),
        }

    def _epoch(self, epoch: int) -> list[tuple[np.ndarray, ...]]:
        """All steps of an epoch, as `StepRows.micro_batches`."""
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
    """Consecutive steps over rows in their order: (start, parts as `pack_step` gives them).

    costs: (rows,) int64, none above `budget`.
    """
    bins = grad_accum * world_size
    target = FILL * budget * bins
    until = np.cumsum(costs)
    steps, start = [], 0
    while (remaining := len(costs) - start) >= bins:
        before = until[start] - costs[start]
        left = until[-1] - before
        # What makes two steps is shared evenly: no step of a handful of rows, and none left out.
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
    """The first rows, `wanted` of them or as many fewer as can be packed."""
    bins = grad_accum * world_size
    for attempt in itertools.count():
        count = max(wanted // world_size * world_size, bins)
        parts = pack_step(costs[:count], budget, grad_accum, world_size)
        if parts is not None:
            return parts
        # One row a bin always fits, so this ends; growing steps keep it short.
        wanted = count - world_size * (1 + attempt // 4)


def pack_step(
    costs: np.ndarray, budget: int, grad_accum: int, world_size: int
) -> list[np.ndarray] | None:
    """Positions 0..n-1 as grad_accum arrays (world_size, rows), longest rows first, or None.

    costs: (n,) int64, n a multiple of world_size and at least one row for each of the bins. No
    bin is above `budget`; None when exchanging rows does not get there. Deterministic.
    """
    order = np.argsort(-costs, kind="stable")
    sizes = _group_sizes(costs[order].reshape(-1, world_size).sum(1), grad_accum)
    bin_of = _assign_ranks(sizes, world_size)
    even = EVEN * costs.sum() / (grad_accum * world_size)
    if not _exchange(costs[order], bin_of, min(budget, even), budget):
        return None
    by_bin = order[np.argsort(bin_of, kind="stable")]
    groups = np.split(by_bin, np.cumsum(sizes * world_size)[:-1])
    return [group.reshape(world_size, -1) for group in groups]


def even_ranks(costs: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """(world_size, rows) positions, balanced anew where that makes the heaviest rank lighter."""
    rows = ranks.ravel()
    balanced = rows[np.array(balance_rows(costs[rows], len(ranks)))]
    lighter = costs[balanced].sum(1).max() < costs[ranks].sum(1).max()
    return balanced if lighter else ranks


def _group_sizes(costs: np.ndarray, groups: int) -> np.ndarray:
    """(groups,) how many consecutive units each takes, at least 1, for nearly equal sums.

    costs: (units,), falling, of rows that the ranks get one each of. Sums are rounded up from the
    front: a group of long rows that is too heavy can swap rows with one of short rows that is too
    light, and not the other way round.
    """
    sums = np.cumsum(costs)
    aims = sums[-1] * np.arange(1, groups) / groups
    cuts = [0]
    for number, cut in enumerate(np.searchsorted(sums, aims).tolist(), start=1):
        cuts.append(min(max(cut + 1, cuts[-1] + 1), len(costs) - groups + number))
    return np.diff([*cuts, len(costs)])


def _assign_ranks(sizes: np.ndarray, world_size: int) -> np.ndarray:
    """(rows,) bin of each row, sorted by cost: to and fro over the ranks of its group."""
    ranks = np.tile(np.arange(world_size), (int(sizes.sum()), 1))
    ranks[1::2] = ranks[1::2, ::-1]
    return (np.repeat(np.arange(len(sizes)), sizes)[:, None] * world_size + ranks).ravel()


def _exchange(costs: np.ndarray, bin_of: np.ndarray, enough: float, limit: float) -> bool:
    """Swap rows of the heaviest bin against others', in place, until no bin is above `enough`.

    -> whether all ended at or below `limit`.
    """
    sums = np.bincount(bin_of, weights=costs)
    for _ in range(4 * len(sums)):
        heavy = int(sums.argmax())
        if sums[heavy] <= enough:
            break
        mine = np.flatnonzero(bin_of == heavy)
        moved = costs[mine][:, None] - costs[None, :]
        worse = np.maximum(sums[heavy] - moved, sums[bin_of][None, :] + moved)
        worse[:, mine] = np.inf
        i, j = np.unravel_index(int(worse.argmin()), worse.shape)
        if worse[i, j] >= sums[heavy]:
            break
        other = bin_of[j]
        sums[heavy] -= moved[i, j]
        sums[other] += moved[i, j]
        bin_of[mine[i]], bin_of[j] = other, heavy
    return bool(sums.max() <= limit)
