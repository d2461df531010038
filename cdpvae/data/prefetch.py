"""Work done ahead of its consumer, in a background thread.

The thread is a daemon that is told to stop, and waited for, when the `Prefetcher` is closed or
collected, and at the end of the interpreter: neither an abandoned loop nor an exception in the
consumer leaves a process hanging.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Generator, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")
# A thread that waits for a network does not hear that it should stop; nobody waits long for it.
JOIN_SECONDS = 10


class Prefetcher(Iterator[T], Generic[T]):
    """The items of `source` in their order, at most `depth` of them made before they are asked for.

    source: a generator; it runs, and is closed, in the thread alone. An exception in it is raised
    here after the items before it, with the traceback of the place it came from.
    """

    def __init__(self, source: Generator[T, None, None], depth: int) -> None:
        if depth < 1:
            raise ValueError(f"depth={depth} must be at least 1; without a thread, use the source")
        self._channel = _Channel(depth)
        # The thread knows the channel and not this object, which can therefore be collected.
        self._thread = threading.Thread(
            target=_produce, args=(source, self._channel), name="cdpvae-prefetch", daemon=True
        )
        self.close = weakref.finalize(self, _stop, self._channel, self._thread)
        self._thread.start()

    def __next__(self) -> T:
        item, error = self._channel.take()
        if error is not None:
            raise error
        return item


class _Channel:
    """A bounded queue of (item, error) pairs that either side can end."""

    def __init__(self, depth: int) -> None:
        self._items: deque[tuple[Any, BaseException | None]] = deque()
        self._depth = depth
        self._changed = threading.Condition()
        self._last: BaseException | None = None
        self.stopped = False

    def wait_for_room(self) -> bool:
        """False when no more items are wanted."""
        with self._changed:
            self._changed.wait_for(lambda: self.stopped or len(self._items) < self._depth)
            return not self.stopped

    def put(self, item: Any, error: BaseException | None = None) -> None:
        with self._changed:
            self._items.append((item, error))
            self._changed.notify_all()

    def take(self) -> tuple[Any, BaseException | None]:
        """The next pair; an error is the last one and comes again when asked again."""
        with self._changed:
            if self._last is not None:
                return None, self._last
            self._changed.wait_for(lambda: self.stopped or self._items)
            if not self._items:
                return None, StopIteration()
            pair = self._items.popleft()
            self._last = pair[1]
            self._changed.notify_all()
            return pair

    def stop(self) -> None:
        with self._changed:
            self.stopped = True
            self._items.clear()
            self._changed.notify_all()


def _produce(source: Generator[Any, None, None], channel: _Channel) -> None:
    """The thread: one item at a time, made only when there is room for it."""
    try:
        while channel.wait_for_room():
            channel.put(next(source))
    except BaseException as error:  # to the consumer, whatever it is: StopIteration is the end
        channel.put(None, error)
    finally:
        source.close()


def _stop(channel: _Channel, thread: threading.Thread) -> None:
    channel.stop()
    if thread is not threading.current_thread():
        thread.join(JOIN_SECONDS)
