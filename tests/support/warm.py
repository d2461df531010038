"""Commands in forks of one process that has imported everything already.

A start of `python -m cdpvae.X` spends seconds of CPU on imports. Tests that start many commands
and are not about the start itself run them here: each is a fork with its own directory, output and
process group, and runs the module as `python -m` would.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class WarmPython:
    """The process; made at the first use, ended with the tests."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        for name in RENDEZVOUS:
            environment.pop(name, None)
        self.process = subprocess.Popen(
            # -P: names of this folder must not hide libraries.
            [sys.executable, "-P", __file__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(self.process.kill)

    def run(self, module: str, arguments: list[str], cwd: Path) -> subprocess.CompletedProcess:
        """`python -m module arguments` in `cwd`."""
        with tempfile.TemporaryDirectory() as folder:
            job = {"argv": [module, *arguments], "cwd": str(cwd), "folder": folder}
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
            assert answer, "the process that commands are forked from has ended"
            out, err = (Path(folder, name).read_text() for name in ("out", "err"))
        return subprocess.CompletedProcess(job["argv"], json.loads(answer), out, err)


def serve() -> None:
    """Import, then fork for every job on stdin; answer with its exit status."""
    answers = os.fdopen(os.dup(1), "w")
    # What libraries print while they are imported is no answer.
    os.dup2(2, 1)
    import cdpvae.evaluation.latents
    import cdpvae.evaluation.reconstruction
    import cdpvae.metrics
    import cdpvae.tasks.text_vae.setup

    cdpvae.metrics.ReconstructionMetrics()
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            run_job(job)
        _, status = os.waitpid(child, 0)
        answers.write(f"{os.waitstatus_to_exitcode(status)}\n")
        answers.flush()


def run_job(job: dict) -> None:
    """Run one module in this process, and leave it."""
    import runpy
    import traceback

    os.chdir(job["cwd"])
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(job["folder"], name), os.O_WRONLY | os.O_CREAT), descriptor)
    sys.argv = job["argv"]
    status = 0
    try:
        runpy.run_module(job["argv"][0], run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    serve()
