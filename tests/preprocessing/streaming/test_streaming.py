import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cdpvae.config import DataConfig
from cdpvae.data import VAECollator
from cdpvae.preprocessing.readers.source import Source
from cdpvae.preprocessing.records import RawRecord
from cdpvae.preprocessing.streaming import records as record_stream_module
from cdpvae.preprocessing.streaming.loader import StreamLoader
from cdpvae.preprocessing.streaming.records import RecordStream
from support.rows import described

# What judges real text is off; the records are made up.
SETTINGS = {
    "language_filter": False,
    "quality_filter": False,
    "min_instruction_tokens": 3,
    "min_response_tokens": 3,
}


def records(count: int, name: str) -> list[dict[str, str]]:
    return [
        {
            "instruction": f"Tell me of {name} {i}",
            "output": f"It is number {i} {'again ' * (i % 7)}",
        }
        for i in range(count)
    ]


@pytest.fixture
def sources(write_records) -> list[Source]:
    """41 and 19 records, so that one source ends long before the other."""
    files = (write_records(f"{n}.jsonl", records(c, n)) for n, c in (("left", 41), ("right", 19)))
    return [Source.parse(path) for path in files]


@pytest.fixture
def make_loader(wrapper, sources):
    def make(rank=0, world=2, batch=2, prefetch=0, seed=0, block=16, recent=1000, **changes):
        from_sources = changes.pop("sources", sources)
        config = DataConfig(**{**SETTINGS, **changes})
        stream = RecordStream(from_sources, config, wrapper, block, recent)
        return StreamLoader(
            stream,
            VAECollator(),
            rows_per_micro_batch=batch,
            grad_accum=2,
            world_size=world,
            seed=seed,
            rank=rank,
            prefetch=prefetch,
        )

    return make


def texts(loader, step_batches) -> list[str]:
    wrapper = loader.stream.wrapper
    return [
        wrapper.decode(row.tolist())
        for step_batch in step_batches
        for batch in step_batch.micro_batches
        for row in batch.instruction.rows()
    ]


def test_an_epoch_has_every_record_once_but_the_incomplete_step(make_loader):
    loader = make_loader(world=1, batch=3)
    step_batches = list(loader.epoch())
    assert [s.step_in_epoch for s in step_batches] == list(range(10)) and loader.position == (1, 0)
    found = texts(loader, step_batches)
    every = [f"Tell me of {n} {i}" for n, c in (("left", 41), ("right", 19)) for i in range(c)]
    assert sorted(found) == sorted(every)  # 60 rows are 10 steps of 6
    assert found != every
    assert len(list(make_loader(world=1, batch=4).epoch())) == 7  # and 4 rows left out
    assert loader.steps_per_epoch is None  # a stream does not know before its end


def test_rows_are_shuffled_inside_blocks_and_sources_take_turns(make_loader):
    # Steps of 8 rows, blocks of 16 records.
    step_batches = list(make_loader(world=1, batch=4).epoch())
    index = [i for s in step_batches for b in s.micro_batches for i in b.sample_index.tolist()]
    for block in range(3):
        assert sorted(index[16 * block : 16 * block + 16]) == list(
            range(16 * block, 16 * block + 16)
        )
    loader = make_loader(world=1, batch=4)
    first = texts(loader, itertools.islice(loader, 2))
    assert sum("left" in text for text in first) == sum("right" in text for text in first) == 8


def test_epochs_and_seeds_have_their_own_order(make_loader):
    def order(seed: int, epoch: int) -> list[int]:
        step_batches = itertools.islice(
            make_loader(world=1, seed=seed), 15 * epoch, 15 * epoch + 15
        )
        return [i for s in step_batches for b in s.micro_batches for i in b.sample_index.tolist()]

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(one) == list(range(60)) for one in orders)
    assert len({tuple(one) for one in orders}) == 4
    assert order(1, 1) == orders[3]


