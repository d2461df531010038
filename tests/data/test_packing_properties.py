"""Whatever the rows: packing, balancing and cutting never split, lose or duplicate a token."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cdpvae.data import VAECollator
from cdpvae.data.balance import balance_step
from cdpvae.data.dataset import TokenColumn
from cdpvae.data.token_budget import cut_steps

tokens = st.integers(0, 2**31 - 1)
row = st.lists(tokens, min_size=1, max_size=20)
rows = st.lists(st.tuples(row, row), min_size=1, max_size=12)
few = st.integers(1, 4)


@settings(deadline=None)
@given(rows)
def test_packed_rows_are_the_rows(pairs):
    batch = VAECollator()(
        [{"instruction_ids": i, "response_ids": np.array(r, np.int32)} for i, r in pairs],
        range(len(pairs)),
    )
    for side, packed in enumerate((batch.instruction, batch.response)):
        assert [row.tolist() for row in packed.rows()] == [list(pair[side]) for pair in pairs]
        assert packed.cu_seqlens[0] == 0 and packed.cu_seqlens[-1] == len(packed.ids)
    # Every token of a response but its first is predicted once, from the one before it.
    assert batch.targets.tolist() == [token for _, response in pairs for token in response[1:]]
    assert batch.response.ids[batch.target_positions].tolist() == [
        token for _, response in pairs for token in response[:-1]
    ]


@settings(deadline=None)
@given(rows)
def test_padded_rows_are_the_rows(pairs):
    batch = VAECollator()(
        [{"instruction_ids": i, "response_ids": r} for i, r in pairs], range(len(pairs))
    )
    padded = batch.to_padded(pad_id=0)
    for side, name in enumerate(("instruction", "response")):
        ids, mask = padded[f"{name}_ids"], padded[f"{name}_mask"].bool()
        assert [line[keep].tolist() for line, keep in zip(ids, mask, strict=True)] == [
            list(pair[side]) for pair in pairs
        ]


@settings(deadline=None)
@given(st.lists(st.lists(tokens, max_size=9), max_size=15))
def test_a_column_holds_its_rows(lists):
    column = TokenColumn.from_lists(lists)
    assert [column[i].tolist() for i in range(len(column))] == lists


@settings(deadline=None)
@given(few, few, few, st.data())
def test_balancing_gives_every_row_of_a_step_once(grad_accum, world_size, batch, data):
    count = grad_accum * world_size * batch
    lengths = data.draw(st.lists(st.integers(1, 2000), min_size=count, max_size=count))
    parts = balance_step(np.array(lengths), grad_accum, world_size)
    assert [part.shape for part in parts] == [(world_size, batch)] * grad_accum
    assert sorted(np.concatenate([part.ravel() for part in parts])) == list(range(count))


@settings(deadline=None)
@given(few, few, st.integers(1, 300), st.data())
def test_steps_of_a_budget_hold_every_row_at_most_once(grad_accum, world_size, budget, data):
    """Whole rows, in consecutive steps, none above the budget; what is left out is less than a
    row for each bin."""
    costs = np.array(data.draw(st.lists(st.integers(1, budget), max_size=120)), dtype=np.int64)
    bins = grad_accum * world_size
    at = 0
    for start, parts in cut_steps(costs, budget, grad_accum, world_size):
        assert start == at
        rows = np.concatenate([part.ravel() for part in parts])
        assert sorted(rows) == list(range(len(rows)))
        assert len(parts) == grad_accum
        for part in parts:
            assert part.shape[0] == world_size and part.shape[1] >= 1
            assert costs[start + part].sum(1).max() <= budget
        at += len(rows)
    assert 0 <= len(costs) - at < bins
