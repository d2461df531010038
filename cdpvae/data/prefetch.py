"""Make items ahead of their consumer, in a background thread.

The thread is a daemon that is stopped, and waited for, when the `Prefetcher` is closed or
collected, and at the end of the interpreter: neither an abandoned loop nor an exception in the
consumer leaves a process hanging.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")
# How long closing waits for the thread. One that waits for a network does not notice the stop.
JOIN_SECONDS = 10.0


class Prefetcher(Iterator[T], Generic[T]):
    """Hand out the items of `source` in their order, up to `depth` of them made ahead.

    source: a generator; it runs, and is closed, in the thread alone. An exception in it is raised
    here after the items before it, with the traceback of the place it came from.
    Raises ValueError for `depth` below 1.
    """

    def __init__(self, source: Generator[T, None, None], depth: int) -> None:
        if depth < 1:
            raise ValueError(f"depth={depth} must be at least 1; without a thread, use the source")
        self._channel: _Channel[T] = _Channel(depth)
        # The thread knows the channel and not this object, which can therefore be collected.
        self._thread = threading.Thread(
            target=_produce, args=(source, self._channel), name="cdpvae-prefetch", daemon=True
        )
        # Runs once: on `close()`, on collection, or at the end of the interpreter.
        self.close = weakref.finalize(self, _stop, self._channel, self._thread)
        self._thread.start()

    def __next__(self) -> T:
        return self._channel.take()


@dataclass(frozen=True)
class _Failure:
    """An exception on its way to the consumer; StopIteration is the end of the items."""

    error: BaseException


class _Channel(Generic[T]):
    """Pass items, and a failure after them, from a thread to its consumer; either can stop it."""

    def __init__(self, depth: int) -> None:
        self._items: deque[T | _Failure] = deque()
        self._depth = depth
        self._changed = threading.Condition()
        self._last: _Failure | None = None
        self.stopped = False

    def wait_for_room(self) -> bool:
        """Wait until fewer than `depth` items are waiting; False when no more are wanted."""
        with self._changed:
            self._changed.wait_for(lambda: self.stopped or len(self._items) < self._depth)
            return not self.stopped

    def put(self, item: T | _Failure) -> None:
        """Add an item, whether or not there is room."""
        # Only the thread adds, after it has waited for room; a failure needs no room.
        with self._changed:
            self._items.append(item)
            self._changed.notify_all()

    def take(self) -> T:
        """Wait for the next item. Raises the failure instead, and again when asked again."""
        with self._changed:
            if self._last is not None:
                raise self._last.error
            self._changed.wait_for(lambda: self.stopped or bool(self._items))
            # Stopped, and nothing is left.
            if not self._items:
                raise StopIteration
            item = self._items.popleft()
            # There is room for one more, which the thread may be waiting for.
            self._changed.notify_all()
            if isinstance(item, _Failure):
                self._last = item
                raise item.error
            return item

    def stop(self) -> None:
        """Throw away what is waiting and let both sides go on."""
        with self._changed:
            self.stopped = True
            self._items.clear()
            self._changed.notify_all()


def _produce(source: Generator[T, None, None], channel: _Channel[T]) -> None:
    """Run in the thread: make one item at a time, only when there is room for it."""
    try:
        while channel.wait_for_room():
            channel.put(next(source))
    except BaseException as error:  # the consumer raises it, whatever it is
        channel.put(_Failure(error))
    finally:
        # A generator must be closed in the thread that runs it.
        source.close()


def _stop(channel: _Channel[Any], thread: threading.Thread) -> None:
    """Stop the channel and wait for the thread, unless this is the thread itself."""
    channel.stop()
    # A thread cannot wait for itself: the last reference may have been dropped inside it.
    if thread is not threading.current_thread():
        thread.join(JOIN_SECONDS)
