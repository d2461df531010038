"""Split rows into groups of nearly equal token counts.

The rows of a step are split twice: into global micro-batches, then inside each over the ranks. The
first split sees only the rows and the size of a global micro-batch, so that two ranks of B rows and
one rank of 2B rows train on the same global micro-batches.

A first assignment is improved by exchanges: a row of the heaviest group against a lighter row of
another one. Which groups take part differs. `balance_rows` pairs the heaviest group with the
lightest; `token_budget.pack_step` tries all groups, because its bins have a limit and the lightest
bin may hold no row that fits. Both choose the pair of rows with `best_exchange`. The loops are not
merged: ties are broken by the order of the rows, and another order would change which row an older
run's checkpoint continues with.
"""

from __future__ import annotations

import numpy as np


def balance_step(tokens: np.ndarray, grad_accum: int, world_size: int) -> list[np.ndarray]:
    """Split the rows of a step into global micro-batches, each of them over the ranks.

    tokens: (n,) int64, n divisible by grad_accum x world_size.
    -> grad_accum arrays (world_size, rows) int64 of indices into `tokens`.
    """
    micro_batches = []
    # The sizes of the outer groups do not depend on the number of ranks, see above.
    for group in balance_rows(tokens, grad_accum):
        ranks = balance_rows(tokens[group], world_size)
        micro_batches.append(np.array([group[rank] for rank in ranks]))
    return micro_batches


def balance_rows(tokens: np.ndarray, groups: int) -> list[np.ndarray]:
    """Split rows into groups of the same size and nearly equal token sums.

    tokens: (n,) int64, n divisible by groups. -> one int64 array a group of indices into `tokens`,
    ascending. Deterministic.
    """
    if groups == 1:
        return [np.arange(len(tokens))]

    # Give every row, longest first, to the lightest group that has room.
    room = len(tokens) // groups
    members: list[list[int]] = [[] for _ in range(groups)]
    sums = [0] * groups
    for row in np.argsort(-tokens, kind="stable").tolist():
        lightest = min((g for g in range(groups) if len(members[g]) < room), key=sums.__getitem__)
        members[lightest].append(row)
        sums[lightest] += int(tokens[row])
    parts = [np.array(sorted(group)) for group in members]

    # Exchange rows of the heaviest and the lightest group as long as that narrows the gap. The
    # bound caps the time that an unlucky step takes.
    for _ in range(4 * groups):
        sums = [int(tokens[part].sum()) for part in parts]
        heavy, light = int(np.argmax(sums)), int(np.argmin(sums))
        pair = best_exchange(tokens, parts[heavy], sums[heavy], parts[light], sums[light])
        if pair is None:
            break
        i, j = pair
        parts[heavy][i], parts[light][j] = parts[light][j], parts[heavy][i]
    return [np.sort(part) for part in parts]


def best_exchange(
    costs: np.ndarray,
    heavy_rows: np.ndarray,
    heavy_sum: float,
    other_rows: np.ndarray,
    other_sums: np.ndarray | float,
) -> tuple[int, int] | None:
    """Choose the two rows whose exchange leaves the heavier of their two groups lightest.

    costs (n,): tokens of every row.
    heavy_rows (h,): rows of the heaviest group, as indices into `costs`.
    heavy_sum: the cost of that group.
    other_rows (o,): rows it may get in return, of one other group or of several.
    other_sums (o,): the cost of the group each of them is in; a number where it is one group.

    -> indices into `heavy_rows` and `other_rows`, of the first pair in their order among equals;
    None when no exchange makes the heaviest group lighter.
    """
    if not len(other_rows):
        return None
    # Every pair at once: what the heaviest group would lose, and the other one gain.
    moved = costs[heavy_rows][:, None] - costs[other_rows][None, :]
    heavier = np.maximum(heavy_sum - moved, other_sums + moved)
    i, j = np.unravel_index(int(heavier.argmin()), heavier.shape)
    return None if heavier[i, j] >= heavy_sum else (int(i), int(j))
