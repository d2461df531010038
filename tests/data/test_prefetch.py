import gc
import subprocess
import sys
import textwrap
import threading
import time
import weakref

import pytest

from cdpvae.data import RowCountSampler, StepLoader, VAECollator
from cdpvae.data.prefetch import Prefetcher
from support.rows import make_dataset


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "cdpvae-prefetch"]


def counting(made: list[int], end: int = 10**6):
    for number in range(end):
        made.append(number)
        yield number


def wait_until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.001)


def test_items_come_in_order_and_end():
    assert list(Prefetcher(counting([], 100), depth=3)) == list(range(100))


# The smallest depth, the default of training, and more than are taken.
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_no_more_than_depth_items_are_made_ahead(depth):
    made: list[int] = []
    items = Prefetcher(counting(made), depth)
    for taken in range(4):
        wait_until(lambda taken=taken: len(made) == taken + depth)
        time.sleep(0.02)  # time to run ahead, if nothing held it back
        assert len(made) == taken + depth
        assert next(items) == taken
    items.close()


def test_an_error_comes_after_the_items_before_it_with_its_traceback():
    def failing():
        yield 1
        yield 2
        raise ZeroDivisionError("in the source")

    items = Prefetcher(failing(), depth=5)
    assert [next(items), next(items)] == [1, 2]
    for _ in range(2):  # and again, instead of waiting for ever
        with pytest.raises(ZeroDivisionError, match="in the source") as raised:
            next(items)
        assert "failing" in [entry.name for entry in raised.traceback]


def test_closing_ends_the_thread_and_closes_the_source():
    closed = []

    def source():
        try:
            while True:
                yield 0
        finally:
            closed.append(threading.current_thread().name)

    items = Prefetcher(source(), depth=1)
    next(items)
    items.close()
    assert closed == ["cdpvae-prefetch"] and not threads()
    items.close()
    with pytest.raises(StopIteration):
        next(items)


def test_an_abandoned_prefetcher_is_collected_with_its_thread():
    items = Prefetcher(counting([]), depth=2)
    next(items)
    gone = weakref.ref(items)
    del items
    gc.collect()
    assert gone() is None and not threads()


def test_an_abandoned_loader_is_collected_with_its_thread():
    dataset = make_dataset(100)
    sampler = RowCountSampler(
        dataset.response_lengths,
        dataset.instruction_lengths,
        rows_per_micro_batch=2,
        grad_accum=3,
        world_size=1,
        seed=0,
    )
    loader = StepLoader(dataset, VAECollator(), sampler, prefetch=2)
    next(loader.epoch())
    del loader
    gc.collect()
    assert not threads()


SCRIPT = """
    import sys
    from cdpvae.data.prefetch import Prefetcher

    def forever():
        while True:
            yield [0] * 1000

    items = Prefetcher(forever(), depth=2)
    next(items)
    {end}
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [
        pytest.param("pass", 0, id="end_of_the_script"),
        pytest.param("sys.exit(3)", 3, id="exit"),
        pytest.param("raise KeyError('consumer')", 1, id="exception"),
    ],
)
def test_the_interpreter_ends_with_a_thread_at_work(end, code):
    script = textwrap.dedent(SCRIPT).format(end=end)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120)
    assert done.returncode == code, done.stderr.decode()


def test_depth_zero_is_refused():
    with pytest.raises(ValueError, match="depth=0 must be at least 1"):
        Prefetcher(counting([]), 0)
