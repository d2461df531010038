"""Split rows into groups of equal size and nearly equal token counts.

A step's rows are split twice: to its global micro-batches, then inside each to the ranks. The
first split sees only the rows and the size of a global micro-batch, so that two ranks of B rows and
one rank of 2B rows train on the same global micro-batches.
"""

from __future__ import annotations

import numpy as np


def balance_step(tokens: np.ndarray, grad_accum: int, world_size: int) -> list[np.ndarray]:
    """Positions 0..n-1 of a step as its global micro-batches, each (world_size, rows) int64.

    tokens: (n,) int64, n divisible by grad_accum x world_size.
    """
    micro_batches = []
    for group in balance_rows(tokens, grad_accum):
        ranks = balance_rows(tokens[group], world_size)
        micro_batches.append(np.array([group[rank] for rank in ranks]))
    return micro_batches


def balance_rows(tokens: np.ndarray, groups: int) -> list[np.ndarray]:
    """Positions 0..n-1 split into equally large groups of nearly equal token sums.

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
    # Each exchange narrows the gap; the bound only caps the time spent on unlucky steps.
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
