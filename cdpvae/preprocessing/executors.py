"""Where a pure function is applied to shards: this machine's cores, or a Ray cluster.

Both executors yield results in the order of the tasks, hold a bounded number of tasks at a time,
and send the function to each worker once. No result depends on which executor computes it.

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

# Maps a task to its result; both are sent between processes.
Function = Callable[[Any], Any]


class Ready:
    """Stands in place of a task whose result is known already."""

    def __init__(self, result: Any) -> None:
        self.result = result


class Executor(Protocol):
    """Applies a function to tasks. workers: how many tasks are computed at a time."""

    workers: int

    def map(self, function: Function, tasks: Iterable[Any]) -> Iterator[Any]:
        """Yield function(task) of every task, in order.

        The function and the tasks must be picklable.
        """
        ...


def make_executor(name: str, workers: int | None) -> Executor:
    """Make the executor `local` or `ray`.

    workers: tasks at a time; None for all cores of the machine or the cluster.
    Raises ValueError for another name, and for `ray` when Ray is not installed.
    """
    # Ray is looked for only when it is asked for, as it is an optional dependency.
    if name == "local":
        return LocalExecutor(workers or available_cores())
    if name != "ray":
        raise ValueError(f"executor={name!r} must be local or ray")
    if importlib.util.find_spec("ray") is None:
        raise ValueError(
            "executor=ray needs Ray: pip install cdpvae[cluster], or use executor=local"
        )
    return RayExecutor(workers)


def available_cores() -> int:
    """Count the cores this process may use; in a container they are fewer than the machine has."""
    return len(os.sched_getaffinity(0))


class LocalExecutor:
    """Worker processes on this machine. A single worker, or a single task, needs no process."""

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def map(self, function: Function, tasks: Iterable[Any]) -> Iterator[Any]:
        """Yield function(task) of every task, in order."""
        # Two tasks to compute are worth starting processes.
        tasks = iter(tasks)
        first = _until_second_task(tasks) if self.workers > 1 else []
        if sum(not isinstance(task, Ready) for task in first) < 2:
            for task in itertools.chain(first, tasks):
                yield task.result if isinstance(task, Ready) else function(task)
            return
        # There is enough to do for several processes.
        yield from self._map_in_pool(function, itertools.chain(first, tasks))

    def _map_in_pool(self, function: Function, tasks: Iterable[Any]) -> Iterator[Any]:
        """Compute the tasks in worker processes. Raises OSError when one of them dies."""
        # The fork server imports what the function needs; each worker unpickles it once.
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
                # One more than are at work, so that no worker waits for the reader.
                max_pending=self.workers + 1,
            )
        except BrokenProcessPool:
            raise OSError(
                f"one of {self.workers} worker processes died, perhaps for want of memory; what "
                "is finished is kept: run again to continue, with fewer workers or a smaller "
                'shard_records (a script that calls this needs `if __name__ == "__main__":`)'
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


class RayExecutor:
    """Tasks on a Ray cluster: that of `RAY_ADDRESS` or of `ray start`, else a local cluster.

    workers: tasks at a time; default: the cluster's cores. Files the function writes must be on a
    file system that every node shares.
    """

    def __init__(self, workers: int | None = None) -> None:
        import ray

        # Join a running cluster; only where there is none, start a local one.
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
        """Yield function(task) of every task, in order."""
        import ray

        # A list keeps Ray from sending the function along with every task.
        holder = [ray.put(pickle.dumps(function))]
        remote = ray.remote(_call_on_node)
        try:
            yield from _in_order(
                tasks,
                submit=lambda task: remote.remote(holder, task),
                result=ray.get,
                max_pending=self.workers + 1,
            )
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None


def _until_second_task(tasks: Iterator[Any]) -> list[Any]:
    """Take tasks up to the second that is not Ready, or all of them."""
    taken: list[Any] = []
    unknown = 0
    while unknown < 2:
        task = next(tasks, None)
        if task is None:
            break
        taken.append(task)
        unknown += not isinstance(task, Ready)
    return taken


def _in_order(
    tasks: Iterable[Any],
    submit: Callable[[Any], Any],
    result: Callable[[Any], Any],
    max_pending: int,
) -> Iterator[Any]:
    """Yield results in the order of the tasks.

    tasks: tasks to compute, and `Ready` ones.
    submit: begins a task and returns a future of it.
    result: waits for the result of a future.
    max_pending: how many tasks may be under way.
    """
    # Results leave the queue in order, whichever is finished first.
    pending: deque[Any] = deque()
    for task in tasks:
        pending.append(task if isinstance(task, Ready) else submit(task))
        while pending and (len(pending) >= max_pending or isinstance(pending[0], Ready)):
            yield _result_of(pending.popleft(), result)
    # Wait for the tasks that are still under way.
    while pending:
        yield _result_of(pending.popleft(), result)


def _result_of(task: Any, result: Callable[[Any], Any]) -> Any:
    return task.result if isinstance(task, Ready) else result(task)


# A worker's function, unpickled once per process: it holds a tokenizer and a language model.
_function: Function | None = None


def _start_worker(pickled: bytes) -> None:
    """Prepare a worker process for its tasks."""
    global _function
    _one_thread()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _function = pickle.loads(pickled)


def _end_with_parent() -> None:
    """End this worker when its parent ends.

    A killed parent cannot stop its workers, and they would wait for a task for ever.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(task: Any) -> Any:
    assert _function is not None
    return _function(task)


def _call_on_node(holder: list[Any], task: Any) -> Any:
    """Compute a task on a node of the cluster. holder: a list of the function's reference."""
    return _fetch(holder[0])(task)


@functools.lru_cache(maxsize=1)
def _fetch(reference: Any) -> Function:
    """Fetch and unpickle the function, once in a process."""
    import ray

    _one_thread()
    return pickle.loads(ray.get(reference))


def _one_thread() -> None:
    """Switch off the tokenizer's own threads, which would compete with the workers for cores."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
