"""Which candidates a split must not part, and how many take part under `max_samples`."""

from __future__ import annotations

import networkx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdpvae.preprocessing.dedup.clusters import EXACT, KEPT, NEAR, Duplicates
from cdpvae.preprocessing.stages.deduplicate import (
    HELD_OUT,
    HELD_OUT_INSTRUCTION,
    Decisions,
    connected,
    hold_out,
)
from cdpvae.preprocessing.stages.max_samples import candidates_needed

LABELS = st.integers(1, 40).flatmap(
    lambda n: st.lists(
        st.lists(st.integers(0, 2**63), min_size=n, max_size=n), min_size=1, max_size=3
    )
)


@given(LABELS)
@settings(deadline=None)
def test_groups_are_the_connected_components(labellings):
    """Against a graph library: an edge where any labelling agrees."""
    graph = networkx.Graph()
    graph.add_nodes_from(range(len(labellings[0])))
    for labels in labellings:
        first: dict[int, int] = {}
        graph.add_edges_from((first.setdefault(label, i), i) for i, label in enumerate(labels))
    expected = [0] * len(graph)
    for component in networkx.connected_components(graph):
        for node in component:
            expected[node] = min(component)
    found = connected([np.array(labels, np.uint64) for labels in labellings])
    assert found.tolist() == expected


def test_long_chains_connect():
    """Labels that join neighbours only, in the least favourable order."""
    n = 5001
    pairs, shifted = np.arange(n) // 2, (np.arange(n) + 1) // 2
    assert not connected([pairs[::-1], shifted[::-1]]).any()


class Records:
    """Stands for the candidates: clusters grow as `links` (later, earlier) come into sight."""

    def __init__(self, links: list[tuple[int, int]], record_ids: list[int], shard: int) -> None:
        self.links, self.ids, self.shard, self.seen = links, np.array(record_ids), shard, 0

    def __len__(self) -> int:
        return self.seen

    def more(self) -> bool:
        grows = self.seen < len(self.ids)
        self.seen = min(self.seen + self.shard, len(self.ids))
        while 0 < self.seen < len(self.ids) and self.ids[self.seen] == self.ids[self.seen - 1]:
            self.seen += 1  # a record's pairs are in one shard
        return grows

    def record_ids(self) -> np.ndarray:
        return self.ids[: self.seen]

    def decide(self, _, count: int) -> Decisions:
        graph = networkx.Graph()
        graph.add_nodes_from(range(count))
        graph.add_edges_from(link for link in self.links if max(link) < count)
        keeper = np.zeros(count, np.int64)
        for component in networkx.connected_components(graph):
            keeper[list(component)] = min(component)
        return Decisions((keeper != np.arange(count)).astype(np.int8), keeper, keeper)


@st.composite
def records(draw) -> tuple[list[tuple[int, int]], list[int]]:
    n = draw(st.integers(1, 60))
    number = st.integers(0, n - 1)
    links = draw(st.lists(st.tuples(number, number), max_size=60))
    grows = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    return links, np.cumsum(grows).tolist()


@given(records(), st.integers(1, 30), st.integers(0, 20))
@settings(deadline=None)
def test_the_cut_keeps_just_enough_and_depends_on_no_shard(data, wanted, held_out_records):
    """Behind the records of a validation split, which are read before and are not counted."""
    links, ids = data
    held_out = int(np.searchsorted(ids, ids[0] + held_out_records))
    found = []
    for shard in (1, 7, 1000):
        stream = Records(links, ids, shard)
        while len(stream) <= held_out and stream.more():
            pass
        found.append(candidates_needed(wanted, stream, stream.decide, stream.more, held_out))
    assert len(set(found)) == 1, "the size of a shard leaves no trace"
    whole = Records(links, ids, 1000)
    whole.more()
    if found[0] is None:
        kept = whole.decide(whole, len(ids)).kept
        assert np.count_nonzero(kept >= held_out) < wanted
        return
    kept = whole.decide(whole, found[0]).kept
    kept = kept[kept >= held_out]
    assert len(kept) >= wanted
    last_record = ids[found[0] - 1]
    assert ids[kept[wanted - 1]] == last_record, "it ends with the record that completes the number"
    assert found[0] == len(ids) or ids[found[0]] != last_record, "and with all of that record"


@pytest.mark.parametrize("wanted", [1, 5, 400])
def test_not_everything_is_read_for_a_few(wanted):
    stream = Records([], list(range(10_000)), 100)
    assert candidates_needed(wanted, stream, stream.decide, stream.more) == wanted
    assert len(stream) <= wanted + 99


@pytest.mark.parametrize("held_out", [0, 1000])
def test_a_validation_split_costs_no_reading_ahead(held_out):
    stream = Records([], list(range(10_000)), 100)
    while len(stream) <= held_out:
        stream.more()
    needed = candidates_needed(5, stream, stream.decide, stream.more, held_out)
    assert needed == held_out + 5 and len(stream) == held_out + 100


def test_what_shares_a_group_with_a_validation_row_is_not_trained_on():
    """Worked out by hand: candidates 0 to 3 are of the validation split, the others of training.

    Of validation 2 repeats 0. Of all, 4 joins 0, 1 and 2. 5 has the instruction of 3, and 6 is near
    5. 7 and 8 are equal, 9 has the instruction of 7, which no validation row has. 10 has that of 2,
    which is no row.
    """
    keeper = np.array([0, 0, 0, 3, 0, 5, 5, 7, 7, 9, 10])
    kind = np.array([KEPT, NEAR, EXACT, KEPT, NEAR, KEPT, NEAR, KEPT, EXACT, KEPT, KEPT], np.int8)
    found = Duplicates(keeper, keeper, kind)
    first = np.array([0, 1, 0, 3])
    alone = Duplicates(first, first, np.array([KEPT, KEPT, EXACT, KEPT], np.int8))
    instruction_hash = np.array([10, 11, 12, 13, 14, 13, 15, 16, 16, 16, 12], np.uint64)
    decision, stays = hold_out(found, alone, instruction_hash)
    assert decision.tolist() == [
        KEPT, KEPT, EXACT, KEPT, HELD_OUT, HELD_OUT_INSTRUCTION, HELD_OUT_INSTRUCTION,
        KEPT, EXACT, KEPT, KEPT,
    ]  # fmt: skip
    assert stays.tolist() == [0, 1, 0, 3, 0, 3, 3, 7, 7, 9, 10]
    assert (decision[stays] == KEPT).all()
