"""Where a pure function is applied to shards: this machine's cores, or a Ray cluster.

Both engines yield results in the order of the tasks, hold a bounded number of tasks at a time, and
give the function to a worker once. Nothing that is computed depends on which engine runs it.

Local workers come from a fork server: they share its imports, start in milliseconds and, unlike
plain forks, never inherit a lock held by a thread of the caller. They end with their parent, even
when it is killed.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import multiprocessing
import os
import pickle
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

Function = Callable[[Any], Any]


class Ready:
    """In place of a task: its result is known already."""

    def __init__(self, result: Any) -> None:
        self.result = result


class Engine(Protocol):
    """workers: how many tasks are computed at a time."""

    workers: int

    def map(self, function: Function, tasks: Iterable[Any]) -> Iterator[Any]:
        """function(task) of every task, in order. The function and the tasks must be picklable."""
        ...


def make_engine(name: str, workers: int | None) -> Engine:
    """`local` or `ray`. Raises ValueError when Ray is asked for and not installed."""
    if name == "local":
        return LocalEngine(workers or available_cores())
    if name != "ray":
        raise ValueError(f"executor={name!r} must be local or ray")
    if importlib.util.find_spec("ray") is None:
        raise ValueError(
            "executor=ray needs Ray: pip install cdpvae[cluster], or use executor=local"
        )
    return RayEngine(workers)


def available_cores() -> int:
    """Cores this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0))


class LocalEngine:
    """Worker processes on this machine; none when one worker, or one task, is all there is."""

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def map(self, function: Function, tasks: Iterable[Any]) -> Iterator[Any]:
        tasks = iter(tasks)
        first = _until_second_task(tasks) if self.workers > 1 else []
        if sum(not isinstance(task, Ready) for task in first) < 2:
            for task in itertools.chain(first, tasks):
                yield task.result if isinstance(task, Ready) else function(task)
            return
        yield from self._map_in_pool(function, itertools.chain(first, tasks))

    def _map_in_pool(self, function: Function, tasks: Iterable[Any]) -> Iterator[Any]:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([function.__class__.__module__])
        pool = ProcessPoolExecutor(
            self.workers, context, initializer=_start_worker, initargs=(pickle.dumps(function),)
        )
        try:
            yield from _in_order(
                tasks,
                submit=lambda task: pool.submit(_call, task),
                result=lambda future: future.result(),
                # One more than are at work, so that nobody waits for the reader.
                window=self.workers + 1,
            )
        except BrokenProcessPool:
            raise OSError(
                f"one of {self.workers} worker processes died, perhaps for want of memory; what "
                "is finished is kept: run again to continue, with fewer workers or a smaller "
                'shard_records (a script that calls this needs `if __name__ == "__main__":`)'
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


class RayEngine:
    """Tasks on a Ray cluster: the one `RAY_ADDRESS` names or `ray start` joined, else a local one.

    workers: tasks at a time; default: the cluster's cores. Files the function writes must be on a
    file system that every node shares.
    """

    def __init__(self, workers: int | None = None) -> None:
        import ray

        if not ray.is_initialized():
            try:
                ray.init(address="auto", log_to_driver=False)
            except ConnectionError as error:
                if "RAY_ADDRESS" in os.environ:
                    raise ValueError(
                        f"RAY_ADDRESS={os.environ['RAY_ADDRESS']}: no Ray cluster answers there: "
                        f"{str(error).splitlines()[0]}"
                    ) from None
                ray.init(log_to_driver=False, include_dashboard=False)
        self.workers = workers or int(ray.cluster_resources().get("CPU", 1))

    def map(self, function: Function, tasks: Iterable[Any]) -> Iterator[Any]:
        import ray

        # A list keeps Ray from sending the function along with every task.
        holder = [ray.put(pickle.dumps(function))]
        remote = ray.remote(_call_on_node)
        try:
            yield from _in_order(
                tasks,
                submit=lambda task: remote.remote(holder, task),
                result=ray.get,
                window=self.workers + 1,
            )
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None


def _until_second_task(tasks: Iterator[Any]) -> list[Any]:
    """Tasks up to and with the second that is not Ready."""
    taken, open_tasks = [], 0
    while open_tasks < 2:
        task = next(tasks, None)
        if task is None:
            break
        taken.append(task)
        open_tasks += not isinstance(task, Ready)
    return taken


def _in_order(
    tasks: Iterable[Any],
    submit: Callable[[Any], Any],
    result: Callable[[Any], Any],
    window: int,
) -> Iterator[Any]:
    """Results in the order of the tasks, at most `window` of them under way."""
    under_way: deque[Any] = deque()
    for task in tasks:
        under_way.append(task if isinstance(task, Ready) else submit(task))
        while under_way and (len(under_way) >= window or isinstance(under_way[0], Ready)):
            yield _take(under_way.popleft(), result)
    while under_way:
        yield _take(under_way.popleft(), result)


def _take(pending: Any, result: Callable[[Any], Any]) -> Any:
    return pending.result if isinstance(pending, Ready) else result(pending)


# A worker's function, unpickled once per process: it holds a tokenizer and a language model.
_function: Function | None = None


def _start_worker(pickled: bytes) -> None:
    global _function
    _one_thread()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _function = pickle.loads(pickled)


def _end_with_parent() -> None:
    """A killed parent cannot stop its workers, and they would wait for a task for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(task: Any) -> Any:
    assert _function is not None
    return _function(task)


def _call_on_node(holder: list[Any], task: Any) -> Any:
    return _fetch(holder[0])(task)


@functools.lru_cache(maxsize=1)
def _fetch(reference: Any) -> Function:
    import ray

    _one_thread()
    return pickle.loads(ray.get(reference))


def _one_thread() -> None:
    """Workers are the parallelism; the tokenizer's own threads would fight over the same cores."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