def test_ranks_share_each_step(make_loader):
    alone = list(make_loader(world=1, batch=4).epoch())
    shared = [list(make_loader(rank=rank).epoch()) for rank in (0, 1)]
    for whole, *parts in zip(alone, *shared, strict=True):
        assert {part.target_divisor for part in parts} == {whole.target_divisor}
        assert whole.target_divisor == sum(b.targets.numel() for b in whole.micro_batches)
        for number, batch in enumerate(whole.micro_batches):
            together = [p.micro_batches[number].sample_index.tolist() for p in parts]
            assert [len(rows) for rows in together] == [2, 2]
            assert sorted(sum(together, [])) == sorted(batch.sample_index.tolist())


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_resumed_stream_continues_bit_for_bit(make_loader, prefetch, tmp_path):
    """At every step of an epoch, across blocks and into the next epoch; through a file."""
    whole = [described(s) for s in itertools.islice(make_loader(rank=1), 17)]
    assert [s[:2] for s in whole][6:8] == [(0, 6), (1, 0)]
    for stop in range(1, 10):
        loader = make_loader(rank=1, prefetch=prefetch)
        before = [described(s) for s in itertools.islice(loader, stop)]
        torch.save(loader.state_dict(), tmp_path / "state.pt")
        loader.close()
        resumed = make_loader(rank=1, prefetch=prefetch)
        resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        after = [described(s) for s in itertools.islice(resumed, 17 - stop)]
        resumed.close()
        assert before + after == whole, stop


def test_resuming_reads_no_record_before_the_block(make_loader, sources, monkeypatch):
    loader = make_loader()
    list(itertools.islice(loader, 5))  # 40 rows: in the third block of 16 records
    state, starts = loader.state_dict(), []
    records = Source.records
    monkeypatch.setattr(
        Source, "records", lambda self, start=0: starts.append(start) or records(self, start)
    )
    resumed = make_loader()
    resumed.load_state_dict(state)
    next(iter(resumed))
    assert starts == state["read"] and sum(starts) == 32


def test_duplicates_of_recent_rows_are_dropped_also_after_a_resume(make_loader, write_records):
    once = records(20, "row")
    path = write_records("twice.jsonl", once + once)
    twice = {"sources": [Source.parse(path)], "world": 1, "batch": 1, "block": 8}
    loader = make_loader(**twice)
    whole = [described(s) for s in loader.epoch()]
    assert len(texts(loader, make_loader(**twice).epoch())) == 20
    assert loader.stream.counts.duplicates == {"exact duplicate of a recent row": 20}
    # A memory of recent rows that ends before the repeats does not see them.
    assert len(list(make_loader(**twice, recent=19).epoch())) == 20
    assert len(list(make_loader(**twice, deduplication="none").epoch())) == 20
    before = make_loader(**twice)
    first = [described(s) for s in itertools.islice(before, 9)]
    resumed = make_loader(**twice)
    resumed.load_state_dict(before.state_dict())
    assert first + [described(s) for s in resumed.epoch()] == whole


def test_what_is_not_used_is_counted_by_its_reason(make_loader, write_records, tmp_path):
    path = Path(write_records("mixed.jsonl", records(12, "row")))
    extra = [
        {"title": "no pair"},
        {"instruction": "a", "output": "b"},
        {"instruction": "Tell me of one", "output": "It is held back", "split": "validation"},
    ]
    lines = ["{not json", *(json.dumps(record) for record in extra)]
    path.write_text(path.read_text() + "\n".join(lines) + "\n")
    loader = make_loader(sources=[Source.parse(str(path))], world=1)
    assert len(list(loader.epoch())) == 3
    counts = loader.stream.counts
    assert (counts.read, counts.converted, counts.pairs, counts.kept) == (16, 14, 14, 12)
    assert sum(counts.not_converted.values()) == 2
    assert counts.filtered["declared for validation"] == 1 and sum(counts.filtered.values()) == 2
    assert "gave 12 rows from 16 records" in loader.summary()
    assert "declared for validation: 1" in loader.summary()


