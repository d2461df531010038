"""Executors: results in order, bounded work under way, one exact result wherever workers run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cdpvae.config import DataConfig
from cdpvae.preprocessing.executors import LocalExecutor, Ready, make_executor
from cdpvae.preprocessing.pipeline import preprocess
from cdpvae.preprocessing.stages.candidates import Candidates
from support.processed import MIXED, files_of, mixed_records
from support.runs import REPOSITORY


class Square:
    """A function of state and task, as the pipeline's is; slower for smaller numbers."""

    def __init__(self, offset: int) -> None:
        self.offset = offset

    def __call__(self, number: int) -> tuple[int, int]:
        time.sleep(0.02 / (number + 1))
        return self.offset + number * number, os.getpid()


class Meets(Square):
    """Ends when two processes have begun, which on nodes of one core are on two nodes."""

    def __init__(self, directory: Path) -> None:
        super().__init__(0)
        self.directory = directory

    def __call__(self, number: int) -> tuple[int, int]:
        (self.directory / str(os.getpid())).touch()
        deadline = time.monotonic() + 120
        while len(list(self.directory.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        return super().__call__(number)


class Fails(Square):
    def __call__(self, number: int) -> tuple[int, int]:
        if number == 3:
            raise OSError(28, "No space left on device", "/some/file")
        return super().__call__(number)


class Dies(Square):
    def __call__(self, number: int) -> tuple[int, int]:
        if number == 3:
            os._exit(9)
        return super().__call__(number)


def test_results_come_in_order_from_other_processes():
    tasks = [0, 1, Ready("known"), *range(2, 12), Ready("last")]
    found = list(LocalExecutor(2).map(Square(100), iter(tasks)))
    assert found[2] == "known" and found[-1] == "last"
    computed = [result for result in found if not isinstance(result, str)]
    assert [value for value, _ in computed] == [100 + n * n for n in range(12)]
    processes = {process for _, process in computed}
    assert os.getpid() not in processes and 1 <= len(processes) <= 2


@pytest.mark.parametrize(
    ("workers", "tasks"),
    [(1, [1, 2, 3]), (4, [Ready("a"), 1, Ready("b")])],
    ids=["one worker", "one task"],
)
def test_no_process_starts_for_nothing(workers, tasks):
    found = list(LocalExecutor(workers).map(Square(0), tasks))
    here = [result[1] for result in found if not isinstance(result, str)]
    assert set(here) == {os.getpid()} and len(found) == 3


def test_tasks_are_drawn_as_they_are_needed():
    """A reader of a huge input must not be read to its end before the first result."""
    drawn = []

    def tasks():
        for number in range(100):
            drawn.append(number)
            yield number

    results = LocalExecutor(2).map(Square(0), tasks())
    next(results)
    assert len(drawn) <= 2 + 2
    results.close()


def test_an_error_of_a_worker_is_the_callers_error():
    results = LocalExecutor(2).map(Fails(0), range(10))
    with pytest.raises(OSError, match="No space left") as caught:
        list(results)
    assert (caught.value.errno, caught.value.filename) == (28, "/some/file")


def test_a_dead_worker_is_one_clear_error():
    with pytest.raises(OSError, match="one of 2 worker processes died.*run again to continue"):
        list(LocalExecutor(2).map(Dies(0), range(10)))


def test_workers_end_with_a_killed_parent(tmp_path):
    """They would wait for tasks for ever, and hold their memory."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import time, os\n"
        "from cdpvae.preprocessing.executors import LocalExecutor\n"
        "class Work:\n"
        "    def __call__(self, task):\n"
        "        return os.getpid()\n"
        "if __name__ == '__main__':\n"
        "    for pid in LocalExecutor(2).map(Work(), iter(int, 1)):\n"
        "        print(pid, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as run:
        workers = {int(run.stdout.readline()) for _ in range(20)}
        run.kill()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, f"workers {workers} outlive their parent"
        time.sleep(0.05)


def test_an_unknown_executor_is_refused():
    with pytest.raises(ValueError, match="executor='slurm' must be local or ray"):
        make_executor("slurm", None)


def test_a_shard_on_another_nodes_disk_is_an_error(tmp_path):
    summary = {"source": 0, "start": 10_000, "candidates": 3}
    with pytest.raises(ValueError, match="000-0000010000.arrow is missing.*all nodes of the clus"):
        Candidates().append(tmp_path, summary)


@pytest.fixture(scope="module")
def ray_cluster():
    """Two nodes with one core each, on this machine."""
    pytest.importorskip("ray", reason="the test needs Ray: pip install cdpvae[cluster]")
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    # What the nodes of a real cluster have installed.
    path = os.pathsep.join([str(REPOSITORY), *filter(None, sys.path)])
    ray.init(
        address=cluster.address,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )
    yield ray
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.timeout(300)
def test_a_cluster_of_two_nodes_gives_the_single_machines_bytes(tmp_path, wrapper, ray_cluster):
    inputs = mixed_records(tmp_path, count=150)

    def run(out: str, **how):
        config = DataConfig(input=inputs, processed_dir=str(tmp_path / out), **MIXED, **how)
        return preprocess(config, wrapper, progress=False)

    here = run("here", workers=1)
    there = run("there", executor="ray", shard_records=25)
    assert files_of(there.path) == files_of(here.path)
    assert there.manifest["run"]["executor"] == "ray"
    nodes = [node for node in ray_cluster.nodes() if node["Alive"]]
    assert len(nodes) == 2 and make_executor("ray", None).workers == 2


@pytest.mark.timeout(300)
def test_ray_computes_on_both_nodes_and_passes_errors_on(ray_cluster, tmp_path):
    executor = make_executor("ray", 2)
    found = list(executor.map(Meets(tmp_path), [*range(6), Ready("known")]))
    values, processes = zip(*found[:-1], strict=True)
    assert found[-1] == "known" and list(values) == [n * n for n in range(6)]
    assert len(set(processes)) == 2
    with pytest.raises(OSError, match="No space left"):
        list(executor.map(Fails(0), range(10)))