def test_conversations_give_all_their_exchanges(make_loader, write_records):
    turns = [
        {"from": who, "value": f"{text} number {n}"}
        for n in range(8)
        for who, text in (("human", "Tell me of"), ("gpt", "It is"))
    ]
    path = write_records("talk.jsonl", [{"conversations": turns}])
    loader = make_loader(sources=[Source.parse(path)], world=1, turns="all")
    assert sorted(texts(loader, loader.epoch())) == [f"Tell me of number {n}" for n in range(8)]


def test_max_samples_ends_the_epoch(make_loader):
    loader = make_loader(world=1, max_samples=21)
    index = [i for s in loader.epoch() for b in s.micro_batches for i in b.sample_index.tolist()]
    assert len(index) == 20 and max(index) <= 20 and loader.position == (1, 0)


def test_nothing_usable_is_an_error_with_the_reasons(make_loader, write_records):
    path = write_records("other.jsonl", [{"title": "no pair"}] * 20)
    with pytest.raises(ValueError, match="the first 16 records gave 0 rows .*unknown format: 16"):
        next(iter(make_loader(sources=[Source.parse(path)])))
    path = write_records("few.jsonl", records(7, "row"))
    with pytest.raises(ValueError, match="gave 7 rows from 7 records; one .* takes 8 rows"):
        next(iter(make_loader(sources=[Source.parse(path)])))


def test_another_stream_is_not_continued(make_loader, sources):
    loader = make_loader()
    next(iter(loader))
    state = loader.state_dict()
    for other, message in (
        (make_loader(seed=1), "seed was 0 and is 1"),
        (make_loader(batch=4), "rows_per_step was 8 and is 16"),
        (make_loader(sources=sources[::-1]), "sources was"),
        (make_loader(max_samples=9), "max_samples was None and is 9"),
    ):
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)


class Flaky(Source):
    """A hub that stops answering after every fourth record, and never at the same record again."""

    stops: list[int] = []

    def records(self, start: int = 0):
        for position in range(start, 40):
            if position % 4 == 3 and position not in self.stops:
                self.stops.append(position)
                raise ValueError(f"hub data set {self.name}: stopped after row {position}")
            yield RawRecord(records(40, "row")[position])


def test_the_hub_is_asked_again_where_it_stopped(make_loader, monkeypatch):
    waited: list[float] = []
    monkeypatch.setattr(record_stream_module.time, "sleep", waited.append)
    monkeypatch.setattr(Flaky, "stops", [])
    loader = make_loader(sources=[Flaky("owner/name", None)], world=1)
    rows = [i for s in loader.epoch() for b in s.micro_batches for i in b.sample_index.tolist()]
    assert sorted(rows) == list(range(40))
    assert waited == [1] * 10
    # One that never answers is an error in the end.
    monkeypatch.setattr(Flaky, "records", lambda self, start=0: Flaky._never(self), raising=False)
    monkeypatch.setattr(Flaky, "_never", _never, raising=False)
    with pytest.raises(ValueError, match="cannot be loaded"):
        next(iter(make_loader(sources=[Flaky("owner/name", None)])))
    assert waited[10:] == [1, 5, 25, 125]


def _never(self):
    raise ValueError(f"hub data set {self.name}: cannot be loaded")
    yield


def test_a_file_that_cannot_be_read_stops_at_once(make_loader, tmp_path):
    path = tmp_path / "array.json"
    path.write_text('{"a": 1}{"b"')
    with pytest.raises(ValueError, match="array.json|unknown format|not valid"):
        next(iter(make_loader(sources=[Source.parse(str(path))])))


def test_rows_are_those_of_preprocessing(make_loader, wrapper):
    """Ids as `LlamaTokenizerWrapper` makes them, int32, untruncated."""
    loader = make_loader(world=1)
    batch = next(iter(loader)).micro_batches[0]
    number = int(batch.sample_index[0])
    name, count = ("left", "right")[number % 2], number // 2
    expected = records(41, name)[count]
    assert batch.instruction.rows()[0].tolist() == wrapper.encode_instruction(
        expected["instruction"]
    )
    assert batch.response.rows()[0].tolist() == wrapper.encode_response(expected["output"])
    assert np.asarray(batch.sample_index).dtype == np.int64
